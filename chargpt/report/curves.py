"""Learning curves: the one form in which the page, the picture and DVC's plots take them, and the picture.

The one idea to know: a curve is read from two files, curve.csv, which is the same for equal runs, and the times of its
steps, which are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chargpt.errors import CorpusError
from chargpt.files import replaced_file


@dataclass(frozen=True)
class CurvePoint:
    step: int
    tokens: int
    seconds: float | None  # of training; None: not known
    train_loss: float | None  # None: not measured here
    val_loss: float | None


RunCurve = Sequence[CurvePoint]


def read_curve(path: Path, seconds: Mapping[int, float]) -> list[CurvePoint]:
    """The points of a curve.csv; `seconds` of training by step, between which it is interpolated; empty: not known.

    Raises CorpusError when the file is damaged.
    """
    known = sorted(seconds)
    points = []
    try:
        heading, *lines = path.read_text(encoding="utf-8").splitlines()
        names = heading.split(",")
        for line in lines:
            row = dict(zip(names, line.split(","), strict=True))
            step = int(row["step"])
            at = float(np.interp(step, known, [seconds[step] for step in known])) if known else None
            train, val = (float(row[key]) if row[key] else None for key in ("train_loss", "val_loss"))
            points.append(CurvePoint(step, int(row["tokens"]), at, train, val))
    except (OSError, ValueError, KeyError, OverflowError) as error:
        raise CorpusError(f"{path} is no learning curve, or is damaged ({error}); train the run again") from None
    return points


def evaluations_csv(curves: Sequence[tuple[str, int, RunCurve]]) -> str:
    """Every evaluation of every run (variant, seed, curve) as CSV, a line each, for `dvc plots`."""
    lines = ["variant,seed,tokens,seconds,val_loss"]
    lines += [
        f"{variant},{seed},{point.tokens},{'' if point.seconds is None else f'{point.seconds:g}'},{point.val_loss:g}"
        for variant, seed, curve in curves
        for point in curve
        if point.val_loss is not None
    ]
    return "\n".join(lines) + "\n"


def plot_curves(curves: Mapping[str, Sequence[RunCurve]], picture: Path) -> None:
    """Draw the loss over tokens of every variant (a colour) and seed (a line): validation solid, training faint.

    `curves`: for each variant the curve of each seed. Writes a PNG.
    """
    from matplotlib import color_sequences
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    colours = color_sequences["tab10" if len(curves) <= 10 else "tab20"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (variant, seeds) in enumerate(curves.items()):
        for seed, curve in enumerate(seeds):
            colour = colours[number % len(colours)]
            seen = [point for point in curve if point.tokens > 0]  # without step 0: the axis is logarithmic
            train = [(point.tokens, point.train_loss) for point in seen if point.train_loss is not None]
            val = [(point.tokens, point.val_loss) for point in seen if point.val_loss is not None]
            axes.plot(*zip(*train, strict=True), color=colour, alpha=0.25, linewidth=0.8)
            label = variant if seed == 0 else None
            axes.plot(*zip(*val, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("tokens seen")
    axes.set_xscale("log")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("validation loss (solid) and training loss (faint)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=1 + len(curves) // 10)
    with replaced_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)
