"""The page that compares variants, as text: what it says, what it escapes, and where its marks lie."""

import dataclasses
import json
import math
import re

import pytest

pytest.importorskip("jinja2", reason="the page needs chargpt[pipeline]")

from chargpt.report import CurvePoint, Provenance, Published, Variant, render
from chargpt.report.charts import Curve, curve_chart, ladder_chart, linear_ticks, log_ticks, short
from chargpt.report.page import SAMPLE_CHARACTERS
from reports import PROVENANCE, SHA256, points, row, variant


def text_of(page: str) -> str:
    """What a reader sees, roughly: without style, script and tags, white space as single spaces."""
    body = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page.partition("</head>")[2], flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", body).split())


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_says_what_was_run_on_what_and_how_to_run_it_again() -> None:
    text = text_of(render([variant("head", [2.4, 2.5])], PROVENANCE, {}, {}))
    assert f"shakespeare, SHA-256 {SHA256}" in text
    assert f"git commit {PROVENANCE.commit}" in text
    assert "not committed" not in text
    assert "AMD EPYC, 2 threads" in text
    assert "2.13.0+cpu" in text
    assert "2026-11-25 01:02 UTC" in text
    assert "dvc repro train@head-1" in text
    assert "git checkout c0ffeec0ff" in text


def test_changes_that_are_not_committed_are_said_and_so_is_that_there_is_no_repository() -> None:
    dirty = Provenance("t", SHA256, PROVENANCE.commit, True, PROVENANCE.made)
    nowhere = Provenance("t", SHA256, None, False, PROVENANCE.made)
    assert "with changes that are not committed" in text_of(render([variant("a", [2.0])], dirty, {}, {}))
    text = text_of(render([variant("a", [2.0])], nowhere, {}, {}))
    assert "not from a git repository" in text
    assert "git checkout" not in text


def test_every_protocol_is_there_with_mean_and_deviation() -> None:
    text = text_of(render([variant("a", [1.0, 1.2, 1.4])], PROVENANCE, {}, {}))
    for loss in ("1.2000 ± 0.2000", "1.1900 ± 0.2000", "1.2100 ± 0.2000"):
        assert text.count(loss) == 2  # in the ladder and in the table


def test_of_what_a_run_cost_time_alone_has_a_deviation() -> None:
    costs = [
        {"steps": 100 * n, "tokens": n * 10**6, "seconds": 5.0 * n, "tokens_per_second": 70.0 * n} for n in (1, 2, 3)
    ]
    rows = [row("a", n, 1.0 + n, **cost) for n, cost in enumerate(costs)]
    text = text_of(render([dataclasses.replace(variant("a", [2.0, 3.0, 4.0]), rows=rows)], PROVENANCE, {}, {}))
    assert "804,096 2,000,000 200 10.0 ± 50.0% 140 ± 50.0% 3 cpp" in text


def test_one_seed_has_no_deviation_and_the_first_variant_no_gain() -> None:
    page = render([variant("a", [2.5]), variant("b", [2.25])], PROVENANCE, {}, {})
    assert "±" not in text_of(page).replace("means and standard deviations", "")
    assert page.count("<small>−0.250</small>") == 3  # of b, under each protocol
    assert page.count('class="deviation"') == 0


def test_runs_on_different_machines_are_all_named() -> None:
    rows = [row("a", 1, 2.0), row("a", 2, 2.1, device="H100", backend="cuda")]
    mixed = Variant("a", rows, [points(2.0), points(2.1)], "", "", "dvc repro train@a-1")
    text = text_of(render([mixed], PROVENANCE, {}, {}))
    assert "AMD EPYC, H100" in text
    assert "cpp, cuda" in text


def test_published_losses_and_references_are_drawn_and_explained_only_where_there_are_any() -> None:
    variants = [variant("a", [2.5]), variant("b", [2.25])]
    page = render(variants, PROVENANCE, {"a": Published(2.5, "lecture"), "z": Published(9, "none")}, {"counts": 2.487})
    assert page.count('class="published"') == 1
    assert page.count('class="reference"') == 2  # the line goes through both rows
    assert "counts 2.487" in page
    assert "published 2.5" in text_of(page)
    assert "A diamond" in page
    bare = render(variants, PROVENANCE, {}, {})
    assert 'class="published"' not in bare
    assert 'class="reference"' not in bare
    assert "A diamond" not in bare
    assert "Dashed" not in bare


def test_only_the_beginning_of_a_long_sample_is_shown() -> None:
    long = Variant("a", [row("a", 1, 2.0)], [points(2.0)], "x" * (SAMPLE_CHARACTERS + 50), "s", "c")
    assert f">{'x' * SAMPLE_CHARACTERS}…</pre>" in render([long], PROVENANCE, {}, {})


def test_html_in_every_text_from_outside_is_escaped() -> None:
    evil = "</script><script>document.title='x'</script><img src=x onerror=alert(1)>\"'&"
    hostile = Variant(evil, [row(evil, 1, 2.0, device=evil, backend=evil)], [points(2.0)], evil, evil, evil)
    page = render(
        [hostile], Provenance(evil, evil, evil, True, PROVENANCE.made), {evil: Published(1, evil)}, {evil: 2.0}
    )
    clean = render([variant("a", [2.0])], PROVENANCE, {"a": Published(1, "b")}, {"c": 2.0})
    for tag in ("<script", "</script", "<img"):
        assert page.count(tag) == clean.count(tag)
    assert json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["variants"] == [evil]


def test_the_page_of_many_runs_stays_below_half_a_megabyte_and_names_nothing_outside_itself() -> None:
    curves = [points(1.5 + i / 50, steps=5000, interval=250) for i in range(3)]
    page = render([variant(f"variant-{i}", [2.0, 2.1, 2.2], curves) for i in range(20)], PROVENANCE, {}, {})
    assert len(page.encode()) < 500_000
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.findall(r"@import|url\(", page)


