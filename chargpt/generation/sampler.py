"""Generation, as small pure functions: logits to probabilities, probabilities to a token, tokens to text.

The one idea to know: the model reads each token once, into a cache, and goes on with the last half of a full window.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from chargpt.config import Engine, SampleConfig
from chargpt.errors import ChargptError, ConfigError, TokenizerError
from chargpt.generation.native import BROKEN_LOGITS, NativeDecoder, why_not
from chargpt.kernels import philox
from chargpt.models import LanguageModel
from chargpt.tokenizers import Tokenizer

BLOCK = 256  # positions whose random numbers are made at once


def next_token_probabilities(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> torch.Tensor:
    """Probabilities (B, V), float32, of the next token from its logits (B, V).

    Temperature divides the logits; 0 puts everything on the likeliest token. Then `top_k` keeps exactly the k
    likeliest, and `top_p` the smallest set of the likeliest of these that reaches that share of them (Holtzman et al.
    2019, arXiv 1904.09751, section 3.1), always at least one. Of equally likely tokens the smaller id comes first.
    `min_p` drops those with less than this share of the likeliest one's probability (Nguyen et al. 2024,
    arXiv 2407.01082).
    Raises ChargptError when the logits have no softmax: one is NaN or +∞, or all are −∞.
    """
    likeliest = logits.amax(-1, keepdim=True)  # (B, 1); NaN if any logit is
    if not torch.isfinite(likeliest).all():
        raise ChargptError(BROKEN_LOGITS)
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.size(-1)).float()
    # In float64, and after the maximum is taken away, no temperature is so small that it makes ∞ − ∞.
    probabilities = ((logits - likeliest).double() / temperature).softmax(-1)
    if top_k is not None or top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)  # (B, V)
        if top_k is not None:
            ordered[:, top_k:] = 0.0
        if top_p is not None and top_p < 1:  # at 1 rounding must not cut the tail
            before = ordered.cumsum(-1) - ordered  # probability of the likelier tokens
            ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    return (probabilities / probabilities.sum(-1, keepdim=True)).float()


def uniforms(seed: int, samples: int, position: int) -> torch.Tensor:
    """Numbers in [0, 1) for each of `samples` samples at BLOCK positions from `position` on: (BLOCK, samples), float64.

    A function of seed, sample and position alone (Philox with the counter (position, sample, 0, 1)), so a sample is the
    same whatever else is drawn beside it, and however much of it is.
    """
    key = torch.tensor(seed & philox.LOW), torch.tensor(seed >> 32 & philox.LOW)
    counter = (
        torch.arange(position, position + BLOCK)[:, None],
        torch.arange(samples),
        torch.tensor(0),
        torch.tensor(1),  # attention's dropout has 0 here
    )
    high, low, _, _ = philox.philox_4x32(counter, key)
    return ((high << 21) + (low >> 11)).double() * 2.0**-53


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token (B, 1) where the running sum of `probabilities` (B, V) first exceeds `uniform` (B,), each in [0, 1)."""
    reached = probabilities.double().cumsum(-1)  # (B, V)
    wanted = uniform.to(reached)[:, None] * reached[:, -1:]
    token = torch.searchsorted(reached, wanted, right=True)
    last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)  # rounding must not lead behind what can be
    return torch.minimum(token, last)


