"""The HTTP side: routes, errors as OpenAI's clients read them, and what is refused before anything is computed."""

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pydantic
import torch
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from chargpt.config import SampleConfig
from chargpt.errors import ChargptError
from chargpt.generation import Piece
from chargpt.generation.generator import token_bias
from chargpt.serve import api
from chargpt.serve.engine import ENDED, BusyError, Delta, Job, ModelEngine, scores
from chargpt.serve.look import look
from chargpt.serve.metrics import Metrics
from chargpt.serve.page import FILES, answer_with
from chargpt.serve.prompts import known_tokens, require_known, unknown_characters

MOST_BYTES, BODY_SECONDS = 2**20, 30.0  # of a request's body, and how long it may take to come
AT_ONCE = 2_000  # tokens and alternatives that are written as JSON on the server's own thread
FLUSH_SECONDS = 1 / 30  # from one write of a stream to the next
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
T = TypeVar("T", bound=pydantic.BaseModel)


@dataclass
class Asked:
    """The streams of one request, and what comes of them: (number, Delta or error) each."""

    jobs: list[Job]
    events: "asyncio.Queue[tuple[int, Delta | ChargptError]]"
    prompt_tokens: int
    replaced: int  # characters of the prompts that the model does not know
    seed: int

    def give_up(self) -> None:
        for job in self.jobs:
            job.given_up = True


def build_app(
    engines: Mapping[str, ModelEngine], *, api_key: str | None = None, hosts: Sequence[str] = LOOPBACK
) -> ASGIApp:
    """The server of these models, by name. hosts: names in a request's Host that are answered"""
    server = Server(engines)
    routes = [
        Route("/health", server.health),
        Route("/metrics", server.metrics_page),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/look", server.look, methods=["POST"]),
        *(Route(path, answer_with(name)) for path, name in FILES.items()),
    ]
    handlers: Any = {HTTPException: http_error, Exception: bug}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), api_key, hosts)