def test_a_run_that_was_never_evaluated_while_training_has_a_row_and_no_line() -> None:
    silent = [CurvePoint(10, 100, 1.0, 3.0, None)]
    page = render([variant("a", [2.0], [silent]), variant("b", [2.1], [[]])], PROVENANCE, {}, {})
    assert page.count('class="run"') == 2
    assert 'class="val" d=""' in page


# -------------------------------------------------------------------------------------------------------------- charts


def test_the_ladder_keeps_order_and_scale() -> None:
    losses = {"full": [[2.5, 2.6], [2.0], [2.25]]}
    chart = ladder_chart(losses, [2.5, None, None], {"floor": 1.5})
    first, second, third = chart.rungs["full"]
    # From 1.5 to 2.55 and its deviation 0.0707, and a twentieth of that more at either end: 1.4440 … 2.6767.
    assert (first.mean, second.mean, third.mean) == pytest.approx((89.72, 45.10, 65.38), abs=0.02)
    assert first.low is not None
    assert first.high is not None
    assert first.high - first.mean == pytest.approx(first.mean - first.low, abs=0.02)
    assert second.low is None
    assert (first.gain, second.gain, third.gain) == (None, pytest.approx(-0.55), pytest.approx(0.25))
    assert second.above == first.mean
    assert chart.published == [first.seeds[0], None, None]
    assert 0 < chart.references["floor"] < second.mean
    everything = [place for rung in chart.rungs["full"] for place in (rung.mean, *rung.seeds)]
    assert all(0 < place < 100 for place in everything)


def test_equal_losses_still_have_a_ladder_with_ticks() -> None:
    chart = ladder_chart({"full": [[2.0], [2.0]]}, [None, None], {})
    assert [rung.mean for rung in chart.rungs["full"]] == [50, 50]
    assert len(chart.ticks) >= 3


def test_curves_go_through_their_points_from_edge_to_edge() -> None:
    curve = Curve.of(0, 1, points(2.0, steps=1000, tokens=100))
    chart = curve_chart([curve])
    corners = [[float(number) for number in corner.split()] for corner in chart.lines[0].through[1:].split("L")]
    assert len(corners) == 10
    assert [corners[0][0], corners[-1][0]] == [0, 990]
    assert corners[4][0] == pytest.approx(990 * math.log10(5), abs=1)  # step 500 between 100 and 1000
    assert [y for _, y in corners] == sorted(y for _, y in corners)  # it falls
    assert chart.lines[0].end == f"M{corners[-1][0]:.0f} {corners[-1][1]:.0f}h0"
    assert [label for _, label in chart.x_ticks] == ["10k", "20k", "50k", "100k"]


def test_the_last_loss_of_every_run_is_inside_the_drawing() -> None:
    """However much higher it is than the others: only what comes before the ends may leave the drawing."""
    curves = [Curve.of(i, 1, points(end)) for i, end in enumerate([1.5] * 12 + [3.9])]
    ends = [float(line.end.split()[1].removesuffix("h0")) for line in curve_chart(curves).lines]
    assert all(0 <= y <= 1000 for y in ends)


def test_what_came_before_the_ends_may_leave_the_drawing() -> None:
    """One loss of 100 at the beginning would press all others together."""
    falling = [CurvePoint(n, 10 * n, float(n), None, 100.0 if n == 1 else 3 - n / 50) for n in range(1, 41)]
    labels = [float(label) for _, label in curve_chart([Curve.of(0, 1, falling)]).y_ticks]
    assert 2.2 <= min(labels) < max(labels) <= 3


def test_a_long_training_curve_is_thinned_out_to_means_that_end_where_it_ends() -> None:
    curve = Curve.of(0, 1, points(2.0, steps=20_000))
    assert 40 < len(curve.train) <= 80
    assert curve.train[-1][:3] == (20_000, 2_000_000, 50.0)
    steps = [point[0] for point in curve.train]
    assert steps == sorted(set(steps))
    jagged = [CurvePoint(n, n, float(n), 2.0 + n % 2, None) for n in range(1, 2001)]
    assert all(loss == pytest.approx(2.5, abs=0.05) for *_, loss in Curve.of(0, 1, jagged).train[-20:])
    short_one = Curve.of(0, 1, points(2.0, steps=500))
    assert len(short_one.train) == 50
    assert len(short_one.val) == 5  # without step 0


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.4, 2.6, ["1.4", "1.6", "1.8", "2.0", "2.2", "2.4", "2.6"]),
        (1.99, 2.01, ["1.990", "1.995", "2.000", "2.005", "2.010"]),
        (0.3, 41.0, ["10", "20", "30", "40"]),
    ],
)
def test_linear_ticks_are_round_and_few(low: float, high: float, labels: list[str]) -> None:
    assert [label for _, label in linear_ticks(low, high, 8)] == labels


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (64_000, 9_200_000, ["100k", "200k", "500k", "1M", "2M", "5M"]),
        (0.04, 80, ["0.1", "1", "10"]),
        (3, 4, []),
        (256, 2e9, ["1k", "10k", "100k", "1M", "10M", "100M", "1G"]),
    ],
)
def test_log_ticks_are_powers_of_ten_and_between_them_where_the_axis_is_short(
    low: float, high: float, labels: list[str]
) -> None:
    assert [label for _, label in log_ticks(low, high)] == labels


def test_numbers_are_shortened_without_losing_their_digits() -> None:
    assert [short(value) for value in (0.05, 2, 250, 1000, 2.5e6, 1e9)] == ["0.05", "2", "250", "1k", "2.5M", "1G"]
