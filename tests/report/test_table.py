"""The comparison of runs: a Markdown table with mean ± standard deviation, JSON for DVC, a picture of the curves."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chargpt.errors import CorpusError
from chargpt.report import (
    CurvePoint,
    Published,
    comparison_metrics,
    comparison_table,
    evaluations_csv,
    plot_curves,
    read_curve,
    timed,
)

pytest.importorskip("matplotlib", reason="the picture needs chargpt[pipeline]")


def row(variant: str, seed: int, val_full: float, **more: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "parameters": 804_096,
        "steps": 2000,
        "tokens": 1_536_000,
        "seconds": 70.25,
        "tokens_per_second": 21_868.4,
        "val_full": val_full,
        "bits_per_byte": 2.5,
        "val_sliding": 1.8,
        "val_nanogpt": 1.9,
        "backend": "torch",
    } | more


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def curve(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(["step,tokens,train_loss,val_loss,learning_rate", *lines]) + "\n")
    return path


# --------------------------------------------------------------------------------------------------------------- table


def test_a_variant_is_one_line_with_mean_and_deviation_over_its_seeds() -> None:
    rows = [row("a", 1, 1.0), row("a", 2, 1.2), row("a", 3, 1.4)]
    header, rule, line = comparison_table(rows).splitlines()
    table = dict(zip(cells(header), cells(line), strict=True))
    assert len(cells(rule)) == len(cells(header))
    assert table == {
        "variant": "a",
        "seeds": "3",
        "parameters": "804,096",
        "steps": "2,000",
        "tokens/s": "21,868",
        "seconds": "70.2",
        "val (full)": "1.2000 ± 0.2000",  # the sample's deviation: √((0.04 + 0 + 0.04) / 2)
        "bits/byte": "2.500",
        "val (sliding)": "1.8000",  # equal values need no deviation
        "val (nanogpt)": "1.9000",
        "backend": "torch",
    }


def test_one_seed_has_no_deviation() -> None:
    assert "±" not in comparison_table([row("a", 1, 1.23456)])
    assert "| 1.2346 |" in comparison_table([row("a", 1, 1.23456)])


def test_variants_stay_in_their_order_even_when_their_rows_are_mixed() -> None:
    lines = comparison_table([row("z", 1, 1.0), row("a", 1, 2.0), row("z", 2, 3.0)]).splitlines()
    assert [cells(line)[:2] for line in lines[2:]] == [["z", "2"], ["a", "1"]]
    assert "2.0000 ± 1.4142" in lines[2]
    assert "±" not in lines[3]


def test_every_implementation_of_the_kernels_is_named() -> None:
    rows = [row("a", 1, 1.0), row("a", 2, 1.0, backend="cpp"), row("a", 3, 1.0)]
    assert cells(comparison_table(rows).splitlines()[2])[-1] == "cpp, torch"


def test_what_was_not_measured_for_every_run_is_a_dash_or_no_column() -> None:
    rows = [timed(row("a", 1, 1.0), {10: 2.0, 20: 4.0}), timed(row("a", 2, 1.0), {}), timed(row("b", 1, 1.0), {7: 8.0})]
    assert (rows[0]["seconds"], rows[0]["tokens_per_second"]) == (4.0, 384_000)
    for one in rows:
        del one["val_sliding"]
    header, _, first, second = comparison_table(rows).splitlines()
    assert "sliding" not in header
    assert dict(zip(cells(header), cells(first), strict=True))["seconds"] == "–"
    assert dict(zip(cells(header), cells(second), strict=True))["seconds"] == "8.0"
    assert "val_sliding" not in comparison_metrics(rows)["a"]


def test_no_rows_give_the_header_alone() -> None:
    assert len(comparison_table([]).splitlines()) == 2


def test_published_losses_have_a_column_when_a_variant_has_one() -> None:
    published = {"b": Published(1.88, "nanoGPT"), "absent": Published(1.0, "nobody")}
    header, _, first, second = comparison_table([row("a", 1, 1.0), row("b", 1, 1.9)], published).splitlines()
    column = cells(header).index("published")
    assert (cells(first)[column], cells(second)[column]) == ("", "1.88 (nanoGPT)")
    assert "published" not in comparison_table([row("a", 1, 1.0)], published)


# --------------------------------------------------------------------------------------------------------------- JSON


def test_metrics_are_keyed_by_variant_with_means_and_the_runs_themselves() -> None:
    rows = [row("a", 1, 1.0, seconds=10.0), row("b", 1, 3.0), row("a", 2, 1.2, seconds=20.0)]
    metrics = comparison_metrics(rows)
    assert list(metrics) == ["a", "b"]
    untimed = [{k: v for k, v in one.items() if k not in ("seconds", "tokens_per_second")} for one in rows]
    assert metrics["a"]["runs"] == [untimed[0], untimed[2]]
    assert {key: metrics["a"][key] for key in ("seeds", "val_full", "val_full_sd", "steps")} == {
        "seeds": 2,
        "val_full": 1.1,
        "val_full_sd": 0.141421,
        "steps": 2000,
    }
    assert "seconds" not in str(metrics)  # equal runs give equal bytes
    assert metrics["b"]["val_full_sd"] is None


# --------------------------------------------------------------------------------------------------------------- curves


LINES = ["0,0,,4.2,", "10,7680,3.1,,0.001", "20,15360,2.9,3.0,0.001"]


def test_points_hold_what_was_measured_there_and_when(tmp_path: Path) -> None:
    path = curve(tmp_path / "curve.csv", LINES)
    expected = [(0, 0, None, 4.2), (10, 7680, 3.1, None), (20, 15360, 2.9, 3.0)]
    for seconds, times in (({0: 0.0, 20: 1.0}, (0.0, 0.5, 1.0)), ({}, (None,) * 3)):
        points = [CurvePoint(step, n, at, *losses) for (step, n, *losses), at in zip(expected, times, strict=True)]
        assert read_curve(path, seconds) == points


@pytest.mark.parametrize("line", ["1,2", "a,7680,3.1,,0.001", "10,7680,x,,0.001", "10,7680,3.1,,0.001,9"])
def test_a_damaged_curve_is_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="damaged"):
        read_curve(curve(tmp_path / "curve.csv", [line]), {})


def test_dvc_gets_every_evaluation(tmp_path: Path) -> None:
    points = read_curve(curve(tmp_path / "curve.csv", LINES), {0: 0.0, 20: 1.0})
    expected = ["variant,seed,tokens,seconds,val_loss", "a,3,0,0,4.2", "a,3,15360,1,3"]
    assert evaluations_csv([("a", 3, points)]).splitlines() == expected


def test_a_run_without_points_has_an_empty_curve(tmp_path: Path) -> None:
    assert read_curve(curve(tmp_path / "curve.csv", []), {}) == []


def test_the_picture_is_a_png_with_something_drawn_in_it(tmp_path: Path) -> None:
    first = read_curve(curve(tmp_path / "1.csv", LINES), {})
    second = read_curve(curve(tmp_path / "2.csv", ["10,7680,3.2,,0.001", "20,15360,3.0,,0.001"]), {})  # never evaluated
    third = read_curve(curve(tmp_path / "3.csv", []), {})
    picture = tmp_path / "reports" / "curves.png"
    plot_curves({"a": [first, second], "b": [third, first]}, picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (960, 600)  # 8 × 5 inches at 120 dots
    from matplotlib.image import imread

    colours = {tuple(round(float(c), 2) for c in pixel[:3]) for pixel in imread(picture)[::3, ::3].reshape(-1, 4)}
    assert len(colours) > 50
    assert [path.name for path in picture.parent.iterdir()] == ["curves.png"]


def test_the_picture_shows_all_points_but_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a logarithmic axis knows nothing."""
    from matplotlib.figure import Figure

    drawn: list[list[float]] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: drawn.extend(list(line.get_xdata()) for line in self.axes[0].lines)
    )
    points = read_curve(curve(tmp_path / "1.csv", LINES), {})
    plot_curves({"a": [points]}, tmp_path / "curves.png")
    train, val = ([p.tokens for p in points if p.tokens > 0 and loss(p) is not None] for loss in LOSSES)
    assert drawn == [train, val]
    assert train
    assert val


LOSSES = (lambda point: point.train_loss, lambda point: point.val_loss)


def test_a_picture_of_more_variants_than_colours(tmp_path: Path) -> None:
    path = read_curve(curve(tmp_path / "1.csv", LINES), {})
    plot_curves({"a": [path]}, tmp_path / "one.png")
    plot_curves({f"variant-{i}": [path] for i in range(12)}, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 1000


def test_drawing_needs_no_display_and_no_global_state(tmp_path: Path) -> None:
    path = curve(tmp_path / "1.csv", LINES)
    program = (
        "import sys; from pathlib import Path; from chargpt.report import plot_curves, read_curve\n"
        "plot_curves({'a': [read_curve(Path(sys.argv[1]), {})]}, Path(sys.argv[2]))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(path), str(tmp_path / "1.png")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0
