"""Drawing tokens, as small pure functions: logits to probabilities, probabilities to a token, and the loop around them.

The one idea to know: the model reads each token once, into a cache, and goes on with the last half of a full window.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from chargpt.config import SampleConfig
from chargpt.errors import ChargptError
from chargpt.generation.graph import reader
from chargpt.kernels import philox
from chargpt.models import LanguageModel

BROKEN_LOGITS = "the model's logits are not finite numbers: its weights are broken; use another checkpoint"
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


class Drawn(NamedTuple):
    """The next tokens of B samples, n of each."""

    tokens: torch.Tensor  # (n, B), int64
    logprobs: torch.Tensor  # (n, B), float32: ln p of each by the model alone, before temperature, cuts and bias
    logits: torch.Tensor | None = None  # (n, B, V), where they are wanted


@torch.no_grad()
def stream_tokens(
    model: LanguageModel, idx: torch.Tensor, config: SampleConfig, bias: torch.Tensor | None = None
) -> Iterator[Drawn]:
    """Yield `config.max_new_tokens` times the next token (1, B) after `idx` (B, T); the model sees block_size at most.

    Every token is read once, until the window is full. Then the model goes on with the last `config.keep` tokens of it
    (None: half of them), which it reads again: so it always sees a window as it was trained on. With keep=block_size
    the window slides, and all of it is read for every token. Row i is sample i of `config.seed`, as `uniforms` says.

    bias: (V,), added to the logits before a token is drawn
    """
    keep = max(1, model.block_size // 2) if config.keep is None else min(config.keep, model.block_size)
    window = unread = idx[:, -model.block_size :]
    cache = model.new_cache()
    read = reader(model, cache)
    for position in range(config.max_new_tokens):
        if cache.length + unread.size(1) > model.block_size:
            cache.clear()
            unread = window = window[:, -keep:]
        if position % BLOCK == 0:
            numbers = uniforms(config.seed, len(idx), position)  # (BLOCK, B)
        if position == 0 and idx.stride(0) == 0:  # rows that are one in memory are read as one
            logits = model.logits(model.hidden(unread[:1], cache)[:, -1]).expand(len(idx), -1)
            cache.spread(len(idx))
        else:
            logits = read(unread)  # (B, V)
        probabilities = next_token_probabilities(
            logits if bias is None else logits + bias, config.temperature, config.top_k, config.top_p, config.min_p
        )  # (B, V)
        unread = draw(probabilities, numbers[position % BLOCK])  # (B, 1)
        window = torch.cat([window, unread], dim=1)
        yield Drawn(unread.T, logits.float().log_softmax(-1).gather(-1, unread).T, logits[None])


def generate(model: LanguageModel, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
    """`idx` (B, T) with `max_new_tokens` more, drawn in torch: (B, T + n). options: as SampleConfig has them."""
    drawn = stream_tokens(model, idx, SampleConfig(max_new_tokens=max_new_tokens, **options))
    return torch.cat([idx, *(step.tokens.T for step in drawn)], dim=1)
