"""What clients send and get: the fields of OpenAI's completions and chat completions, as its Python package reads them.

What a small model cannot do is refused with a reason, not ignored: a field that is not here is an error.
"""

import base64
import math
import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from chargpt.generation import Piece
from chargpt.serve.engine import Delta
from chargpt.serve.look import Place
from chargpt.tokenizers import Tokenizer

MOST_ANSWERS, MOST_PROMPTS, MOST_TOKENS = 16, 32, 100_000
MOST_SHOWN = MOST_ANSWERS * MOST_TOKENS  # tokens and alternatives of a whole answer
NOT_HERE = "is not something that these models can do; leave it out"
PROMPT = f"a prompt is a text or a list of tokens, or a list of at most {MOST_PROMPTS} of them"


# Fields that are refused, but for values that mean nothing and that some clients send.
MEANS_NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _one_prompt(value: Any) -> Any:
    if not isinstance(value, str) and not (_tokens(value) and 0 < len(value) <= MOST_TOKENS):
        raise ValueError(f"a prompt is a text, or a list of 1 to {MOST_TOKENS:,} tokens")
    return value


def _prompts(value: Any) -> Any:
    """As one list, whichever of the four forms came."""
    if isinstance(value, str) or (_tokens(value) and value):
        return [value]
    if not isinstance(value, list) or not 0 < len(value) <= MOST_PROMPTS:
        raise ValueError(PROMPT)
    if not all(isinstance(prompt, str) for prompt in value) and not all(map(_tokens, value)):
        raise ValueError(PROMPT)
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Options(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    user: str | None = None
    # more than OpenAI has
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    allow: str | None = Field(None, min_length=1)
    ban: str = ""
    return_token_ids: bool = False  # vLLM's name
    # of MEANS_NOTHING
    presence_penalty: Any = None
    frequency_penalty: Any = None
    best_of: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None

    @field_validator(*MEANS_NOTHING, check_fields=False)
    @classmethod
    def _unsupported(cls, value: Any, field: ValidationInfo) -> None:
        if value is not None and value not in MEANS_NOTHING[str(field.field_name)]:
            raise ValueError(NOT_HERE)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        """Null means left out, and one stop text is a list of one."""
        if isinstance(given, dict):
            given = {name: value for name, value in given.items() if value is not None}
            if isinstance(given.get("stop"), str):
                given["stop"] = [given["stop"]]
        return given


class CompletionRequest(Options):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)] = [""]
    max_tokens: int = Field(16, ge=0, le=MOST_TOKENS)  # 0 with echo alone: only what the prompt's tokens weigh
    logprobs: int | None = Field(None, ge=0, le=100)
    echo: bool = False
    suffix: Any = None

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is at least 1, or 0 with echo")
        return self


class LookRequest(BaseModel):
    """Ours alone: one place of a text, for the page."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    prompt: Annotated[str | list[int], PlainValidator(_one_prompt)] = ""
    written: Annotated[list[int], FailFast()] = Field([], max_length=MOST_TOKENS)  # by the model, behind the prompt
    top: int = Field(10, ge=1, le=1000)
    attention: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Options):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int = Field(256, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=100)
    parallel_tool_calls: Any = None

    @property
    def prompt(self) -> str:
        """As a play is written: each message behind its speaker's name. The models know no other form of talk."""
        turns = [f"{message.role.upper()}:\n{message.text.strip()}\n\n" for message in self.messages]
        return "".join(turns) + "ASSISTANT:\n"

    @property
    def ends(self) -> list[str]:
        """The texts at which an answer ends: the next speaker, unless the client says others."""
        return self.stop or ["\n\n"]


# -------------------------------------------------------------------------------------------------------------- answers


def head(kind: str, model: str) -> dict[str, Any]:
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion_logprobs(
    texts: Sequence[str], piece: Piece, top: list[list[tuple[int, float]]], offset: int
) -> dict[str, Any]:
    """texts: of each token of the vocabulary; offset: characters of the text before the piece"""
    shown = [texts[token] for token in piece.tokens]
    return {
        "tokens": shown,
        "token_logprobs": [finite(logprob) for logprob in piece.logprobs],
        "top_logprobs": [{texts[token]: finite(p) for token, p in row} for row in top] or None,
        "text_offset": list(accumulate(map(len, shown), initial=offset))[:-1],
    }


def scored_prompt(texts: Sequence[str], tokens: list[int], scores: Delta) -> dict[str, Any]:
    """Of a prompt as its echo has them: nothing comes before the first token, so that has none.

    scores: of the others
    """
    found = completion_logprobs(texts, Piece("", tokens[:1], [0.0], None), [], 0)
    others = completion_logprobs(texts, scores.piece, scores.top, len(found["tokens"][0]))
    found = {name: (values or []) + (others[name] or []) for name, values in found.items()}
    found["token_logprobs"][0] = None
    found["top_logprobs"] = [None, *found["top_logprobs"]] if found["top_logprobs"] else None
    return found


def place(tokenizer: Tokenizer, place: Place, top: int, attention: bool) -> dict[str, Any]:
    """Attention by layer, head and token is a byte each, in steps of 1/255, in base64: a fifth of what numbers take."""
    best = place.logprobs.topk(min(top, len(place.logprobs)))
    answer: dict[str, Any] = {
        "object": "chargpt.look",
        "tokens": place.window,
        "texts": texts(tokenizer, place.window),
        "next": [
            {"token": token, "text": tokenizer.decode([token]), "logprob": finite(logprob)}
            for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    }
    if attention and place.attention is not None:
        layers, heads, _ = place.attention.shape
        weights = base64.b64encode((255 * place.attention).round().byte().numpy().tobytes()).decode()
        answer["attention"] = {"layers": layers, "heads": heads, "weights": weights}
    return answer


def texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each token adds to the text: a character of several tokens comes whole with its last one."""
    decoder = tokenizer.decoder()
    return [decoder([token]) for token in tokens]


def chat_logprobs(texts: Sequence[str], delta: Delta) -> Any:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = texts[token]
        return {"token": text, "bytes": list(text.encode()), "logprob": finite(logprob)}

    rows = delta.top or [[] for _ in delta.piece.tokens]
    content = []
    for token, logprob, row in zip(delta.piece.tokens, delta.piece.logprobs, rows, strict=True):
        content.append(entry(token, logprob) | {"top_logprobs": [entry(*other) for other in row]})
    return {"content": content}


def finite(logprob: float) -> float:
    """JSON knows no infinity."""
    return round(max(logprob, -9999.0), 6) if not math.isnan(logprob) else -9999.0
