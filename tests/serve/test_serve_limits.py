"""What a client may not do to the others: long answers, too much at once, silence, and leaving in the middle."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chargpt.config import SampleConfig
from chargpt.errors import ConfigError
from chargpt.generation import Piece
from chargpt.serve import api, listen
from chargpt.serve.engine import BusyError, Job, ModelEngine
from chargpt.serve.prompts import unknown_characters
from serving import TOKENIZER, Running, Served, made

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connected(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), timeout=20)


@pytest.fixture
def one() -> Iterator[Running]:
    """A server of this test's own."""
    running = Running({"small": ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER)})
    yield running
    running.stop()


# ----------------------------------------------------------------------------------------------------------- how much


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"max_tokens": 100_000, "n": 16, "logprobs": 1}, "asks for 3,200,000 tokens and alternatives"),
        ({"max_tokens": 100_000, "prompt": ["a"] * 17}, "asks for 1,700,000 tokens"),
        ({"max_tokens": 0, "echo": True, "logprobs": 100, "prompt": "a" * 16_000}, "and 1,600,000 is the most"),
        ({"max_tokens": 1, "n": 16, "return_token_ids": True, "prompt": "a" * 100_000}, "asks for 1,600,016 tokens"),
        ({"prompt": [[1]] * 33}, "at most 32"),
        ({"prompt": ["a"] * 33}, "at most 32"),
        ({"prompt": []}, "a prompt is a text or a list of tokens"),
        ({"prompt": [1.5]}, "a prompt is a text or a list of tokens"),
        ({"prompt": ["a", 1]}, "a prompt is a text or a list of tokens"),
        ({"prompt": [True]}, "a prompt is a text or a list of tokens"),
        ({"prompt": [None] * 100_000}, "a prompt is a text or a list of tokens"),
        ({"prompt": 7}, "a prompt is a text or a list of tokens"),
        ({"prompt": "aéü"}, "the vocabulary of this model has no 'é', nor 1 other characters"),
        ({"presence_penalty": 1.0}, "presence_penalty: is not something"),
        ({"frequency_penalty": 1}, "frequency_penalty: is not something"),
        ({"suffix": "none"}, "suffix: is not something"),
        ({"tools": 0}, "tools: is not something"),
    ],
)
def test_what_is_too_much_or_no_prompt_is_refused(served: Served, content: Any, words: str) -> None:
    found = served.post("/v1/completions", {"model": "small", **content})
    assert found.status_code == 400
    assert words in found.json()["error"]["message"]
    assert served.idle()


def test_as_much_as_is_allowed_is_answered(served: Served) -> None:
    asked = {"model": "small", "prompt": [[1]] * 32, "max_tokens": 1, "n": 2, "echo": True}
    assert len(served.post("/v1/completions", asked).json()["choices"]) == 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"prompt": [1] * 100_001}, "a list of 1 to 100,000 tokens"),
        ({"prompt": []}, "a list of 1 to 100,000 tokens"),
        ({"written": [None] * 100_000}, "written.0:"),
    ],
)
def test_a_place_of_nothing_or_too_much_is_refused(served: Served, content: Any, words: str) -> None:
    found = served.post("/look", {"model": "small", "prompt": "a", **content})
    assert found.status_code == 400
    assert words in found.json()["error"]["message"]


