"""Trained variants side by side: a table, their curves, and a page that shows both.

table.py    numbers over seeds, as Markdown and as JSON
curves.py   learning curves, and all of them as one picture
charts.py   the page's drawings, as SVG
page.py     the comparison as one HTML page
"""

from chargpt.report.curves import CurvePoint, RunCurve, evaluations_csv, plot_curves, read_curve
from chargpt.report.page import Provenance, Variant, render
from chargpt.report.table import (
    COUNTS,
    PUBLISHED,
    TINY_SHAKESPEARE_SHA256,
    Published,
    Row,
    Statistic,
    comparison_metrics,
    comparison_table,
    distinct,
    timed,
)

__all__ = [
    "COUNTS",
    "PUBLISHED",
    "TINY_SHAKESPEARE_SHA256",
    "CurvePoint",
    "Provenance",
    "Published",
    "Row",
    "RunCurve",
    "Statistic",
    "Variant",
    "comparison_metrics",
    "comparison_table",
    "distinct",
    "evaluations_csv",
    "plot_curves",
    "read_curve",
    "render",
    "timed",
]