class Guard:
    """Refuses a foreign Host, which a page of another site may have made the browser send, and a wrong key."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: Sequence[str]) -> None:
        self.app, self.api_key, self.hosts = app, api_key, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.lower(): value for name, value in scope["headers"]}
            problem = self._problem(scope["path"], headers)
            if problem is not None:
                return await problem(scope, receive, send)
        await self.app(scope, receive, send)

    def _problem(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") and host.count(":") != 0 else host
        if name.lower() not in self.hosts:
            return error("this server does not answer for that Host; start it with --allow-host", 400, code="bad_host")
        if self.api_key is not None and path not in ("/health", *FILES):  # the page asks for the key
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self.api_key.encode()):
                return error("the API key is missing or wrong", 401, "authentication_error", code="invalid_api_key")
        return None


class Server:
    def __init__(self, engines: Mapping[str, ModelEngine]) -> None:
        self.engines, self.metrics, self.started = engines, Metrics(engines), int(time.time())
        self.scoring = asyncio.Semaphore(1)

    async def health(self, request: Request) -> Response:
        alive = all(engine.thread.is_alive() for engine in self.engines.values())
        return JSONResponse({"status": "ok" if alive else "broken"}, 200 if alive else 503)

    async def metrics_page(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.engines]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._engine(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        engine = self.engines[name]
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "chargpt",
            "max_model_len": engine.model.block_size,
        }

    def _engine(self, name: str) -> ModelEngine:
        if name not in self.engines:
            message = f"there is no model {name!r}; the models are {', '.join(self.engines)}"
            raise HTTPException(404, _error(message, code="model_not_found", param="model"))
        return self.engines[name]

    # -------------------------------------------------------------------------------------------------- completions

    async def completions(self, request: Request) -> Response:
        asked_for = await body(request, api.CompletionRequest)
        engine = self._engine(asked_for.model)
        n, count = asked_for.n, asked_for.max_tokens
        shows_prompts = asked_for.echo or asked_for.return_token_ids
        asked = self._ask(engine, asked_for, asked_for.prompt, count, asked_for.stop, asked_for.logprobs, shows_prompts)
        decoders = [engine.tokenizer.decoder() for _ in asked.jobs]
        prompts = asked.jobs[::n]
        texts = [await asyncio.to_thread(api.texts, engine.tokenizer, job.window) for job in prompts if shows_prompts]
        start = ["".join(texts[i // n]) if asked_for.echo else "" for i in range(len(asked.jobs))]
        shown = [len(text) for text in start]
        weights: list[Any] = []  # of each prompt
        if asked_for.echo and asked_for.logprobs is not None:
            try:
                if any(len(job.window) > api.MOST_TOKENS for job in prompts):
                    raise HTTPException(400, _error(f"at most {api.MOST_TOKENS:,} tokens of a prompt can be scored"))
                weights = [await self._scored(request, engine, job.window, asked_for.logprobs) for job in prompts]
            except BaseException:
                asked.give_up()
                raise

        def choice(i: int, delta: Delta, first: bool) -> dict[str, Any]:
            logprobs = None
            if asked_for.logprobs is not None:
                logprobs = api.completion_logprobs(engine.texts, delta.piece, delta.top, shown[i])
                if first and weights:
                    before = weights[i // n]
                    logprobs = {name: (before[name] or []) + (logprobs[name] or []) or None for name in logprobs}
            text = (start[i] if first else "") + delta.piece.text
            shown[i] += len(delta.piece.text)
            found = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": delta.piece.finish_reason}
            if asked_for.return_token_ids:
                found["token_ids"] = delta.piece.tokens
                found["token_texts"] = [decoders[i]([token]) for token in delta.piece.tokens]
                if first:
                    found["prompt_token_ids"] = asked.jobs[i].window
                    found["prompt_token_texts"] = texts[i // n]
            return found

        return await self._answer(request, asked_for, asked, "text_completion", choice, choice)

    async def _scored(self, request: Request, engine: ModelEngine, tokens: list[int], top: int) -> Any:
        async with self.scoring:  # one at a time: it takes the cores from the streams
            leaving = asyncio.ensure_future(_gone(request))

            def given_up() -> bool:
                return leaving.done() or engine.closed

            def work() -> Any:
                found = scores(engine.model, tokens, top, engine.device, given_up)
                return None if given_up() else api.scored_prompt(engine.texts, tokens, found)

            try:
                found = await asyncio.to_thread(work)
            finally:
                leaving.cancel()
        if found is None:  # nobody reads it, or it is the end
            raise HTTPException(503, _error(ENDED, "server_error"))
        return found

    async def look(self, request: Request) -> Response:
        asked_for = await body(request, api.LookRequest)
        engine = self._engine(asked_for.model)
        try:
            tokens = known_tokens(engine, asked_for.prompt)
            if asked_for.written:
                require_known(engine, asked_for.written)
        except ChargptError as problem:
            raise HTTPException(400, _error(str(problem))) from None
        tokens, written = tokens + asked_for.written, len(asked_for.written)
        async with self.scoring:
            place = await asyncio.to_thread(look, engine.model, tokens, written, engine.device)
        return JSONResponse(api.place(engine.tokenizer, place, asked_for.top, asked_for.attention))

    async def chat(self, request: Request) -> Response:
        asked_for = await body(request, api.ChatRequest)
        engine = self._engine(asked_for.model)
        count = asked_for.max_completion_tokens or asked_for.max_tokens
        top = asked_for.top_logprobs if asked_for.logprobs else None
        asked = self._ask(engine, asked_for, [asked_for.prompt], count, asked_for.ends, top, unknown="replace")

        def choice(kind: str) -> Callable[[int, Delta, bool], dict[str, Any]]:
            def build(i: int, delta: Delta, first: bool) -> dict[str, Any]:
                logprobs = api.chat_logprobs(engine.texts, delta) if asked_for.logprobs else None
                said = {"role": "assistant"} if first else {}
                said["content"] = delta.piece.text
                return {"index": i, kind: said, "logprobs": logprobs, "finish_reason": delta.piece.finish_reason}

            return build

        return await self._answer(request, asked_for, asked, "chat.completion", choice("message"), choice("delta"))

    def _ask(
        self,
        engine: ModelEngine,
        options: api.Options,
        prompts: list[str | list[int]],
        count: int,
        stop: list[str],
        logprobs: int | None,
        shows_prompts: bool = False,
        unknown: str = "strict",
    ) -> Asked:
        """Hand the streams of a request to the engine. Raises HTTPException for what the model cannot take."""
        tokenizer, V = engine.tokenizer, engine.model.vocab_size
        seed = secrets.randbits(31) if options.seed is None else options.seed % 2**62
        events = asyncio.Queue[tuple[int, Delta | ChargptError]]()
        jobs: list[Job] = []

        def deliver(number: int) -> Callable[[Delta | ChargptError], None]:
            return lambda delta: events.put_nowait((number, delta))

        total, replaced, top = 0, 0, logprobs or 0
        try:
            bias = token_bias(tokenizer, options.allow, options.ban)
            if options.logit_bias:
                if not all(0 <= token < V for token in options.logit_bias):
                    raise ChargptError(f"logit_bias names tokens outside the vocabulary of {V}")
                bias = torch.zeros(V) if bias is None else bias
                for token, value in options.logit_bias.items():
                    bias[token] += value
            windows = [known_tokens(engine, prompt, unknown) for prompt in prompts]
            total = sum(map(len, windows))
            shown = options.n * (count * len(windows) + (total if shows_prompts else 0)) * (1 + top)
            if shown > api.MOST_SHOWN:
                raise ChargptError(
                    f"this asks for {shown:,} tokens and alternatives of tokens, and {api.MOST_SHOWN:,} is the most: "
                    "ask for fewer prompts, answers, tokens or logprobs"
                )
            if unknown == "replace":
                replaced = sum(map(partial(unknown_characters, tokenizer), map(str, prompts)))
            for window in windows:
                for i in range(options.n):
                    config = SampleConfig(
                        max_new_tokens=count,
                        temperature=options.temperature,
                        top_k=options.top_k,
                        top_p=options.top_p if options.top_p < 1 else None,
                        min_p=options.min_p,
                        stop=tuple(stop),
                        seed=seed + i,
                    )
                    jobs.append(Job(window, config, deliver(len(jobs)), bias, top))
            if count:
                engine.hand_over = partial(_soon, asyncio.get_running_loop())
                engine.submit(jobs)
            else:
                for number in range(len(jobs)):
                    events.put_nowait((number, Delta(Piece("", [], [], "length"), [])))
        except BusyError as problem:
            raise HTTPException(429, _error(str(problem), "rate_limit_error", code="busy")) from None
        except ChargptError as problem:
            raise HTTPException(400, _error(str(problem))) from None
        self.metrics.prompt.labels(options.model).inc(total)
        return Asked(jobs, events, total, replaced, seed)

    async def _answer(
        self,
        request: Request,
        options: api.Options,
        asked: Asked,
        kind: str,
        whole: Callable[[int, Delta, bool], dict[str, Any]],
        part: Callable[[int, Delta, bool], dict[str, Any]],
    ) -> Response:
        extra = {"seed": asked.seed} | ({"replaced_characters": asked.replaced} if asked.replaced else {})
        if options.stream:
            chunk = "text_completion" if kind == "text_completion" else "chat.completion.chunk"
            lines = self._stream(options, asked, api.head(chunk, options.model) | extra, part)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        collecting = asyncio.ensure_future(self._collect(options.model, asked))
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody reads it
            deltas = collecting.result()
        except ChargptError as problem:
            return error(str(problem), 500, "server_error")
        finally:
            asked.give_up()
            collecting.cancel()
            leaving.cancel()

        def answer() -> Response:
            choices = [whole(i, delta, True) for i, delta in enumerate(deltas)]
            made = sum(len(delta.piece.tokens) for delta in deltas)
            counted = {"choices": choices, "usage": api.usage(asked.prompt_tokens, made)}
            return JSONResponse(api.head(kind, options.model) | extra | counted)

        return await asyncio.to_thread(answer)  # it may be long, and others wait for this thread

    async def _events(self, model: str, asked: Asked) -> AsyncIterator[tuple[int, Delta]]:
        """What comes until all streams have ended. Raises ChargptError when one fails."""
        open_streams, start, first = len(asked.jobs), time.perf_counter(), True
        while open_streams:
            i, delta = await asked.events.get()
            if isinstance(delta, ChargptError):
                raise delta
            if first:
                self.metrics.first.labels(model).observe(time.perf_counter() - start)
                first = False
            self.metrics.generated.labels(model).inc(len(delta.piece.tokens))
            if delta.piece.finish_reason is not None:
                open_streams -= 1
                self.metrics.finished.labels(model, delta.piece.finish_reason).inc()
            yield i, delta
        self.metrics.whole.labels(model).observe(time.perf_counter() - start)

    async def _collect(self, model: str, asked: Asked) -> list[Delta]:
        found: list[list[Delta]] = [[] for _ in asked.jobs]
        async for i, delta in self._events(model, asked):
            found[i].append(delta)
        return [joined(deltas) for deltas in found]

    async def _stream(
        self,
        options: api.Options,
        asked: Asked,
        head: dict[str, Any],
        part: Callable[[int, Delta, bool], dict[str, Any]],
    ) -> AsyncIterator[str]:
        """Server-sent events. The first piece at once, then what came in FLUSH_SECONDS together."""
        with_usage = options.stream_options.include_usage
        held: dict[int, list[Delta]] = {}
        begun: set[int] = set()
        made, due = 0, 0.0

        def written(held: dict[int, list[Delta]]) -> str:
            lines = []
            for i, deltas in held.items():
                content = head | {"choices": [part(i, joined(deltas), i not in begun)]}
                begun.add(i)
                lines.append(_event(content | ({"usage": None} if with_usage else {})))
            return "".join(lines)

        async def flush() -> str:
            nonlocal held
            taken, held = held, {}
            deltas = [delta for some in taken.values() for delta in some]
            if sum(len(delta.piece.tokens) + sum(map(len, delta.top)) for delta in deltas) > AT_ONCE:
                return await asyncio.to_thread(written, taken)
            await asyncio.sleep(0)  # others' turn, also where more of this one waits
            return written(taken)

        try:
            async for i, delta in self._events(options.model, asked):
                made += len(delta.piece.tokens)
                held.setdefault(i, []).append(delta)
                if time.perf_counter() >= due:
                    yield await flush()
                    due = time.perf_counter() + FLUSH_SECONDS
            if held:
                yield await flush()
            if with_usage:
                yield _event(head | {"choices": [], "usage": api.usage(asked.prompt_tokens, made)})
            yield "data: [DONE]\n\n"
        except ChargptError as problem:
            yield _event(_error(str(problem), "server_error"))
        finally:  # the client went away, or all is written
            asked.give_up()


# ---------------------------------------------------------------------------------------------------------------- parts


def joined(deltas: list[Delta]) -> Delta:
    """Deltas of one stream as one."""
    piece = Piece(
        "".join(delta.piece.text for delta in deltas),
        [token for delta in deltas for token in delta.piece.tokens],
        [logprob for delta in deltas for logprob in delta.piece.logprobs],
        deltas[-1].piece.finish_reason if deltas else None,
    )
    return Delta(piece, [row for delta in deltas for row in delta.top])


def _soon(loop: asyncio.AbstractEventLoop, deliver: Callable[[], None]) -> None:
    """From the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the server has ended
        loop.call_soon_threadsafe(deliver)


