"""Learning curves: their files, and all of them as one picture."""

import csv
from pathlib import Path

from chargpt.files import replaced_file


def plot_curves(curves: dict[str, list[Path]], picture: Path) -> None:
    """Draw the loss over tokens of every variant (a colour) and seed (a line): validation solid, training faint.

    `curves`: for each variant the curve.csv of each seed. Writes a PNG.
    """
    from matplotlib import color_sequences
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    colours = color_sequences["tab10" if len(curves) <= 10 else "tab20"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (variant, paths) in enumerate(curves.items()):
        for seed, path in enumerate(paths):
            points = read_curve(path)
            colour = colours[number % len(colours)]
            axes.plot(*_series(points, "train_loss"), color=colour, alpha=0.25, linewidth=0.8)
            label = variant if seed == 0 else None
            axes.plot(*_series(points, "val_loss"), color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("tokens seen")
    axes.set_xscale("log")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("validation loss (solid) and training loss (faint)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=1 + len(curves) // 10)
    with replaced_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def read_curve(path: Path) -> list[dict[str, float]]:
    """The points of a curve.csv, each with the columns that were measured there."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _series(points: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    measured = [point for point in points if key in point and point["tokens"] > 0]  # the axis is logarithmic
    return [point["tokens"] for point in measured], [point[key] for point in measured]
