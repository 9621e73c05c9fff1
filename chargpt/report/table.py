"""Trained variants side by side: their numbers over seeds as Markdown and as JSON."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # metrics.json of one run, with `seconds` and `tokens_per_second`, None where not known
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", lambda x: f"{x:,.0f}"),
    ("steps", "steps", lambda x: f"{x:,.0f}"),
    ("tokens_per_second", "tokens/s", lambda x: f"{x:,.0f}"),
    ("seconds", "seconds", lambda x: f"{x:,.1f}"),
    ("val_full", "val (full)", lambda x: f"{x:.4f}"),
    ("bits_per_byte", "bits/byte", lambda x: f"{x:.3f}"),
    ("val_sliding", "val (sliding)", lambda x: f"{x:.4f}"),
    ("val_nanogpt", "val (nanogpt)", lambda x: f"{x:.4f}"),
)
TIMES = ("seconds", "tokens_per_second")  # no part of what equal runs have in common
PROTOCOLS = ("val_sliding", "val_nanogpt")  # not every run was scored by them
MEANS = ("parameters", "steps", "tokens", "val_full", "bits_per_byte", *PROTOCOLS)


@dataclass(frozen=True)
class Published:
    """A validation loss that somebody else reports for a variant, in nats per character."""

    loss: float
    source: str


# What holds for one text alone: Tiny Shakespeare by characters, the last tenth to validate on.
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PUBLISHED = {
    "bigram": Published(2.5, "lecture"),
    "head": Published(2.4, "lecture"),
    "multihead": Published(2.28, "lecture"),
    "ffwd": Published(2.24, "lecture"),
    "residual": Published(2.08, "lecture"),
    "layernorm": Published(2.06, "lecture"),
    "nanogpt-cpu": Published(1.88, "nanoGPT"),
}
COUNTS = {"bigram counts": 2.487, "5-gram counts": 1.692}  # the best that counting the training part reaches


@dataclass(frozen=True)
class Statistic:
    """Mean over seeds and the sample's standard deviation: None for a single seed, and where all are equal."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(set(values)) > 1 else None)

    def text(self, show: Callable[[float], str]) -> str:
        return show(self.mean) if self.deviation is None else f"{show(self.mean)} ± {show(self.deviation)}"


def by_variant(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each variant, in the order in which the variants first come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def comparison_table(rows: Iterable[Row], published: Mapping[str, Published] | None = None) -> str:
    """A Markdown table with a line for each variant, in the order they come: mean ± standard deviation over seeds.

    Losses are in nats per token, of the checkpoint with the lowest `full` validation loss. A column of published
    losses is there when a variant has one.
    """
    groups = by_variant(rows)
    published = {name: value for name, value in (published or {}).items() if name in groups}
    rows = [row for runs in groups.values() for row in runs]
    columns = [column for column in COLUMNS if column[0] not in PROTOCOLS or any(column[0] in row for row in rows)]
    titles = [title for _, title, _ in columns] + ["published"] * bool(published)
    lines = [
        "| variant | seeds | " + " | ".join(titles) + " | backend |",
        "|---|---:|" + "---:|" * len(titles) + "---|",
    ]
    for variant, runs in groups.items():
        cells = [_cell([row.get(key) for row in runs], show) for key, _, show in columns]
        if published:
            cells.append(f"{published[variant].loss} ({published[variant].source})" if variant in published else "")
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + f" | {distinct(runs, 'backend')} |")
    return "\n".join(lines)


def comparison_metrics(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Means over seeds of each variant, with the runs themselves under `runs`, as plain data for JSON.

    Keyed by variant, because `dvc metrics` skips every list: `bigram.val_full` is a key that it can show and compare.
    """
    return {
        variant: {
            "seeds": len(runs),
            **{
                key: round(statistics.fmean(row[key] for row in runs), 6)
                for key in MEANS
                if all(key in row for row in runs)
            },
            "val_full_sd": None if len(runs) < 2 else round(statistics.stdev(row["val_full"] for row in runs), 6),
            "runs": [{key: value for key, value in row.items() if key not in TIMES} for row in runs],
        }
        for variant, runs in by_variant(rows).items()
    }


def timed(row: Row, seconds: Mapping[int, float]) -> Row:
    """A row with its `seconds` and `tokens_per_second`, from the seconds of training by step; None where not known."""
    total = seconds[max(seconds)] if seconds else 0.0
    return row | {"seconds": total or None, "tokens_per_second": row["tokens"] / total if total else None}


def _cell(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Mean and deviation of what was measured; a dash where it was not for all."""
    known = [value for value in values if value is not None]
    return Statistic.of(known).text(show) if len(known) == len(values) else "–"


def distinct(rows: Iterable[Row], key: str) -> str:
    """Every value that the rows have for `key`, sorted, with commas."""
    return ", ".join(sorted({str(row[key]) for row in rows}))
