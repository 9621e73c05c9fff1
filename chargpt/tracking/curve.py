"""The learning curve as a file in the run's folder: without times, so that equal runs leave equal bytes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from chargpt.files import replaced_file, sweep
from chargpt.training import Event, Point, Saved, Started

CURVE = "curve.csv"
COLUMNS = {"train_loss": "train/loss", "val_loss": "val/loss", "learning_rate": "train/learning_rate"}


class CurveFile:
    """Listens to a trainer and keeps curve.csv as far as the last checkpoint."""

    def __init__(self, folder: Path, tokens_per_step: int) -> None:
        self.path, self.tokens_per_step = folder / CURVE, tokens_per_step

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                sweep(self.path)
            case Saved():
                with replaced_file(self.path) as file:
                    file.write(curve_text(event.history, self.tokens_per_step).encode())


def curve_text(history: Sequence[Point], tokens_per_step: int) -> str:
    """The whole curve as CSV: step, tokens, and COLUMNS, empty where not measured."""
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for point in history:
        rows[point.step] |= point.metrics
    lines = [",".join(["step", "tokens", *COLUMNS])]
    for step, metrics in sorted(rows.items()):
        measured = [f"{metrics[key]:.6g}" if key in metrics else "" for key in COLUMNS.values()]
        lines.append(",".join([str(step), str(step * tokens_per_step), *measured]))
    return "\n".join(lines) + "\n"
