"""What a run tells about itself: its description for a tracker, its curve, and its results."""

import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from chargpt import checkpoint
from chargpt.config import (
    EvaluationConfig,
    SampleConfig,
    flatten,
)
from chargpt.evaluation import evaluate
from chargpt.files import replaced_file
from chargpt.generation import generate_text
from chargpt.models import parameter_count
from chargpt.runtime import Runtime, device_name
from chargpt.tracking import Dataset, Point, RunDescription, Tracker
from chargpt.training.state import Run, State


def finish(
    state: State,
    run: Run,
    runtime: Runtime,
    evaluation: EvaluationConfig,
    tracker: Tracker,
    protocols: Sequence[str],
) -> dict[str, Any]:
    """Evaluate the best checkpoint by each protocol, leave the results in the folder, and close the tracked run."""
    assert state.best is not None
    config = run.config
    model, tokenizer = checkpoint.load_model(run.folder / "best", runtime.device, config.kernels)
    # In fp32, whatever it was trained in, so that `chargpt eval` gives the same numbers.
    losses = evaluate(model, run.splits.val_with_context, evaluation, config.batch_size, runtime.device, protocols)
    text = generate_text(model, tokenizer, "", SampleConfig(max_new_tokens=300), runtime.device)[0]
    val_losses = [point.metrics["val/loss"] for point in state.history if "val/loss" in point.metrics]
    metrics = {
        "variant": run.variant,
        "seed": run.seed,
        "parameters": parameter_count(model),
        "steps": state.step,
        "tokens": state.step * config.tokens_per_step,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.step * config.tokens_per_step / state.seconds, 1),
        **{f"val_{protocol}": loss for protocol, loss in losses.items()},
        "val_full_last": val_losses[-1],
        "best_step": state.best[0],
        "kernels": runtime.kernels,
        "device": device_name(runtime.device),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "torch": torch.__version__,
    }
    _write_text(run.folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    _write_text(run.folder / "sample.txt", text)
    with tempfile.TemporaryDirectory() as scratch:
        delivery = Path(scratch) / "checkpoint"  # the best one without what only training needs
        checkpoint.export_checkpoint(run.folder / "best", delivery)
        tracker.finish(
            "FINISHED",
            summary={name: value for name, value in metrics.items() if isinstance(value, (int, float))},
            artifacts=[run.folder / name for name in ("config.yaml", "curve.csv", "sample.txt")],
            model=delivery,
        )
    _write_text(run.folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")  # last: it marks a finished run
    return metrics


def describe(run: Run, runtime: Runtime) -> RunDescription:
    """The run as a tracker shows it."""
    fingerprint = run.splits.fingerprint
    return RunDescription(
        variant=run.variant,
        seed=run.seed,
        params=flatten(run.config) | {"seed": run.seed} | run.teacher_weights,
        tags={
            "corpus": run.corpus,
            "corpus_sha256": run.splits.text_sha256,
            "splits_sha256": fingerprint,
            "tokenizer_sha256": run.splits.tokenizer.fingerprint,
            "kernels": runtime.kernels,
            "precision": runtime.precision,
            "device": device_name(runtime.device),
            "torch": torch.__version__,
        },
        dataset=Dataset(run.corpus, fingerprint, len(run.splits.train), len(run.splits.val)),
    )


def write_curve(history: list[Point], tokens_per_step: int, path: Path) -> None:
    """The whole curve as CSV: step, tokens, seconds, train_loss, val_loss, learning_rate; empty where not measured."""
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for point in history:
        rows[point.step] |= point.metrics
    lines = ["step,tokens,seconds,train_loss,val_loss,learning_rate"]
    keys = ("train/seconds", "train/loss", "val/loss", "train/learning_rate")
    for step, metrics in sorted(rows.items()):
        measured = [f"{metrics[key]:.6g}" if key in metrics else "" for key in keys]
        lines.append(",".join([str(step), str(step * tokens_per_step), *measured]))
    _write_text(path, "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replaced_file(path) as file:
        file.write(text.encode())
