"""The server, as the `openai` package and a browser's worst requests meet it."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch

import chargpt.serve
from chargpt import cli
from chargpt.checkpoint import save_checkpoint
from chargpt.config import SampleConfig
from chargpt.evaluation import sliding_loss
from chargpt.generation import Generator
from chargpt.serve.engine import Job, ModelEngine, scores
from chargpt.serve.listen import bind, configured
from serving import TOKENIZER, Running, Served, made


def alone(served: Served, model: str, prompt: str, **options: Any) -> Any:
    engine = served.engines[model]
    config = SampleConfig(**{"temperature": 1.0, "engine": engine.chosen.engine} | options)
    return Generator(engine.model, engine.tokenizer).generate(prompt, config)[0]


# ---------------------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize("model", ["small", "two", "bigram", "bytes"])
def test_a_completion_is_what_the_generator_writes(served: Served, model: str) -> None:
    found = served.client().completions.create(model=model, prompt="abc", max_tokens=40, n=3, seed=7)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    for choice in found.choices:
        wanted = alone(served, model, "abc", max_new_tokens=40, seed=7 + choice.index)
        assert (choice.text, choice.finish_reason) == (wanted.text, "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 120)  # type: ignore[union-attr]


def test_all_forms_of_prompts(served: Served) -> None:
    client, ids = served.client(), TOKENIZER.encode("abc").tolist()
    wanted = alone(served, "small", "abc", max_new_tokens=20, seed=1).text
    for prompt in ("abc", ids, ["abc"], [ids]):
        found = client.completions.create(model="small", prompt=prompt, max_tokens=20, seed=1)
        assert [choice.text for choice in found.choices] == [wanted]
    found = client.completions.create(model="small", prompt=["abc", "ha", "abc"], max_tokens=20, seed=1, n=2)
    texts = [choice.text for choice in found.choices]
    assert texts[:2] == texts[4:]
    assert texts[0] == wanted
    assert texts[2] == alone(served, "small", "ha", max_new_tokens=20, seed=1).text


def test_options_do_what_they_do_elsewhere(served: Served) -> None:
    client = served.client()
    for sent, wanted in (
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"extra_body": {"top_k": 2, "min_p": 0.1}}, {"top_k": 2, "min_p": 0.1}),
        ({"extra_body": {"allow": "abc", "ban": None}}, {"allow": "abc"}),
        ({"extra_body": {"ban": "abc"}}, {"ban": "abc"}),
    ):
        got = client.completions.create(model="small", prompt="ab", max_tokens=30, seed=2, **sent)  # type: ignore[arg-type]
        assert got.choices[0].text == alone(served, "small", "ab", max_new_tokens=30, seed=2, **wanted).text
    h = int(TOKENIZER.encode("h")[0])
    got = client.completions.create(model="small", prompt="ab", max_tokens=30, seed=2, logit_bias={str(h): 100})
    assert got.choices[0].text == "h" * 30
    first = client.completions.create(model="small", prompt="ab", max_tokens=30)
    again = client.completions.create(model="small", prompt="ab", max_tokens=30, seed=first.seed)  # type: ignore[attr-defined]
    assert first.choices[0].text == again.choices[0].text  # the seed that was taken is told


def test_stop_texts_end_an_answer_and_do_not_show(served: Served) -> None:
    whole = alone(served, "small", "ab", max_new_tokens=200, seed=3).text
    stop = [whole[20:22], whole[50:53]]
    for stream in (False, True):
        found = served.client().completions.create(
            model="small", prompt="ab", max_tokens=200, seed=3, stop=stop, stream=stream
        )
        if stream:
            chunks = list(found)  # type: ignore[call-overload]
            text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].text, found.choices[0].finish_reason  # type: ignore[union-attr]
        assert text == whole[: min(place for each in stop if (place := whole.find(each)) >= 0)]
        assert reason == "stop"


def test_a_stream_is_the_whole_in_pieces(served: Served) -> None:
    options: Any = {"model": "small", "prompt": "ab", "max_tokens": 300, "n": 3, "seed": 5, "logprobs": 2, "echo": True}
    whole = served.client().completions.create(**options)
    chunks = list(served.client().completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for i, wanted in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == i]
        assert "".join(part.text for part in mine) == wanted.text
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + ["length"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            parts = [value for part in mine for value in getattr(part.logprobs, name)]
            assert parts == getattr(wanted.logprobs, name)


def test_logprobs_are_the_models_own(served: Served) -> None:
    wanted = alone(served, "small", "ab", max_new_tokens=30, seed=5, temperature=0.5, top_k=3)
    found = served.client().completions.create(
        model="small", prompt="ab", max_tokens=30, seed=5, temperature=0.5, logprobs=4, extra_body={"top_k": 3}
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == found.choices[0].text == wanted.text
    assert logprobs.token_logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert logprobs.text_offset == list(range(30))
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):  # type: ignore[arg-type]
        assert len(top) == 4
        assert sorted(top.values(), reverse=True) == list(top.values())
        assert token not in top or top[token] == pytest.approx(logprob, abs=1e-4)
        assert token in list(top)[:3]  # top_k


@pytest.mark.parametrize("model", ["small", "two", "bigram"])
def test_an_echo_without_more_scores_the_prompt_as_eval_does(served: Served, model: str) -> None:
    text = "abcd efgh\nbad cab. " * 20  # many windows
    client, engine = served.client(), served.engines[model]
    for prompt in (text, text[:7], "a"):
        found = client.completions.create(model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=3)
        logprobs = found.choices[0].logprobs
        assert found.choices[0].text == "".join(logprobs.tokens) == prompt  # type: ignore[union-attr, arg-type]
        first, *others = logprobs.token_logprobs  # type: ignore[union-attr, misc]
        assert first is None
        assert logprobs.text_offset == list(range(len(prompt)))  # type: ignore[union-attr]
        assert found.usage.completion_tokens == 0  # type: ignore[union-attr]
        if others:
            loss = sliding_loss(engine.model, TOKENIZER.encode(prompt).astype(np.int64), 64)
            assert -sum(others) / len(others) == pytest.approx(loss, abs=1e-4)
            assert [len(top) for top in logprobs.top_logprobs[1:]] == [3] * len(others)  # type: ignore[union-attr, index]
    with pytest.raises(openai.BadRequestError, match="at most 100,000 tokens of a prompt can be scored"):
        client.completions.create(model=model, prompt="a" * 100_001, max_tokens=0, echo=True, logprobs=0)
    options: Any = {"model": model, "prompt": "abc", "max_tokens": 20, "echo": True, "logprobs": 0, "seed": 1}
    found = client.completions.create(**options)
    tokens = found.choices[0].logprobs.tokens  # type: ignore[union-attr]
    assert "".join(tokens) == found.choices[0].text  # type: ignore[arg-type]
    assert found.choices[0].text.startswith("abc")
    chunks = list(client.completions.create(**options, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == tokens


def test_a_character_of_several_bytes_comes_whole(served: Served) -> None:
    smile = list("🙂é".encode())
    bias = {str(token): 50 for token in smile}
    chunks = served.client().completions.create(
        model="bytes", prompt="🙂", max_tokens=400, seed=1, logit_bias=bias, stream=True
    )
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == alone_bytes(served, bias)
    assert not any(0xD800 <= ord(character) < 0xE000 for character in text)


def alone_bytes(served: Served, bias: dict[str, int]) -> str:
    return served.client().completions.create(
        model="bytes", prompt="🙂", max_tokens=400, seed=1, logit_bias=bias
    ).choices[0].text  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- chat


def test_a_chat_is_a_scene_of_a_play(served: Served) -> None:
    talk: Any = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "bé ad"}]}]
    found = served.client().chat.completions.create(
        model="small", messages=talk, max_tokens=100, seed=1, logprobs=True, top_logprobs=2
    )
    prompt = "SYSTEM:\na\n\nUSER:\nbé ad\n\nASSISTANT:\n"
    wanted = alone(served, "small", prompt, max_new_tokens=100, seed=1, unknown="replace", stop=("\n\n",))
    choice = found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    assert choice.finish_reason == wanted.finish_reason
    unknown = sum(character not in "\n .:ABENRSTUabcdefgh" for character in prompt)
    assert found.replaced_characters == unknown > 0  # type: ignore[attr-defined]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [entry.token for entry in content] == [TOKENIZER.decode([token]) for token in wanted.tokens]
    assert all(len(entry.top_logprobs) == 2 and entry.bytes == list(entry.token.encode()) for entry in content)
    chunks = list(
        served.client().chat.completions.create(model="small", messages=talk, max_tokens=100, seed=1, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    assert chunks[-1].choices[0].finish_reason == wanted.finish_reason


def test_langchain_is_answered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    from langchain_openai import ChatOpenAI, OpenAI

    options: Any = {"base_url": f"{served.url}/v1", "api_key": "none", "model": "small", "max_retries": 0, "seed": 1}
    chat, text = ChatOpenAI(**options, max_tokens=60, temperature=0.9), OpenAI(**options, max_tokens=60, n=1, best_of=1)
    wanted = served.client().chat.completions.create(
        model="small", messages=[{"role": "user", "content": "abc"}], max_tokens=60, temperature=0.9, seed=1
    )
    assert chat.invoke("abc").content == wanted.choices[0].message.content
    assert "".join(str(part.content) for part in chat.stream("abc")) == wanted.choices[0].message.content
    temperature = text.temperature
    written = served.client().completions.create(
        model="small", prompt="abc", max_tokens=60, temperature=temperature, seed=1
    )
    assert text.invoke("abc") == "".join(text.stream("abc")) == written.choices[0].text


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_is_answered(served: Served) -> None:
    body = json.dumps({"model": "small", "prompt": "abc", "max_tokens": 60, "seed": 1, "stream": True})
    command = ["curl", "-sSN", f"{served.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, timeout=60, check=True, text=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2])
    assert text == alone(served, "small", "abc", max_new_tokens=60, seed=1).text


# ----------------------------------------------------------------------------------------------------------------- many


def test_many_at_once_get_what_each_would_get_alone(served: Served) -> None:
    """More than there are slots, of different lengths, some of which go away."""
    options = [
        {"prompt": "ab"[: 1 + i % 2], "max_tokens": 5 + 13 * (i % 5), "seed": i, "temperature": 0.5 + i % 3}
        for i in range(40)
    ]

    async def ask(client: openai.AsyncOpenAI, i: int) -> str | None:
        if i % 8 == 3:
            stream = await client.completions.create(model="small", stream=True, **options[i] | {"max_tokens": 50_000})  # type: ignore[call-overload]
            async for _ in stream:
                await stream.close()
                return None
        found = await client.completions.create(model="small", **options[i])  # type: ignore[call-overload]
        return str(found.choices[0].text)

    async def everyone() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(len(options))))

    for i, text in enumerate(asyncio.run(everyone())):
        if text is not None:
            prompt, count, seed, temperature = options[i].values()
            assert text == alone(served, "small", prompt, max_new_tokens=count, seed=seed, temperature=temperature).text  # type: ignore[arg-type]
    waited = time.monotonic()
    while not served.idle():
        assert time.monotonic() - waited < 10
        time.sleep(0.01)


def test_a_client_that_goes_away_frees_its_place(served: Served) -> None:
    for stream in (True, False):
        content = {"model": "small", "prompt": "a", "max_tokens": 100_000, "n": 4, "stream": stream}
        with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as connection:
            data = json.dumps(content).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            while served.engines["small"].running < 4:
                time.sleep(0.005)
        left = time.monotonic()
        while not served.idle():
            assert time.monotonic() - left < 10
            time.sleep(0.005)


def test_threads_that_hinder_one_another_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose cores others want too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    engine = ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER)
    burst, used = engine._streams.burst, []

    def hindered(count: int, threads: int, *, with_logits: bool = False) -> Any:
        used.append(threads)
        time.sleep(0.002 * count if threads == 2 else 0)
        return burst(count, threads, with_logits=with_logits)

    monkeypatch.setattr(engine._streams, "burst", hindered)
    ended = threading.Event()
    config = SampleConfig(max_new_tokens=3000, engine=engine.chosen.engine)
    engine.submit([Job([1], config, lambda delta: ended.set() if delta.piece.finish_reason else None)])  # type: ignore[union-attr]
    assert ended.wait(60)
    engine.close()
    later = used[len(used) // 2 :]
    assert later.count(1) > later.count(2)  # which is tried again now and then


def test_the_server_does_not_say_what_it_is() -> None:
    assert not configured(lambda *_: None).server_header  # type: ignore[arg-type]


def test_what_all_streams_gain_in_a_burst_comes_in_one_call() -> None:
    engine = ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER, slots=5)
    calls: list[list[int]] = []  # the streams of each
    alternatives: list[Any] = []
    done = threading.Event()
    left = 5

    def deliver(number: int, delta: Any) -> None:
        nonlocal left
        calls[-1].append(number)
        if delta.top:
            alternatives.append(number)
        left -= delta.piece.finish_reason is not None

    def hand_over(each: Callable[[], None]) -> None:
        calls.append([])
        each()
        if not left:
            done.set()

    engine.hand_over = hand_over
    jobs = [Job([0], SampleConfig(max_new_tokens=40), partial(deliver, i)) for i in range(4)]
    engine.submit([*jobs, Job([0], SampleConfig(max_new_tokens=40), partial(deliver, 4), top=2)])
    assert done.wait(30)
    assert calls == [[0, 1, 2, 3, 4]] * len(calls)
    assert set(alternatives) == {4}  # nobody else asked for any
    engine.close()


def test_a_client_that_goes_away_ends_the_scoring(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def endless(*arguments: Any) -> Any:
        begun.set()
        while not arguments[-1]():
            time.sleep(0.005)
        ended.set()
        return scores(*arguments)

    monkeypatch.setattr("chargpt.serve.app.scores", endless)
    data = json.dumps({"model": "small", "prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert begun.wait(10)
        assert not ended.wait(0.1)
    assert ended.wait(10)


def test_scores_that_nobody_wants_end_early(served: Served) -> None:
    tokens = TOKENIZER.encode("abc " * 5000).tolist()
    asked = iter([False, True])
    model = served.engines["small"].model
    found = scores(model, tokens, 2, given_up=lambda: next(asked))
    whole = scores(model, tokens, 2)
    n = len(found.piece.logprobs)
    assert 0 < n < len(tokens) - 1
    assert (found.piece.logprobs, found.top) == (whole.piece.logprobs[:n], whole.top[:n])


def test_too_many_are_told_to_wait(served: Served) -> None:
    long: Any = {"model": "small", "prompt": "a", "max_tokens": 100_000, "n": 16, "stream": True}
    with served.client() as client:
        streams = [client.completions.create(**long) for _ in range(4)]  # 4 run, 60 wait
        with pytest.raises(openai.RateLimitError, match="too many requests wait"):
            client.completions.create(model="small", prompt="a", n=16)
        for stream in streams:
            stream.close()


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ({"model": "nobody"}, 404, "there is no model 'nobody'; the models are small, two, bigram, bytes"),
        ({}, 400, "model: Field required"),
        ({"model": "small", "temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"model": "small", "temperature": "nan"}, 400, "temperature:"),
        ({"model": "small", "n": 17}, 400, "n: Input should be less than or equal to 16"),
        ({"model": "small", "max_tokens": 0}, 400, "max_tokens is at least 1, or 0 with echo"),
        ({"model": "small", "max_tokens": -1}, 400, "max_tokens:"),
        ({"model": "small", "max_tokens": 10**9}, 400, "max_tokens:"),
        ({"model": "small", "stop": ["a"] * 5}, 400, "stop:"),
        ({"model": "small", "stop": [""]}, 400, "stop.0:"),
        ({"model": "small", "logprobs": 101}, 400, "logprobs:"),
        ({"model": "small", "prompt": [10**6]}, 400, "a prompt of tokens has at least one, each from 0 to 19"),
        ({"model": "small", "prompt": [[]]}, 400, "a prompt of tokens has at least one"),
        ({"model": "small", "prompt": ["a"] * 33}, 400, "prompt"),
        ({"model": "small", "prompt": "é"}, 400, "has no 'é'"),
        ({"model": "small", "logit_bias": {"99": 1}}, 400, "logit_bias names tokens outside the vocabulary of 20"),
        (
            {"model": "small", "logit_bias": {"1": 1e308}},
            400,
            "logit_bias.1: Input should be less than or equal to 100",
        ),
        ({"model": "small", "logit_bias": {"1": "nan"}}, 400, "logit_bias.1:"),
        ({"model": "small", "allow": "é"}, 400, "no token of this model has the character 'é'"),
        ({"model": "small", "best_of": 2}, 400, "best_of: is not something that these models can do"),
        ({"model": "small", "suffix": "x"}, 400, "suffix: is not something"),
        ({"model": "small", "tools": [{}]}, 400, "tools: is not something"),
        ({"model": "small", "wish": 1}, 400, "wish: Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(served: Served, content: Any, status: int, words: str) -> None:
    found = served.post("/v1/completions", content)
    problem = found.json()["error"]
    assert (found.status_code, problem["type"]) == (status, "invalid_request_error")
    assert words in problem["message"]


def test_what_says_nothing_is_taken(served: Served) -> None:
    nothing = {
        "logit_bias": {},
        "top_k": 10**30,
        "best_of": 1,
        "suffix": None,
        "tools": None,
        "frequency_penalty": 0,
        "stop": None,
    }
    found = served.post("/v1/completions", {"model": "small", "prompt": "a", "max_tokens": 3, **nothing})
    assert len(found.json()["choices"][0]["text"]) == 3


def test_bodies_that_are_no_requests(served: Served) -> None:
    url, kind = f"{served.url}/v1/completions", {"Content-Type": "application/json"}
    for data, headers, status in (
        (b"{", kind, 400),
        (b"\xff\xfe", kind, 400),
        (b"[" * 100_000, kind, 400),
        (b"[]", kind, 400),
        (b'{"model": "small", "n": ' + b"9" * 5000 + b"}", kind, 400),
        (b" " * (2**20 + 1), kind, 413),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {}, 415),
    ):
        found = httpx2.post(url, content=data, headers=headers)
        assert found.status_code == status
        assert found.json()["error"]["message"]
    assert httpx2.get(url).status_code == 405
    assert httpx2.get(f"{served.url}/etc/passwd").json()["error"]["message"] == "GET /etc/passwd: Not Found"


def test_a_foreign_host_is_refused(served: Served) -> None:
    for host in ("example.org", "example.org:8000", "127.0.0.1.example.org", "", "[::1]x"):
        found = httpx2.get(f"{served.url}/v1/models", headers={"Host": host})
        assert found.status_code == 400
    for host in ("localhost", "LocalHost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert httpx2.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == 200
    found = httpx2.get(f"{served.url}/v1/models", headers={"Origin": "http://example.org"})
    assert not any(name.lower().startswith("access-control") for name in found.headers)
    assert "server" not in found.headers


def test_a_key_is_asked_for() -> None:
    running = Running(
        {"m": ModelEngine(made(TOKENIZER.vocab_size, 1), TOKENIZER)}, api_key="sésame", hosts=["127.0.0.1"]
    )
    try:
        served = running.served
        for key in ("none", "s", "sesame"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                served.client(api_key=key).models.list()
        for scheme in ("Basic", "Token", "ApiKey", "zebra"):
            other = {"Authorization": f"{scheme} sésame".encode()}
            assert httpx2.get(f"{served.url}/v1/models", headers=other).status_code == 401, scheme
        right = {"Authorization": "Bearer sésame".encode()}
        assert httpx2.get(f"{served.url}/v1/models", headers=right).status_code == 200
        assert httpx2.get(f"{served.url}/v1/models").status_code == 401
        assert httpx2.get(f"{served.url}/health").status_code == 200
    finally:
        running.stop()


# ----------------------------------------------------------------------------------------------------------- the others


def test_models_health_and_numbers(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["small", "two", "bigram", "bytes"]
    assert client.models.retrieve("two").owned_by == "chargpt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")
    assert httpx2.get(f"{served.url}/health").json() == {"status": "ok"}

    def generated() -> float:
        lines = httpx2.get(f"{served.url}/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith('vllm:generation_tokens_total{model_name="small"}')]
        return float(line.split()[1])

    client.completions.create(model="small", prompt="a", max_tokens=1)
    before = generated()
    client.completions.create(model="small", prompt="a", max_tokens=25, n=2)
    assert generated() - before == 50


def test_a_broken_model_is_an_error_of_the_server() -> None:
    model = made(TOKENIZER.vocab_size, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    running = Running({"m": ModelEngine(model, TOKENIZER)})
    try:
        for stream in (False, True):
            found = running.served.post("/v1/completions", {"model": "m", "prompt": "a", "stream": stream})
            assert "weights are broken" in found.text
            assert "Traceback" not in found.text
            assert found.status_code == (200 if stream else 500)
    finally:
        running.stop()


# ---------------------------------------------------------------------------------------------------------- the command


def test_small_writes_are_sent_at_once() -> None:
    """Nagle's algorithm would hold the second of them until the client's delayed ACK, 40 ms later."""

    async def without_delay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await found

    assert asyncio.run(without_delay())


def test_without_its_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chargpt, "serve", chargpt.serve)  # comes back too: else there are two of it from here on
    for name in [name for name in sys.modules if name.startswith("chargpt.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["chargpt", "serve", "mine"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "chargpt: error: serving needs uvicorn: pip install 'chargpt[serve]'\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_command_serves_until_a_signal(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mine", made(TOKENIZER.vocab_size, 1), TOKENIZER, {"step": 0})
    program = "import sys; from chargpt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", "mine", "both=mine,mine", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0].startswith("mine: C++ in int8")
    assert lines[1].startswith("both: torch (C++ decodes a single Transformer")
    url = lines[2].removeprefix("serving at ").split(",")[0]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert len(client.completions.create(model="both", prompt="a", max_tokens=5).choices[0].text) == 5
        stream = client.completions.create(model="mine", prompt="a", max_tokens=100_000, stream=True, n=16)
        next(iter(stream))
        process.send_signal(getattr(signal, name))
        with pytest.raises(openai.APIError, match="the server ends"):
            list(stream)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_an_impatient_ctrl_c_ends_it_as_quietly(tmp_path: Path) -> None:
    """A signal comes twice, too, when `timeout` sends it, or make hands it on to what it started."""
    save_checkpoint(tmp_path / "mine", made(TOKENIZER.vocab_size, 1), TOKENIZER, {"step": 0})
    command = [sys.executable, "-c", "from chargpt.cli import main; main()", "serve", "mine", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = [process.stdout.readline() for _ in range(2)][1].removeprefix("serving at ").split(",")[0]
    half = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    half.sendall(head + b"Content-Length: 9\r\n\r\n{")
    with half, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.completions.create(model="mine", prompt="a", max_tokens=100_000, stream=True)
        next(iter(stream))
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)  # else they may count as one
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
