"""The comparison as one HTML page that needs nothing else: no server, no network, no other file.

The one idea to know: Python renders everything a reader must see, so the page says its main things without JavaScript;
page.js then lets the curves change their axis, answer to the pointer and hide variants, and lets the table be sorted.
A content policy in the page allows that one script, by its hash, and nothing from outside.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any

from chargpt.report.charts import Curve, curve_chart, ladder_chart
from chargpt.report.curves import RunCurve
from chargpt.report.table import Published, Row, Statistic, distinct

SAMPLE_CHARACTERS = 400
PROTOCOLS = {"full": "full", "sliding": "sliding", "nanogpt": "nanoGPT’s"}
COSTS = {  # the table's title: the metric, its format, and whether its spread is shown
    "parameters": ("parameters", ",.0f", False),
    "tokens": ("tokens", ",.0f", False),
    "steps": ("steps", ",.0f", False),
    "seconds": ("seconds", ",.1f", True),
    "tokens/s": ("tokens_per_second", ",.0f", True),
}


@dataclass(frozen=True)
class Variant:
    """One variant: its runs, what it writes, and the command that makes them."""

    name: str
    rows: Sequence[Row]  # metrics.json of each seed
    curves: Sequence[RunCurve]  # of each seed
    sample: str
    sample_settings: str
    command: str


@dataclass(frozen=True)
class Provenance:
    """What was run, and when the page was made."""

    corpus: str
    corpus_sha256: str | None  # None: not known
    commit: str | None  # None outside a git repository
    dirty: bool  # files that decide results differ from the commit
    made: datetime


def render(
    variants: Sequence[Variant],
    provenance: Provenance,
    published: Mapping[str, Published],
    references: Mapping[str, float],
) -> str:
    """The page, as HTML.

    `variants` (at least one, each with at least one row) come in the order of the ladder; `published` holds losses of
    others by the name of the variant, `references` losses to draw as lines. Needs Jinja2, which `chargpt[pipeline]`
    brings.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("chargpt.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((files("chargpt.report") / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    rows = [row for variant in variants for row in variant.rows]
    curves = [
        Curve.of(number, row["seed"], points)
        for number, variant in enumerate(variants)
        for row, points in zip(variant.rows, variant.curves, strict=True)
    ]
    protocols = {name: title for name, title in PROTOCOLS.items() if all(f"val_{name}" in row for row in rows)}
    lines = [_line(variant, published, protocols) for variant in variants]
    return environment.get_template("page.html").render(
        variants=variants,
        lines=lines,
        best=min(lines, key=lambda line: line["losses"]["full"].mean),
        ladder=ladder_chart(
            {protocol: [[row[f"val_{protocol}"] for row in v.rows] for v in variants] for protocol in protocols},
            [published[variant.name].loss if variant.name in published else None for variant in variants],
            references,
        ),
        protocols=protocols,
        chart=curve_chart(curves),
        data={"variants": [variant.name for variant in variants], "curves": [curve.data() for curve in curves]},
        hues=[_hue(number) for number in range(len(variants))],
        costs=COSTS,
        published=published,
        references=references,
        provenance=provenance,
        runs=len(rows),
        hours=sum(row["seconds"] or 0 for row in rows) / 3600,
        facts={key: distinct(rows, key) for key in ("device", "threads", "torch", "backend", "precision")},
        sample_characters=SAMPLE_CHARACTERS,
        style=Markup(style),  # noqa: S704 -- ours, from the package
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _line(variant: Variant, published: Mapping[str, Published], protocols: Iterable[str]) -> dict[str, Any]:
    """What the table and the ladder say about a variant."""
    rows = variant.rows
    return {
        "name": variant.name,
        "seeds": len(rows),
        "costs": {
            title: _cost([row[key] for row in rows], show, spread) for title, (key, show, spread) in COSTS.items()
        },
        "losses": {protocol: Statistic.of([row[f"val_{protocol}"] for row in rows]) for protocol in protocols},
        "bits": Statistic.of([row["bits_per_byte"] for row in rows]),
        "published": published.get(variant.name),
        "backend": distinct(rows, "backend"),
        "precision": distinct(rows, "precision"),
    }


def _cost(measured: list[float | None], show: str, spread: bool) -> dict[str, Any]:
    values = [value for value in measured if value is not None]
    if len(values) < len(measured):
        return {"mean": "", "text": "–", "spread": None}
    one = Statistic.of(values)
    share = f"{one.deviation / one.mean:.1%}" if spread and one.deviation is not None else None
    return {"mean": one.mean, "text": format(one.mean, show), "spread": share}


def _hue(number: int) -> float:
    """Golden angles: neighbours on the ladder, which people compare, get colours far apart, however many there are."""
    return round((255 + 137.508 * number) % 360, 1)