def test_the_offsets_of_a_long_answer_take_no_time_that_grows_with_its_square() -> None:
    """With 20,000 tokens they took 8 seconds, in which nobody else was served."""
    count = 100_000
    found = api.completion_logprobs(["ab", "", "c"], Piece("", [0, 1, 2] * count, [0.0] * 3 * count, None), [], 7)
    assert found["text_offset"] == [7 + 3 * (i // 3) + (0, 2, 2)[i % 3] for i in range(3 * count)]


@given(st.text())
def test_unknown_characters_are_counted(text: str) -> None:
    assert unknown_characters(TOKENIZER, text) == sum(character not in TOKENIZER.symbols for character in text)


def test_much_of_a_stream_at_a_time_is_the_same(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much is written in a thread, so that the others do not wait."""
    asked: dict[str, Any] = {"model": "small", "prompt": "ab", "max_tokens": 300, "n": 3, "seed": 1, "logprobs": 20}
    written = []
    for most in (2_000, 0):
        monkeypatch.setattr("chargpt.serve.app.AT_ONCE", most)
        found: list[list[Any]] = [[], [], []]
        for chunk in served.client().completions.create(stream=True, **asked):
            for choice in chunk.choices:
                logprobs = choice.logprobs
                found[choice.index] += zip(logprobs.tokens, logprobs.top_logprobs, logprobs.text_offset, strict=True)
        written.append(found)
    assert written[0] == written[1]


# ------------------------------------------------------------------------------------------------------ who went away


def test_more_than_may_wait_is_told_to_come_again() -> None:
    running = Running({"m": ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER, slots=1, most_waiting=2)})
    try:
        asked = {"model": "m", "max_tokens": 1, "prompt": "a"}
        found = httpx2.post(f"{running.served.url}/v1/completions", json=asked | {"n": 16})
        assert (found.status_code, found.json()["error"]["code"]) == (429, "busy")
        assert httpx2.post(f"{running.served.url}/v1/completions", json=asked).status_code == 200
    finally:
        running.stop()


def test_who_waited_and_went_away_takes_nobodys_place() -> None:
    engine = ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER, slots=1, most_waiting=4)
    begun, done = threading.Event(), threading.Event()

    def job(gained: threading.Event) -> Job:
        return Job([0], SampleConfig(max_new_tokens=10**6), lambda _: gained.set())

    running, waiting = job(begun), [job(done) for _ in range(4)]
    try:
        engine.submit([running])
        assert begun.wait(30)
        engine.submit(waiting)
        with pytest.raises(BusyError):
            engine.submit([job(done)])
        for gone in waiting:
            gone.given_up = True
        assert engine.waiting == 0
        engine.submit([job(done)])
        running.given_up = True
        assert done.wait(30)
    finally:
        engine.close()


@pytest.mark.parametrize("sent", ["", HEAD[:40], f"{HEAD}Content-Length: 2\r\n\r\n{{}}"])
def test_a_connection_that_says_nothing_is_closed(one: Running, monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    monkeypatch.setattr(listen, "IDLE", 0.1)
    with connected(one.served) as connection:
        connection.sendall(sent.encode())
        while connection.recv(4096):  # what answers a whole request, then the end
            pass


def test_a_connection_that_is_answered_for_long_is_not_closed(one: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "IDLE", 0.02)
    answer = one.served.client().completions.create(model="small", prompt="a", max_tokens=50_000)
    assert len(answer.choices[0].text) == 50_000


def test_who_leaves_in_the_middle_of_a_request_leaves_no_trace(one: Running) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(handler)
    with connected(one.served) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    one.stop()
    logging.getLogger("uvicorn.error").removeHandler(handler)
    assert said == []


def test_a_body_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chargpt.serve.app.BODY_SECONDS", 0.05)
    with connected(served) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_server_that_ends_scores_no_more(one: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()

    def slow(*_: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(1000):
            yield torch.zeros(1, TOKENIZER.vocab_size), torch.zeros(1, dtype=torch.long)
            started.set()
            time.sleep(0.01)

    monkeypatch.setattr("chargpt.serve.engine.token_logits", slow)
    asked = {"model": "small", "prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
    found: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: found.append(one.served.post("/v1/completions", asked)))
    asking.start()
    assert started.wait(20)
    one.served.engines["small"].close()
    asking.join(20)
    assert found[0].status_code == 503
    assert "the server ends" in found[0].json()["error"]["message"]


# ------------------------------------------------------------------------------------------------------ who may ask


def test_names_and_schemes_are_read_as_http_reads_them() -> None:
    engines = {"small": ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER)}
    running = Running(engines, api_key="s3cret", hosts=["GPT.example.org"])
    try:
        for host in ("GPT.example.org", "gpt.example.org:8000"):
            headers = {"Host": host, "Authorization": "bearer s3cret"}
            assert httpx2.get(f"{running.served.url}/v1/models", headers=headers).status_code == 200
        headers["Authorization"] = "Basic s3cret"
        assert httpx2.get(f"{running.served.url}/v1/models", headers=headers).status_code == 401
    finally:
        running.stop()


def test_a_port_is_taken_from_the_moment_that_it_is_bound() -> None:
    with listen.bind("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="another program has that port"):
        listen.bind("127.0.0.1", listener.getsockname()[1])