async def _gone(request: Request) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body(request: Request, kind: type[T]) -> T:
    """A request's JSON as `kind`. Raises HTTPException for what is not."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, _error("the body must be JSON: Content-Type: application/json"))
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise HTTPException(413, _error(f"a request has at most {MOST_BYTES:,} bytes"))
    except ClientDisconnect:
        raise HTTPException(499) from None  # nobody reads it
    except TimeoutError:
        raise HTTPException(408, _error(f"the body did not come within {BODY_SECONDS:.0f} seconds")) from None
    try:
        return kind.model_validate(json.loads(data))
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, pydantic.ValidationError):
            first = problem.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise HTTPException(400, _error(f"{where}: {message}" if where else message, param=where or None)) from None
        raise HTTPException(400, _error("the body is no JSON that can be read")) from None


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(
    message: str, kind: str = "invalid_request_error", *, code: str | None = None, param: str | None = None
) -> Any:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error(message: str, status: int, kind: str = "invalid_request_error", *, code: str | None = None) -> Response:
    return JSONResponse(_error(message, kind, code=code), status)


async def http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    if isinstance(problem.detail, dict):
        return JSONResponse(problem.detail, problem.status_code)
    return error(f"{request.method} {request.url.path}: {problem.detail}", problem.status_code)


async def bug(request: Request, problem: Exception) -> Response:
    """Of ours. The log has the traceback; the client learns nothing."""
    return error("the server failed; its log says why", 500, "server_error")
