"""The page that compares variants, in a real browser: headless Chromium, from disk, with its own profile."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the page needs chargpt[pipeline]")
pytest.importorskip("selenium", reason="the browser is driven by selenium, of chargpt[dev]")

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

from browsers import NEEDED, look_like, started
from chargpt.report import Published, Variant, render
from reports import PROVENANCE, points, row, variant

pytestmark = NEEDED

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
VARIANTS = [
    variant("first", [2.5, 2.6, 2.7], [points(2.5, seconds=s, interval=50) for s in (9, 10, 12)], seconds=9.5),
    variant("second", [2.0, 2.1], [points(2.0, steps=400, tokens=900, seconds=s) for s in (70, 80)], seconds=100.0),
    variant("third", [1.5], [points(1.5, steps=2000, tokens=50, seconds=20)], seconds=20.0),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with started(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reports") / "index.html"
    path.write_text(render(VARIANTS, PROVENANCE, {"first": Published(2.52, "lecture")}, {"counts": 2.487}), "utf-8")
    return path


def show(
    browser: webdriver.Chrome, page: Path, width: int = 1280, dark: bool = False, medium: str = "", script: bool = True
) -> None:
    """Open the page from disk in a window of that width."""
    look_like(browser, width, dark, medium, script)
    browser.get(page.as_uri())


def all_of(browser: webdriver.Chrome, selector: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def shown(browser: webdriver.Chrome, selector: str) -> list[Any]:
    return [element for element in all_of(browser, selector) if element.is_displayed()]


def click(browser: webdriver.Chrome, selector: str) -> None:
    """As a script does it, because the switches' inputs lie hidden behind their labels."""
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [element.text for element in all_of(browser, selector)]


def lines(browser: webdriver.Chrome) -> list[list[list[float]]]:
    """The corners of every run's validation curve, in the drawing's 1000 × 1000."""
    paths = [element.get_attribute("d") for element in all_of(browser, ".run .val")]
    return [[[float(number) for number in corner.split()] for corner in path[1:].split("L")] for path in paths]


def test_it_opens_from_disk_without_a_complaint_and_without_asking_for_anything_else(
    browser: webdriver.Chrome, page: Path
) -> None:
    show(browser, page)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.refresh()
    assert all_of(browser, "html.scripted")  # the script ran: its hash is right
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]


