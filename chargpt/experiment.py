"""One run from its config to its results: trained, listened to, scored, and left in its folder.

The one idea to know: what marks a run as finished is metrics.json, which is written last.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from chargpt import checkpoint
from chargpt.config import EvaluationConfig, SampleConfig, TrackingConfig, flatten
from chargpt.console import Console, duration, say
from chargpt.data import keep_splits, require_size
from chargpt.errors import RunInterruptedError, TrainingError
from chargpt.evaluation import PROTOCOLS, bits_per_byte, evaluate
from chargpt.files import replaced_file, sweep
from chargpt.generation import generate_text
from chargpt.interrupts import Interrupts
from chargpt.models import parameter_count
from chargpt.runtime import device_name
from chargpt.tracking import CURVE, CurveFile, Dataset, RunDescription, Timing, Tracker, listening, open_tracker
from chargpt.training import Run, Trainer, estimate, memory_errors

METRICS, CONFIG, SAMPLE = "metrics.json", "config.yaml", "sample.txt"


def train(
    run: Run,
    evaluation: EvaluationConfig,
    tracking: TrackingConfig,
    protocols: Sequence[str] = PROTOCOLS,
    data: Path | None = None,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Train until the steps or the patience are spent, going on from the folder's last checkpoint if there is one.

    The best checkpoint is scored by each of `protocols`, of which `full` must be one. The run's data goes into the
    folder `data`, under its hash, unless it lies there; None: it has a place already. `minutes` of training were asked
    for, and a line is printed when it will be far more. Leaves in `run.folder`: best/ and
    last/ (checkpoints), config.yaml, curve.csv, timing.csv, sample.txt and metrics.json, which is also what it returns.
    Raises TrainingError (folder in use or finished, loss not finite, too little memory), CheckpointError (the last
    checkpoint is damaged, or of another config), RunInterruptedError (SIGINT or SIGTERM, with everything saved),
    CorpusError (too few tokens).
    """
    require_size(run.splits, run.config.model.block_size)
    forked = torch.random.fork_rng()  # torch's default generators are the dropout stream; the caller's go on after it
    with forked, memory_errors(run), checkpoint.locked(run.folder), Interrupts(_announce) as interrupts:
        require_unfinished(run.folder)
        checkpoint.remove_unreferenced(run.folder)
        for name in (METRICS, CONFIG, SAMPLE):
            sweep(run.folder / name)
        trainer = Trainer(run)
        if data is not None:
            keep_splits(data, run.splits)
        _write_text(run.folder / CONFIG, yaml.safe_dump(dataclasses.asdict(run.config), sort_keys=False))
        _say_what_begins(trainer)
        timing = Timing(run.folder)
        with interrupts.deferred():  # so that no run is left open in the store
            tracker = open_tracker(tracking, _description(trainer), run.folder, trainer.resumed)
        try:
            bytes_per_token, patience = run.splits.val_bytes_per_token, run.config.patience
            with interrupts.deferred(), Console(timing, bytes_per_token, patience, minutes) as console:
                curve = CurveFile(run.folder, run.config.tokens_per_step)
                trainer.train((timing, console, curve, listening(tracker, timing)), lambda: interrupts.requested)
            say(f"scoring the best model on all {len(run.splits.val):,} validation tokens")
            return _finish(trainer, evaluation, tracker, timing, protocols)
        except (KeyboardInterrupt, RunInterruptedError):
            tracker.finish("KILLED")
            raise
        except BaseException:
            tracker.finish("FAILED")
            raise


def require_unfinished(folder: Path) -> None:
    """Raise TrainingError when the folder holds a finished run."""
    if (folder / METRICS).exists():
        raise TrainingError(
            f"{folder} holds a finished run, which stays as it is; to train longer or otherwise, choose another folder "
            f"(--out), and --like {folder} with --set max_steps=N for the same run with more steps"
        )


def _announce(signal: str) -> None:
    say(f"{signal}: finishing this step and saving (again to stop at once)")


def _say_what_begins(trainer: Trainer) -> None:
    run = trainer.run
    if trainer.resumed:
        say(f"resuming from step {trainer.state.step} in {run.folder}")
    for line in trainer.runtime.reasons:
        say(line)
    expected = estimate(trainer)
    say(
        f"{expected.parameters:,} parameters, about {expected.memory / 2**20:,.0f} MiB of memory, "
        f"{run.config.max_steps - trainer.state.step:,} steps to go, about {duration(expected.seconds)} of training"
    )
    if run.teachers:
        say(f"learning what {', '.join(map(str, run.teachers))} predict" + " together" * (len(run.teachers) > 1))


def _finish(
    trainer: Trainer, evaluation: EvaluationConfig, tracker: Tracker, timing: Timing, protocols: Sequence[str]
) -> dict[str, Any]:
    """Evaluate the best checkpoint by each protocol, leave the results in the folder, and close the tracked run."""
    run, state, runtime = trainer.run, trainer.state, trainer.runtime
    assert state.best is not None
    config, best = run.config, run.folder / "best"
    model, tokenizer = checkpoint.load_model(best, runtime.device, config.backend)
    # In fp32, whatever it was trained in, so that `chargpt eval` gives the same numbers.
    losses = evaluate(model, run.splits.val_with_context, evaluation, config.batch_size, runtime.device, protocols)
    text = generate_text(model, tokenizer, "", SampleConfig(max_new_tokens=300, engine="torch"), runtime.device)[0]
    val_losses = [point.metrics["val/loss"] for point in state.history if "val/loss" in point.metrics]
    metrics = {
        "variant": run.variant,
        "seed": run.seed,
        "parameters": parameter_count(model),
        "steps": state.step,
        "tokens": state.step * config.tokens_per_step,
        **{f"val_{protocol}": loss for protocol, loss in losses.items()},
        "bits_per_byte": bits_per_byte(losses["full"], run.splits.val_bytes_per_token),
        "val_last": val_losses[-1],  # of the last model, as training scores it: eval_tokens, its precision
        "best_step": state.best[0],
        "weights_sha256": checkpoint.read_description(best)["files"][checkpoint.WEIGHTS],
        "backend": runtime.backend,
        "device": device_name(runtime.device),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "torch": torch.__version__,
    }
    _write_text(run.folder / SAMPLE, text)
    tracker.finish(
        "FINISHED",
        summary={name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        | {"seconds": round(timing.seconds, 3)},
        tags={"weights_sha256": metrics["weights_sha256"]},
        artifacts=[run.folder / name for name in (CONFIG, CURVE, SAMPLE)],
        model=best,
    )
    _write_text(run.folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    return metrics


def _description(trainer: Trainer) -> RunDescription:
    """The run as a tracker shows it."""
    run, runtime = trainer.run, trainer.runtime
    return RunDescription(
        variant=run.variant,
        seed=run.seed,
        params=flatten(run.config) | {"seed": run.seed} | run.teacher_weights,
        tags={
            "corpus": run.corpus,
            "splits_sha256": run.splits.fingerprint,
            "tokenizer_sha256": run.splits.tokenizer.fingerprint,
            "backend": runtime.backend,
            "precision": runtime.precision,
            "device": device_name(runtime.device),
            "torch": torch.__version__,
        },
        note=f"Talk to it: `chargpt serve {run.home or run.folder}`",
        dataset=Dataset(run.corpus, run.splits.fingerprint, len(run.splits.train), len(run.splits.val)),
    )


def _write_text(path: Path, text: str) -> None:
    with replaced_file(path) as file:
        file.write(text.encode())
