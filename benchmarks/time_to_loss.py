"""Validation loss over seconds of training: our presets against nanoGPT's CPU configuration, in one run on one machine.

Run as `python -m benchmarks.time_to_loss [--seeds 1 2 3] [--presets cpu-best]` after `make repro`, on a quiet machine.
nanoGPT's configuration runs on the torch implementation in float32, uncompiled, as nanoGPT itself does on a CPU; then
`modern` has as many steps as fit into that time by its speed measured here, and other presets have their own. The runs
take turns, seed by seed, so that a drift of the machine's speed falls on all of them. Seconds are those of the training
steps; the loss is `full` of `chargpt.evaluation`.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, machine
from chargpt import experiment
from chargpt.config import EvaluationConfig, TrackingConfig, TrainConfig
from chargpt.config.presets import PRESETS
from chargpt.data import Splits, load_splits
from chargpt.planner import steps_in
from chargpt.report import read_curve, timed
from chargpt.tracking import CURVE, TIMING, read_timing
from chargpt.training import Run, measure_speed

YARDSTICK = "nanogpt-cpu"
SPLITS = Path("data/splits")
PICTURE = Path("docs/time_to_loss.png")
POINTS = 25  # evaluations in a run, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS.keys() - {YARDSTICK}), default=[])
    options = parser.parse_args()
    yardstick = replace(PRESETS[YARDSTICK], backend="torch", eval_interval=2000 // POINTS)
    splits = load_splits(SPLITS)
    runs = []
    for seed in options.seeds:
        runs.append(measure(YARDSTICK, yardstick, seed, splits))
        runs.append(measure("modern, same time", same_time(runs[-1]["seconds"], seed, splits), seed, splits))
        runs += [measure(name, PRESETS[name], seed, splits) for name in options.presets]
    content = {"machine": machine(), "runs": runs}
    (RESULTS / "time_to_loss.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(runs, PICTURE)
    print("| configuration | seeds | " + " | ".join(COLUMNS) + " |\n|---|---:|" + "---:|" * len(COLUMNS))
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        cells = [spread([run[key] for run in mine], digits) for key, digits in COLUMNS.items()]
        print(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")


COLUMNS = {  # of metrics.json, with digits
    "parameters": 0,
    "seconds": 1,
    "tokens": 0,
    "val_full": 4,
    "val_sliding": 4,
    "val_nanogpt": 4,
}


def measure(name: str, config: TrainConfig, seed: int, splits: Splits) -> dict[str, Any]:
    """Train once: the final numbers, and the curve as pairs of seconds and validation loss."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        run = Run(name, seed, config, splits, "tiny_shakespeare", folder)
        metrics = experiment.train(run, EvaluationConfig(), TrackingConfig(enabled=False))
        seconds = {step: moment.seconds for step, moment in read_timing(folder / TIMING).items()}
        points = read_curve(folder / CURVE, seconds)
    curve = [(point.seconds, point.val_loss) for point in points if point.val_loss is not None]
    return {"name": name, "curve": curve} | timed(metrics, seconds)


def same_time(seconds: float, seed: int, splits: Splits) -> TrainConfig:
    """`modern` with as many steps as take so many seconds here."""
    config = PRESETS["modern"]
    run = Run("modern", seed, config, splits, "tiny_shakespeare", Path("unused"))
    return replace(config, max_steps=steps_in(seconds / 60, config, measure_speed(run, seconds=10)))


def draw(runs: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(run["name"] for run in runs))
    for run in runs:
        colour = f"C{names.index(run['name'])}"
        label = run["name"] if run["seed"] == runs[0]["seed"] else None
        axes.plot(*zip(*run["curve"][1:], strict=True), color=colour, alpha=0.8, linewidth=1.5, label=label)
    axes.axhline(1.4697, color="grey", linewidth=0.8, linestyle="--")
    axes.text(0, 1.4697, "nanoGPT's GPU configuration on an A100, 1.4697", va="top", fontsize=8)
    axes.set_ylim(top=3.0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, format="png", dpi=120)


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


if __name__ == "__main__":
    main()
