"""Where the marks of the two charts lie, in percent of the drawing's width and height.

The one idea to know: percent, and lines in a square of 1000 × 1000 that the browser stretches, fit every window without
a script. page.js draws the curves by the same rules when their axis or the choice of variants changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chargpt.report.curves import RunCurve
from chargpt.report.table import Statistic

TRAIN_POINTS = 80  # of each run's training curve, which has a point every few steps
SIDE = 1000  # of the square that the curves are drawn in
WIDTH = 0.99  # the share of it that they take, so that the dot at the end of the longest is whole


# -------------------------------------------------------------------------------------------------------------- ladder


@dataclass(frozen=True)
class Rung:
    """One variant under one protocol; every number is a percentage of the width."""

    mean: float
    low: float | None  # mean ∓ one standard deviation, or None
    high: float | None
    seeds: list[float]
    above: float | None  # the mean of the variant before it
    gain: float | None  # its mean loss − the loss of the variant before it, in nats


@dataclass(frozen=True)
class Ladder:
    rungs: dict[str, list[Rung]]  # by protocol
    published: list[float | None]
    references: dict[str, float]
    ticks: list[tuple[float, str]]  # position, label


def ladder_chart(
    losses: Mapping[str, Sequence[Sequence[float]]],
    published: Sequence[float | None],
    references: Mapping[str, float],
) -> Ladder:
    """The ladder of `losses[protocol][variant][seed]`, on one axis for all protocols."""
    statistics = {protocol: [Statistic.of(seeds) for seeds in variants] for protocol, variants in losses.items()}
    shown = [loss for variants in losses.values() for seeds in variants for loss in seeds]
    shown += [loss for loss in (*published, *references.values()) if loss is not None]
    for group in statistics.values():
        for one in group:
            shown += [one.mean - (one.deviation or 0), one.mean + (one.deviation or 0)]
    low, high = min(shown), max(shown)
    margin = max((high - low) * 0.05, 0.02)
    low, high = low - margin, high + margin

    def place(loss: float) -> float:
        return round(100 * (loss - low) / (high - low), 2)

    rungs = {}
    for protocol, group in statistics.items():
        rungs[protocol] = [
            Rung(
                mean=place(one.mean),
                low=None if one.deviation is None else place(one.mean - one.deviation),
                high=None if one.deviation is None else place(one.mean + one.deviation),
                seeds=[place(loss) for loss in seeds],
                above=None if before is None else place(before.mean),
                gain=None if before is None else one.mean - before.mean,
            )
            for before, one, seeds in zip([None, *group[:-1]], group, losses[protocol], strict=True)
        ]
    return Ladder(
        rungs=rungs,
        published=[None if loss is None else place(loss) for loss in published],
        references={name: place(loss) for name, loss in references.items()},
        ticks=[(place(value), label) for value, label in linear_ticks(low, high, 8)],
    )


# -------------------------------------------------------------------------------------------------------------- curves


Mark = tuple[float, float, float | None, float]  # step, tokens, seconds (None: not known), loss


@dataclass(frozen=True)
class Curve:
    """The measured points of one run, without step 0, which a log axis lacks."""

    variant: int
    seed: int
    val: list[Mark]
    train: list[Mark]

    @classmethod
    def of(cls, variant: int, seed: int, curve: RunCurve) -> "Curve":
        """The training curve is thinned out to means of neighbours."""
        val, train = (
            [
                (float(point.step), float(point.tokens), point.seconds, float(loss))
                for point in curve
                if point.step > 0 and (loss := getattr(point, key)) is not None
            ]
            for key in ("val_loss", "train_loss")
        )
        return cls(variant, seed, val, _thinned(train))

    def data(self) -> dict[str, Any]:
        """For page.js, with as many digits as a screen can show."""
        rounded = {
            name: [
                [step, tokens, None if seconds is None else float(f"{seconds:.5g}"), round(loss, 4)]
                for step, tokens, seconds, loss in points
            ]
            for name, points in (("val", self.val), ("train", self.train))
        }
        return {"variant": self.variant, "seed": self.seed} | rounded


@dataclass(frozen=True)
class Line:
    """One run's SVG paths: through its points, and a line of no length, drawn as a dot, at the last of them."""

    variant: int
    through: str = ""
    end: str = ""


@dataclass(frozen=True)
class CurveChart:
    """The validation curves over tokens, as the page shows them before its script runs, or without it."""

    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def curve_chart(curves: Sequence[Curve]) -> CurveChart:
    """Loss over tokens (logarithmic) of every run. Losses above what nine of ten points have may leave the drawing."""
    points = [(tokens, loss) for curve in curves for _, tokens, _, loss in curve.val]
    if not points:
        return CurveChart([Line(curve.variant) for curve in curves], [], [])
    left, right = _spread(min(x for x, _ in points), max(x for x, _ in points), 1.5)
    losses = sorted(loss for _, loss in points)
    top = max(losses[math.ceil(0.9 * len(losses)) - 1], *(curve.val[-1][3] for curve in curves if curve.val))
    margin = max((top - losses[0]) * 0.05, 0.01)
    low, high = losses[0] - margin, top + margin

    def x(tokens: float) -> float:
        return WIDTH * math.log(tokens / left) / math.log(right / left)

    def y(loss: float) -> float:
        return (high - loss) / (high - low)

    def line(curve: Curve) -> Line:
        corners = [f"{SIDE * x(tokens):.0f} {SIDE * y(loss):.0f}" for _, tokens, _, loss in curve.val]
        return Line(curve.variant, "M" + "L".join(corners), f"M{corners[-1]}h0") if corners else Line(curve.variant)

    return CurveChart(
        lines=[line(curve) for curve in curves],
        x_ticks=[(round(100 * x(value), 2), label) for value, label in log_ticks(left, right)],
        y_ticks=[(round(100 * y(value), 2), label) for value, label in linear_ticks(low, high, 8)],
    )


def _thinned(points: list[Mark]) -> list[Mark]:
    """At most TRAIN_POINTS points, evenly on a log axis: each the mean loss since the one before, at its end."""
    if len(points) <= TRAIN_POINTS:
        return points
    first, last = points[0][0], points[-1][0]
    cells: dict[int, list[Mark]] = {}
    for point in points:
        cell = int(TRAIN_POINTS * math.log(point[0] / first) / math.log(last / first))
        cells.setdefault(min(cell, TRAIN_POINTS - 1), []).append(point)
    return [(*group[-1][:3], sum(point[3] for point in group) / len(group)) for group in cells.values()]


# --------------------------------------------------------------------------------------------------------------- ticks


def linear_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round values (1, 2 or 5 times a power of ten apart) between `low` and `high`, at most `most` + 1, with labels."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, f"{number * step:.{digits}f}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between `low` and `high`, with 2 and 5 times them where the axis is short, with labels."""
    factors = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [(value, short(value)) for value in values if low <= value <= high]


def short(value: float) -> str:
    """A number as axes show it: 0.5, 20, 5k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _spread(low: float, high: float, ratio: float) -> tuple[float, float]:
    """The ends of a log axis, moved apart where they would be one place."""
    return (low, high) if high > low else (low / ratio, high * ratio)