def test_the_charts_have_a_rung_for_each_variant_and_a_line_for_each_run(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    assert texts(browser, ".rungs .name") == ["first", "second", "third"]
    assert len(shown(browser, ".rungs .mean")) == 3
    assert len(shown(browser, ".rungs .seed")) == 5  # of the two variants with more than one
    assert len(shown(browser, ".rungs .band")) == 2  # the first has nothing above it
    assert len(shown(browser, ".rungs .published")) == 1
    assert [len(line) for line in lines(browser)] == [20, 20, 20, 4, 4, 20]
    assert len(all_of(browser, "tbody tr")) == len(all_of(browser, ".samples figure")) == 3


def test_choosing_a_protocol_moves_the_ladder(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    before = [dot.rect["x"] for dot in shown(browser, ".rungs .mean")]
    click(browser, "[value=nanogpt]")
    after = [dot.rect["x"] for dot in shown(browser, ".rungs .mean")]
    assert all(new > old for old, new in zip(before, after, strict=True))  # 0.01 higher, all of them
    assert [b.text.split()[0] for b in shown(browser, ".value b")] == ["2.6100", "2.0600", "1.5100"]


def test_the_script_draws_what_python_drew(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page, script=False)
    drawn = lines(browser)
    ticks = texts(browser, ".ticks text")
    show(browser, page)
    for mine, theirs in zip(drawn, lines(browser), strict=True):
        assert mine == [pytest.approx(corner, abs=0.6) for corner in theirs]  # Python rounds to whole units
    assert texts(browser, ".ticks text") == ticks


def test_changing_the_axis_redraws_the_curves_over_it(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    ends, units = {}, {}
    for axis in ("tokens", "steps", "seconds"):
        click(browser, f"[value={axis}]")
        ends[axis] = [line[-1][0] for line in lines(browser)]
        units[axis] = browser.find_element(By.CSS_SELECTOR, ".unit").text

    def places(values: list[float], first: float) -> Any:
        return pytest.approx([990 * math.log(v / first) / math.log(max(values) / first) for v in values], abs=0.2)

    assert units == {axis: axis for axis in units}
    assert ends["steps"] == places([1000, 1000, 1000, 400, 400, 2000], 50)
    assert ends["tokens"] == places([100e3, 100e3, 100e3, 360e3, 360e3, 100e3], 5e3)
    assert ends["seconds"] == places([9, 10, 12, 70, 80, 20], 0.45)


def test_hiding_a_variant_hides_its_runs_and_gives_the_others_the_room(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    third = lines(browser)[5]
    click(browser, ".legend [value='0']")
    assert [run.get_attribute("hidden") is None for run in all_of(browser, ".run")] == [False] * 3 + [True] * 3
    assert lines(browser)[5] != third
    click(browser, "[data-show=none]")
    assert not shown(browser, ".run")
    assert not all_of(browser, ".ticks text")
    click(browser, "[data-show=all]")
    assert lines(browser)[5] == third
    assert not any(path.get_attribute("d") for path in all_of(browser, ".train"))
    click(browser, "[name=train]")
    assert all(path.get_attribute("d").count("L") > 30 for path in all_of(browser, ".train"))


def test_pointing_at_a_line_shows_its_values(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    x, y = lines(browser)[5][-1]
    chart = browser.find_element(By.CSS_SELECTOR, ".plot > svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    frame = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", chart)
    place = round(frame["x"] + x / 1000 * frame["width"] - 3), round(frame["y"] + y / 1000 * frame["height"] - 3)
    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(*place)
    mouse.perform()
    loss = VARIANTS[2].curves[0][-1].val_loss
    tip = browser.find_element(By.CSS_SELECTOR, ".tip")
    assert tip.text.splitlines() == [
        "third, seed 1",
        f"loss {loss:.4f}",
        "step 2,000",
        "100,000 tokens",
        "20 seconds",
    ]
    assert [run.get_attribute("class") for run in all_of(browser, ".run")] == ["run"] * 5 + ["run picked"]
    mouse.w3c_actions.pointer_action.move_to_location(5, 5)
    mouse.perform()
    assert not tip.is_displayed()


def test_the_keyboard_reads_the_curves_too(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    plot = browser.find_element(By.CSS_SELECTOR, ".plot")

    def press(*keys: str) -> list[str]:
        plot.send_keys(*keys)
        return browser.find_element(By.CSS_SELECTOR, ".tip").text.splitlines()

    assert press(Keys.ARROW_LEFT)[::2] == ["first, seed 1", "step 1,000", "9 seconds"]
    assert press(Keys.ARROW_LEFT)[2] == "step 950"
    assert press(*[Keys.ARROW_RIGHT] * 3)[2] == "step 1,000"
    assert press(*[Keys.ARROW_DOWN] * 3)[0] == "second, seed 1"
    assert press(*[Keys.ARROW_UP] * 4)[0] == "third, seed 1"  # around
    assert press(Keys.ESCAPE) == []


def test_headings_sort_the_table_by_value(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)

    def sort(heading: str) -> tuple[list[str], str]:
        (th,) = [th for th in all_of(browser, "thead th") if th.text.startswith(heading)]
        browser.execute_script("arguments[0].firstElementChild.click()", th)
        return texts(browser, "tbody th"), th.get_attribute("aria-sort")

    assert sort("seconds") == (["first", "third", "second"], "ascending")  # 9.5, 20, 100: by value, not by letters
    assert sort("seconds") == (["second", "third", "first"], "descending")
    assert sort("full") == (["third", "second", "first"], "ascending")
    assert sort("published") == (["first", "third", "second"], "ascending")  # who has none comes last …
    assert sort("published")[0][0] == "first"  # … in either direction
    assert sort("variant")[0] == ["first", "second", "third"]  # the ladder's order
    assert [th.get_attribute("aria-sort") for th in all_of(browser, "thead th")].count("none") == 13


def test_html_in_names_and_samples_does_nothing(browser: webdriver.Chrome, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    hostile = Variant(EVIL, [row(EVIL, 1, 2.0, device=EVIL)], [points(2.0)], EVIL, EVIL, EVIL)
    page.write_text(render([hostile, variant("b", [2.0])], PROVENANCE, {EVIL: Published(1, EVIL)}, {EVIL: 2}), "utf-8")
    show(browser, page)
    browser.find_element(By.CSS_SELECTOR, ".plot").send_keys(Keys.ARROW_LEFT)
    assert browser.find_element(By.CSS_SELECTOR, ".tip").text.startswith(EVIL)
    assert browser.find_element(By.CSS_SELECTOR, ".samples pre").text == EVIL
    assert browser.execute_script("return window.hacked") is None
    assert not all_of(browser, "img")
    assert len(all_of(browser, "script")) == 2


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: webdriver.Chrome, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "index.html"
    names = ["a-very-long-name-of-a-variant-that-somebody-chose-for-an-experiment", *map(str, range(19))]
    variants = [variant(name, [2.0 + i / 100, 2.1]) for i, name in enumerate(names)]
    page.write_text(
        render(variants, PROVENANCE, {"3": Published(2.0, "x")}, {"bigram counts": 2.15, "b": 2.0}), "utf-8"
    )
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    outside = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, .lines') &&"
        " element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML)"
    )
    assert outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground_in_both_schemes(browser: webdriver.Chrome, page: Path, dark: bool) -> None:
    show(browser, page, dark=dark)
    colours = browser.execute_script(
        "const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();"
        "return ['--panel', '--ground', '--paper', '--ink', '--soft', '--accent'].map(colour)"
    )
    panel, ground, paper, *inks = [luminance(colour) for colour in colours]
    assert (max(panel, ground, paper) < 0.05) if dark else (min(panel, ground, paper) > 0.85)
    for behind in (panel, ground, paper):
        for ink in inks:
            assert (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05) >= 4.5  # WCAG AA


def luminance(colour: str) -> float:
    """Relative luminance, by WCAG 2, of #rgb or #rrggbb."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_everything_that_can_be_operated_has_a_name(browser: webdriver.Chrome, page: Path) -> None:
    show(browser, page)
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    browser.execute_cdp_cmd("Accessibility.disable", {})
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "checkbox", "radio", "group", "region", "image", "heading"):
        assert named[role], role
        assert all(named[role]), (role, named[role])
    assert {"full", "sliding", "tokens", "seconds"} <= set(named["radio"])
    assert {"first", "second", "third", "training loss"} == set(named["checkbox"])
    assert "protocol" in named["group"]


def test_without_script_and_on_paper_it_says_its_main_things(browser: webdriver.Chrome, page: Path) -> None:
    for settings in ({"script": False}, {"medium": "print"}):
        show(browser, page, **settings)  # type: ignore[arg-type]
        assert len(shown(browser, ".rungs .mean")) == 3
        assert all(len(line) > 1 for line in lines(browser))
        assert [b.text.split()[0] for b in shown(browser, ".value b")] == ["2.6000", "2.0500", "1.5000"]
        assert [cell.text for cell in shown(browser, "tbody th")] == ["first", "second", "third"]
        assert not shown(browser, "#curves .switch")
        assert not shown(browser, ".needs-script")
