"""Trained variants side by side: rows of metrics as a Markdown table, and their curves as one picture."""

import csv
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chargpt.files import replaced_file

Row = dict[str, Any]  # metrics.json of one run

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", lambda x: f"{x:,.0f}"),
    ("steps", "steps", lambda x: f"{x:,.0f}"),
    ("tokens_per_second", "tokens/s", lambda x: f"{x:,.0f}"),
    ("seconds", "seconds", lambda x: f"{x:,.1f}"),
    ("val_full", "val (full)", lambda x: f"{x:.4f}"),
    ("val_sliding", "val (sliding)", lambda x: f"{x:.4f}"),
    ("val_nanogpt", "val (nanogpt)", lambda x: f"{x:.4f}"),
)


def comparison_table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each variant, in the order they come: mean ± standard deviation over seeds.

    Losses are in nats per token, of the checkpoint with the lowest `full` validation loss.
    """
    lines = [
        "| variant | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + " | kernels |",
        "|---|---:|" + "---:|" * len(COLUMNS) + "---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        cells = [_mean_and_deviation([row[key] for row in runs], show) for key, _, show in COLUMNS]
        kernels = ", ".join(sorted({row["kernels"] for row in runs}))
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + f" | {kernels} |")
    return "\n".join(lines)


def plot_curves(curves: dict[str, list[Path]], picture: Path) -> None:
    """Draw the loss over tokens of every variant (a colour) and seed (a line): validation solid, training faint.

    `curves`: for each variant the curve.csv of each seed. Writes a PNG.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (variant, paths) in enumerate(curves.items()):
        for seed, path in enumerate(paths):
            points = read_curve(path)
            colour = f"C{number % 10}"
            axes.plot(*_series(points, "train_loss"), color=colour, alpha=0.25, linewidth=0.8)
            label = variant if seed == 0 else None
            axes.plot(*_series(points, "val_loss"), color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("tokens seen")
    axes.set_xscale("log")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("validation loss (solid) and training loss (faint)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def read_curve(path: Path) -> list[dict[str, float]]:
    """The points of a curve.csv, each with the columns that were measured there."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _series(points: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    measured = [point for point in points if key in point and point["tokens"] > 0]  # the axis is logarithmic
    return [point["tokens"] for point in measured], [point[key] for point in measured]


def _mean_and_deviation(values: list[float], show: Callable[[float], str]) -> str:
    mean = show(statistics.fmean(values))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {show(statistics.stdev(values))}"