@torch.no_grad()
def stream_tokens(
    model: LanguageModel,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    keep: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield `max_new_tokens` times the next token (B, 1) after `idx` (B, T); the model sees block_size at most.

    Every token is read once, until the window is full. Then the model goes on with the last `keep` tokens of it (None:
    half of them), which it reads again: so it always sees a window as it was trained on. With keep=block_size the
    window slides, and all of it is read for every token.

    seed: row i is sample i of it, as `uniforms` says
    """
    keep = max(1, model.block_size // 2) if keep is None else min(keep, model.block_size)
    window = unread = idx[:, -model.block_size :]
    cache = model.new_cache()
    for position in range(max_new_tokens):
        if cache.length + unread.size(1) > model.block_size:
            cache.clear()
            unread = window = window[:, -keep:]
        if position % BLOCK == 0:
            numbers = uniforms(seed, len(idx), position)  # (BLOCK, B)
        if position == 0 and idx.stride(0) == 0:  # rows that are one in memory are read as one
            logits = model.logits(model.hidden(unread[:1], cache)[:, -1]).expand(len(idx), -1)
            cache.spread(len(idx))
        else:
            logits = model.logits(model.hidden(unread, cache)[:, -1])  # (B, V)
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p, min_p)  # (B, V)
        unread = draw(probabilities, numbers[position % BLOCK])  # (B, 1)
        window = torch.cat([window, unread], dim=1)
        yield unread


def generate(model: LanguageModel, idx: torch.Tensor, max_new_tokens: int, **options: object) -> torch.Tensor:
    """`idx` (B, T) with `max_new_tokens` more: (B, T + n). Options as in `stream_tokens`."""
    return torch.cat([idx, *stream_tokens(model, idx, max_new_tokens, **options)], dim=1)  # type: ignore[arg-type]


def stream_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig, device: torch.device | str = "cpu"
) -> Iterator[list[str]]:
    """Yield what each of `config.num_samples` continuations of `prompt` gains, token by token.

    A token that ends inside a character gains nothing yet, nor does one with which a stop text may begin. What was held
    back comes at the end. A sample that met a stop text gains nothing more, and when all have, that is the end. Seeded
    by `config.seed`. Raises TokenizerError when the prompt has unknown characters and `config.unknown` is "strict".
    """
    idx = prompt_tokens(tokenizer, prompt, config.unknown).to(device).expand(config.num_samples, -1)  # (B, T)
    return _stream(model, tokenizer, idx, config)  # so that an error of the prompt comes before anything is shown


def _stream(model: LanguageModel, tokenizer: Tokenizer, idx: torch.Tensor, config: SampleConfig) -> Iterator[list[str]]:
    decoders = [tokenizer.decoder() for _ in range(config.num_samples)]
    ends = [Until(config.stop) for _ in range(config.num_samples)]
    for token in _tokens(model, idx, config):
        pieces = [decode(row) for decode, row in zip(decoders, token.cpu().numpy(), strict=True)]
        yield [until(piece) for until, piece in zip(ends, pieces, strict=True)]
        if all(until.reached for until in ends):
            return
    if any(until.held for until in ends):
        yield [until.held for until in ends]


def _tokens(model: LanguageModel, idx: torch.Tensor, config: SampleConfig) -> Iterator[torch.Tensor]:
    """The next tokens (B, 1) after `idx` (B, T), by the engine that `config` names."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "keep")
    options = {name: getattr(config, name) for name in names}
    engine = choose_engine(model, config.engine)
    if engine == "torch":
        return stream_tokens(model, idx, config.max_new_tokens, **options)
    decoder = NativeDecoder(model, len(idx), engine)
    decoder.begin(idx.tolist())
    return decoder.generate(config.max_new_tokens, **options)


def choose_engine(model: LanguageModel, engine: Engine = "auto") -> Literal["torch", "fp32", "bf16", "int8"]:
    """What generates: torch, or C++ with weights in float32 or bfloat16; "auto" takes bfloat16 where C++ can.

    Raises ConfigError when C++ is asked for by name and cannot.
    """
    problem = None if engine == "torch" else why_not(model)
    if engine in ("fp32", "bf16", "int8") and problem is not None:
        raise ConfigError(f"engine {engine} cannot generate here: {problem}; leave it at auto")
    if engine == "auto":
        return "bf16" if problem is None else "torch"
    return engine


class Until:
    """Lets text through up to the first of some texts. What may be the beginning of one is held back.

    The first is the one that is complete first, and of several that end together the longest. So it does not matter in
    which pieces the text comes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held, self.reached = "", False

    def __call__(self, piece: str) -> str:
        """What may be shown now, after `piece` came."""
        if self.reached:
            return ""
        text = self.held + piece
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.held, self.reached = "", True
            _, place = min(found)
            return text[:place]
        length = max((len(stop) for stop in self.stops), default=0)
        begins = next((n for n in range(min(length, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self.held = text[len(text) - begins :]
        return text[: len(text) - begins]

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self.stops)


def generate_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig, device: torch.device | str = "cpu"
) -> list[str]:
    """The prompt and its continuation, `config.num_samples` times. Errors as in `stream_text`."""
    steps = list(stream_text(model, tokenizer, prompt, config, device))
    return [prompt + "".join(step[i] for step in steps) for i in range(config.num_samples)]


def prompt_tokens(tokenizer: Tokenizer, prompt: str, unknown: str = "strict") -> torch.Tensor:
    """Token ids (1, T) to start from; for an empty prompt a newline if the vocabulary has one, else id 0.

    Raises TokenizerError when nothing of the prompt is left to start from.
    """
    if not prompt:
        newline = tokenizer.encode("\n", errors="skip")
        return torch.tensor([[int(newline[0]) if len(newline) else 0]])
    ids = tokenizer.encode(prompt, errors=unknown)  # type: ignore[arg-type]
    if not len(ids):
        raise TokenizerError(f"no character of the prompt {prompt!r} is in the vocabulary; choose another prompt")
    return torch.tensor([ids.tolist()])
