"""The server's page in a real browser, by clicking and typing."""

import base64
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("selenium", reason="the browser is driven by selenium, of chargpt[dev]")

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

from browsers import NEEDED, look_like, started
from chargpt.generation import next_token_probabilities
from chargpt.serve.engine import ModelEngine
from chargpt.serve.page import FILES
from serving import TOKENIZER, Running, Served, made

pytestmark = NEEDED
AXE = resources.files("axe_core_python") / "axe.min.js"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with started(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


class Page:
    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        self.open(url)

    def open(self, url: str, **looks: Any) -> None:
        look_like(self.browser, **looks)
        self.browser.get("about:blank")  # else another part behind # would not load it again
        self.browser.get_log("browser")
        self.browser.get_log("performance")
        self.browser.get(url)
        self.until(lambda: not self.one("#ask .first").get_property("disabled") or self.one("#key-form").is_displayed())

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self._read(selector, "innerText.trim()")

    def _read(self, selector: str, what: str) -> list[str]:
        """At one moment: elements that were found may be gone when the next command asks them."""
        script = f"return Array.from(document.querySelectorAll(arguments[0]), (element) => element.{what})"
        return self.browser.execute_script(script, selector)

    def until(self, condition: Callable[[], Any]) -> None:
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < 30, self.texts("#problem, #place-about")
            time.sleep(0.02)

    def fill(self, **fields: Any) -> None:
        for name, value in fields.items():
            self.browser.execute_script(
                "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                "field.dispatchEvent(new Event('input', {bubbles: true}))",
                name,
                str(value),
            )

    def idle(self) -> None:
        self.until(lambda: self.one("#answers").get_attribute("aria-busy") == "false")

    def write(self) -> list[str]:
        """Click, wait, and read the answers."""
        self.one("#ask .first").click()
        self.idle()
        return self.answers()

    def answers(self) -> list[str]:
        """Their texts as they are, where `text` would leave out spaces."""
        return self._read("#answers .text", "textContent")

    def span(self, answer: int, at: int) -> Any:
        return self.all("#answers article")[answer].find_elements(By.CSS_SELECTOR, "[data-at]")[at]

    def looked(self, words: str) -> None:
        self.until(lambda: words in self.one("#place-about").text and self.all("#candidates button"))

    def clean(self) -> None:
        """Nothing in the console, and nothing was asked of anybody else."""
        assert self.browser.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        here = self.browser.current_url.partition("#")[0]
        assert all(url.startswith((here, "data:", "about:")) for url in asked), asked


@pytest.fixture
def page(browser: webdriver.Chrome, served: Served) -> Page:
    return Page(browser, served.url)


def completion(served: Served, model: str, prompt: Any, **options: Any) -> list[str]:
    found = served.client().completions.create(model=model, prompt=prompt, **options)
    return [choice.text for choice in found.choices]


def test_answers_stand_side_by_side_and_are_the_servers(page: Page, served: Served) -> None:
    page.fill(prompt="abc", n=3, max_tokens=40, seed=7, temperature=1.5, top_k=5)
    wanted = completion(
        served, "small", "abc", n=3, max_tokens=40, seed=7, temperature=1.5, extra_body={"top_k": 5, "min_p": None}
    )
    assert page.write() == ["abc" + text for text in wanted]
    names, notes = page.texts("#answers .name"), page.texts("#answers small")
    assert [name.partition(", ")[2] for name in names] == ["seed 7", "seed 8", "seed 9"]
    assert all("40 tokens" in note and "a second" in note and "bits each" in note for note in notes)
    tops = {article.location["y"] for article in page.all("#answers article")}
    assert len(tops) < 3  # at least two in a row
    tinted = "return getComputedStyle(arguments[0]).backgroundColor"
    colours = {page.browser.execute_script(tinted, page.span(0, at)) for at in range(3, 43)}
    assert len(colours) > 5
    page.one("#tint").click()
    colours = {page.browser.execute_script(tinted, page.span(0, at)) for at in range(43)}
    assert len(colours) == 1
    page.clean()


def test_an_answer_is_another_each_time(page: Page) -> None:
    page.fill(prompt="abc", n=1, max_tokens=100)
    assert page.write() != page.write()
    page.one("#undo").click()
    assert len(page.answers()) == 1


def test_two_models_answer_one_prompt_and_seed(page: Page, served: Served) -> None:
    page.fill(prompt="abc", n=2, max_tokens=30, seed=3, model="small", beside="bigram")
    small, bigram = (completion(served, model, "abc", n=2, max_tokens=30, seed=3) for model in ("small", "bigram"))
    assert page.write() == ["abc" + text for pair in zip(small, bigram, strict=True) for text in pair]
    assert ["bigram" in name for name in page.texts("#answers .name")] == [False, True] * 2
    page.span(1, 10).click()
    page.looked("Token 11 of answer 2")
    assert not page.one("#attention").is_displayed()  # of a bigram there is none
    page.clean()


def test_an_alternative_begins_a_branch(page: Page, served: Served) -> None:
    page.fill(prompt="abc", n=1, max_tokens=60, seed=7)
    (whole,) = page.write()
    page.span(0, 40).click()  # after a rollover
    page.looked("Token 41 of answer 1")
    found = served.post("/look", {"model": "small", "prompt": "abc", "written": TOKENIZER.encode(whole[3:40]).tolist()})
    shown = [int(button.get_attribute("data-token")) for button in page.all("#candidates button")]
    assert shown[:10] == [each["token"] for each in found.json()["next"]]
    assert len(page.all("#candidates [aria-current]")) == 1
    index = next(i for i, token in enumerate(shown) if TOKENIZER.decode([token]) != whole[40])
    page.all("#candidates button")[index].click()
    page.idle()
    begin = whole[:40] + TOKENIZER.decode([shown[index]])
    (wanted,) = completion(served, "small", TOKENIZER.encode(begin).tolist(), max_tokens=60, seed=7)
    assert page.answers() == [whole, begin + wanted]
    assert len(page.all("#tree > li")) == 1
    assert len(page.all("#tree > li > ul > li")) == 1
    assert page.all("#tree ul button")[0].text.startswith("2: at 41")
    page.one("#undo").click()
    assert page.answers() == [whole]
    assert page.all("#tree ul") == []
    page.one("#undo").click()
    assert page.answers() == []
    assert not page.one("#branches").is_displayed()
    page.clean()


def test_one_token_at_a_time(page: Page) -> None:
    page.fill(prompt="abc", seed=7)
    for count in range(1, 4):
        page.one("#step").click()
        page.idle()
        page.looked(f"Token {count + 4} of answer 1: the next one")
        assert len(page.answers()[0]) == 3 + count
    first = page.all("#candidates button")[0]
    text = TOKENIZER.decode([int(first.get_attribute("data-token"))])
    before = page.answers()[0]
    first.click()
    page.looked("Token 8 of answer 1: the next one")
    assert page.answers() == [before + text]
    for length in (6, 5, 4):
        page.one("#undo").click()
        assert page.answers() == [before[:length]]
    page.one("#undo").click()
    assert page.answers() == []
    page.clean()


def test_sliders_show_what_they_leave(page: Page) -> None:
    page.fill(prompt="abc", n=1, max_tokens=20, seed=7)
    page.write()
    page.span(0, 10).click()
    page.looked("Token 11")
    assert all(len(set(text.split("\n")[-1].split(" → "))) == 1 for text in page.texts("#candidates li"))
    page.fill(top_k=1)
    assert page.texts("#candidates .p")[0].endswith("→ 100 %")
    assert {text.split(" → ")[1] for text in page.texts("#candidates .p")[1:]} == {"0 %"}
    page.fill(top_k=0, temperature=0)
    assert page.texts("#candidates .p")[0].endswith("→ 100 %")
    assert page.texts("output") == ["0", "off", "off", "off"]


@pytest.mark.parametrize("temperature", [0, 0.05, 0.7, 1, 2])
def test_cuts_are_those_of_the_sampler(page: Page, temperature: float) -> None:
    script = """const done = arguments[3];
    import("/cuts.js").then(({ cut }) => done(arguments[0].map((row) => arguments[1].map((s) => cut(row, s)))))"""
    logits = (3 * torch.randn(8, 30, generator=torch.Generator().manual_seed(1))).sort(descending=True).values
    cases = [
        {"temperature": temperature, "top_k": k, "top_p": p, "min_p": m}
        for k in (0, 1, 7)
        for p in (1, 0.9, 0.3)
        for m in (0, 0.2)
    ]
    found = page.browser.execute_async_script(script, logits.log_softmax(-1).tolist(), cases, None)
    for i, case in enumerate(cases):
        wanted = next_token_probabilities(
            logits, temperature, case["top_k"] or None, case["top_p"] if case["top_p"] < 1 else None, case["min_p"]
        )
        np.testing.assert_allclose(np.array([row[i] for row in found]), wanted.numpy(), atol=1e-5)


def test_attention_of_each_head(page: Page, served: Served) -> None:
    page.fill(prompt="abc", n=1, max_tokens=20, seed=7)
    (text,) = page.write()
    page.span(0, 9).click()
    page.until(lambda: len(page.all("#heads button")) == 4)  # two layers of two heads
    assert page.one("#strip").get_property("textContent") == text[:9]
    assert "all heads together" in page.one("#attention-about").text
    page.all("#heads button")[3].click()
    assert "layer 2, head 2" in page.one("#attention-about").text
    assert [button.get_attribute("aria-pressed") for button in page.all("#heads button")] == ["false"] * 3 + ["true"]
    found = served.post(
        "/look",
        {"model": "small", "prompt": "abc", "written": TOKENIZER.encode(text[3:9]).tolist(), "attention": True},
    ).json()["attention"]
    weights = np.frombuffer(base64.b64decode(found["weights"]), np.uint8).reshape(4, 9)[3].astype(float)
    heat = page.browser.execute_script(
        "return [...document.querySelectorAll('#strip span')].map((span) => span.style.getPropertyValue('--heat'))"
    )
    assert [int(value.rstrip("%")) for value in heat] == pytest.approx(100 * weights / weights.max(), abs=0.51)
    page.clean()


def test_everything_by_keyboard(page: Page) -> None:
    """From the address bar on: Tab, arrows, Enter."""
    page.fill(n=1, max_tokens=20, seed=7)
    page.one("body").send_keys(Keys.TAB)
    keys = ActionChains(page.browser)
    keys.send_keys("abc").key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.until(lambda: page.answers())
    page.idle()
    (text,) = page.answers()
    assert text.startswith("abc")
    for _ in range(30):
        if page.browser.switch_to.active_element.get_attribute("role") == "group":
            break
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
    ActionChains(page.browser).send_keys(
        Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT
    ).perform()
    page.looked("Token 5 of answer 1")
    ActionChains(page.browser).send_keys(Keys.END).perform()
    page.looked("Token 24 of answer 1: the next one")
    ActionChains(page.browser).send_keys(Keys.ENTER, Keys.ENTER).perform()
    page.looked("Token 25 of answer 1")
    ActionChains(page.browser).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    page.until(lambda: page.answers() == [text])
    ActionChains(page.browser).send_keys(Keys.TAB).perform()
    page.clean()


def test_the_pointer_looks_until_a_place_is_chosen(page: Page) -> None:
    page.fill(prompt="abc", n=1, max_tokens=60, seed=7)
    (text,) = page.write()
    first, second, third, fourth = [i for i in range(3, 60) if not text[i].isspace()][:4]  # the others have no width
    ActionChains(page.browser).move_to_element(page.span(0, first)).perform()
    page.looked(f"Token {first + 1} of answer 1")
    page.span(0, second).click()
    page.looked(f"Token {second + 1} of answer 1")
    ActionChains(page.browser).move_to_element(page.span(0, third)).pause(0.2).perform()
    page.looked(f"Token {second + 1} of answer 1")
    ActionChains(page.browser).send_keys(Keys.ESCAPE).move_to_element(page.span(0, fourth)).perform()
    page.looked(f"Token {fourth + 1} of answer 1")


def test_a_stream_is_stopped(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = served.engines["small"]._streams
    burst = streams.burst

    def slow(*arguments: Any, **options: Any) -> Any:  # else it may have ended before the button is found
        time.sleep(0.02)
        return burst(*arguments, **options)

    monkeypatch.setattr(streams, "burst", slow)
    page.fill(prompt="abc", n=2, max_tokens=20_000, seed=7)
    page.one("#ask .first").click()
    page.until(lambda: page.answers() and all(page.answers()))
    page.one("#stop").click()
    page.idle()
    assert all("stopped" in note for note in page.texts("#answers small"))
    page.until(served.idle)
    assert not page.one("#problem").is_displayed()
    page.clean()


def test_a_link_brings_everything_back(page: Page, browser: webdriver.Chrome) -> None:
    page.fill(prompt="a b\nc", n=2, max_tokens=30, temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, beside="two")
    answers = page.write()
    page.one("#share-link").click()
    link = page.one("#share-text").get_property("value")
    page.one("#share form button:last-child").click()
    assert "prompt=a+b%0Ac" in link
    page.open(link)
    assert page.write() == answers
    page.open(
        page.browser.current_url.partition("#")[0]
        + "#model=none&n=<script>&top_k=1e9&prompt=%3Cimg src=x onerror=alert(1)%3E"
    )
    assert page.one("#prompt").get_property("value") == "<img src=x onerror=alert(1)>"
    assert page.one("#model").get_property("value") == "small"
    page.clean()


def test_the_same_request_from_elsewhere(page: Page, tmp_path: Path) -> None:
    page.fill(prompt="ab' \"c", n=2, max_tokens=30, seed=5, top_k=4, min_p=0.01, model="bytes")
    answers = page.write()
    page.one("#share-python").click()
    program = page.one("#share-text").get_property("value")
    page.one("#share form button:last-child").click()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(answer[len("ab' \"c") :] + "\n" for answer in answers)
    page.one("#share-curl").click()
    command = shlex.split(page.one("#share-text").get_property("value").replace("\\\n", ""))
    page.one("#share form button:last-child").click()
    assert command[0] == "curl"
    if shutil.which("curl"):
        done = subprocess.run(command, capture_output=True, timeout=60)
        parts = [json.loads(line[6:]) for line in done.stdout.decode().split("\n\n") if line.startswith("data: {")]
        first = "".join(part["choices"][0]["text"] for part in parts if part["choices"][0]["index"] == 0)
        assert first == answers[0][len("ab' \"c") :]


def test_what_went_wrong_is_said(page: Page) -> None:
    page.fill(prompt="é", n=1)
    page.one("#ask .first").click()
    page.until(lambda: page.one("#problem").is_displayed())
    assert "é" in page.one("#problem").text
    page.fill(prompt="abc", max_tokens=10)
    page.write()
    assert not page.one("#problem").is_displayed()
    page.browser.get_log("browser")  # Chromium itself notes the 400


def test_a_character_of_several_bytes(page: Page) -> None:
    page.fill(prompt="é", n=1, max_tokens=40, seed=2, model="bytes")
    (text,) = page.write()
    assert text.startswith("é")
    assert len(page.all("#answers [data-at]")) == 42  # two bytes and forty
    page.browser.execute_script("arguments[0].focus()", page.one("#answers .text"))
    ActionChains(page.browser).send_keys(Keys.HOME, Keys.ARROW_RIGHT).perform()  # between the bytes of é
    page.looked("Token 2 of answer 1")
    assert "#" in "".join(page.texts("#candidates b"))  # bytes that are no character
    page.clean()


def test_a_server_with_a_key(browser: webdriver.Chrome) -> None:
    running = Running({"small": ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER)}, api_key="s3cret")
    try:
        page = Page(browser, running.served.url)
        page.until(lambda: page.one("#key-form").is_displayed())
        for key in ("wrong", "s3cret"):
            page.until(lambda: page.one("#key-form").is_displayed())
            page.one("#key").send_keys(key, Keys.ENTER)
        page.until(lambda: not page.one("#ask .first").get_property("disabled"))
        page.fill(prompt="abc", n=1, max_tokens=10)
        assert len(page.write()[0]) == 13
        stored = browser.execute_script("return [{...localStorage}, {...sessionStorage}, document.cookie]")
        assert stored == [{}, {}, ""]
        page.one("#share-curl").click()
        assert "$CHARGPT_API_KEY" in page.one("#share-text").get_property("value")
        assert "s3cret" not in page.one("#share-text").get_property("value")
    finally:
        running.stop()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_all_can_read_it(page: Page, served: Served, dark: bool, width: int) -> None:
    page.open(served.url, width=width, dark=dark)
    page.browser.execute_script(AXE.read_text(encoding="utf-8"))
    page.fill(prompt="abc", n=2, max_tokens=60, seed=7)
    page.write()
    page.browser.execute_script("arguments[0].click()", page.span(0, 20))
    page.looked("Token 21")
    page.all("#candidates button")[1].click()
    page.idle()
    page.until(lambda: page.all("#heads button"))
    found = page.browser.execute_async_script(
        "axe.run().then((result) => arguments[0](result.violations.map((each) => [each.id, each.nodes[0].html])))"
    )
    assert found == []
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.clean()


def test_the_page_is_small_and_lets_nothing_else_in(served: Served) -> None:
    size = 0
    for path in FILES:
        answer = served.get(path)
        size += len(answer.content)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
    assert size <= 60_000
    assert served.get("/page.py").status_code == 404
    assert served.get("/..%2fapi.py").status_code == 404
