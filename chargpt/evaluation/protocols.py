"""Protocols for the loss, in nats per token; none of them touches the randomness of training.

`full` scores every token exactly once in windows side by side: deterministic, and the number we choose by. `sliding`
does the same with more context for each token. `nanogpt` averages random windows, for comparison with numbers that
others published. `dynamic` (dynamic.py) lets the model learn from what it has been scored on: it is to be compared with
numbers of its kind alone.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from chargpt.config import EvaluationConfig
from chargpt.data import Tokens, random_batch, require_known
from chargpt.errors import CorpusError
from chargpt.evaluation.dynamic import dynamic_loss
from chargpt.models import LanguageModel

PROTOCOLS = ("full", "sliding", "nanogpt")  # of a model that stays as it is
TOKENS_PER_PASS = 8_192  # in one forward pass of `full` and `sliding`: bounds the memory, changes nothing else


def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    config: EvaluationConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    protocols: Sequence[str] = PROTOCOLS,
) -> dict[str, float]:
    """The loss on `tokens` (N,) by each of `protocols`, `dynamic` too where it is asked for.

    Raises CorpusError when N is too small for one of them, or an id is outside the model's vocabulary.
    """
    require_known(tokens, model.vocab_size)
    losses = {
        "full": lambda: full_loss(model, tokens, device),
        "sliding": lambda: sliding_loss(model, tokens, config.sliding_stride, device),
        "nanogpt": lambda: nanogpt_loss(model, tokens, config, batch_size, device),
        "dynamic": lambda: dynamic_loss(model, tokens, device),
    }
    return {protocol: losses[protocol]() for protocol in protocols}


def full_loss(model: LanguageModel, tokens: Tokens, device: torch.device | str = "cpu") -> float:
    """Mean loss over tokens[1:] of `tokens` (N,), each scored once, in non-overlapping windows of block_size."""
    return sliding_loss(model, tokens, stride=model.block_size, device=device)


@torch.no_grad()
def sliding_loss(model: LanguageModel, tokens: Tokens, stride: int, device: torch.device | str = "cpu") -> float:
    """Mean loss over tokens[1:] of `tokens` (N,), each scored once: windows of block_size move by `stride`.

    Each window scores only the tokens that no earlier one did, so a token sees at least block_size − stride of
    context once there is that much. A stride above block_size counts as block_size. The sum is in float64.
    """
    total, scored = 0.0, 0
    with evaluating(model):
        for idx, targets in _sliding_batches(tokens, model.block_size, min(stride, model.block_size)):
            targets = targets.to(device)
            losses = model(idx.to(device), targets, reduction="none")  # (B, T)
            total += losses.double().sum().item()
            scored += int((targets >= 0).sum())
    return total / scored


@torch.no_grad()
def token_logits(
    model: LanguageModel, tokens: Tokens, stride: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits (n, V) before tokens[1:] of `tokens` (N,), and these tokens (n,): as `sliding_loss` sees them."""
    with evaluating(model):
        for idx, targets in _sliding_batches(tokens, model.block_size, min(stride, model.block_size)):
            scored = targets >= 0  # (B, T)
            hidden = model.hidden(idx.to(device))[scored.to(device)]  # (n, C)
            yield model.logits(hidden).float().cpu(), targets[scored]


@torch.no_grad()
def nanogpt_loss(
    model: LanguageModel,
    tokens: Tokens,
    config: EvaluationConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> float:
    """Mean loss over `config.nanogpt_batches` batches of random windows, from a generator seeded by `config.seed`."""
    if len(tokens) <= model.block_size:
        raise CorpusError(
            f"random windows of {model.block_size} tokens need a text of at least {model.block_size + 1}, "
            f"got {len(tokens)}; choose the protocol full"
        )
    generator = torch.Generator().manual_seed(config.seed)
    total = 0.0
    with evaluating(model):
        for _ in range(config.nanogpt_batches):
            idx, targets = random_batch(tokens, batch_size, model.block_size, generator)
            total += model(idx.to(device), targets.to(device)).item()
    return total / config.nanogpt_batches


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of text, which compares models with different tokenizers."""
    return loss / math.log(2) / bytes_per_token


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode inside the block (no dropout), the former mode after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _sliding_batches(tokens: Tokens, block_size: int, stride: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows (B, block_size) and their targets, where targets that an earlier window scored are −100 (ignored)."""
    n = len(tokens) - 1  # targets to score
    if n < 1:
        raise ValueError("at least two tokens are needed to score one")
    # The last window is moved back to end at the last target, and everything scored before it is ignored.
    length = min(block_size, n)
    starts = np.unique(np.minimum(np.arange(0, n - length + stride, stride), n - length))
    first_unscored = np.concatenate([[0], starts[:-1] + length])  # target positions
    per_pass = max(1, TOKENS_PER_PASS // block_size)
    for i in range(0, len(starts), per_pass):
        positions = starts[i : i + per_pass, None] + np.arange(length)  # (B, T)
        targets = tokens[positions + 1].astype(np.int64)
        targets[positions < first_unscored[i : i + per_pass, None]] = -100
        yield torch.from_numpy(tokens[positions].astype(np.int64)), torch.from_numpy(targets)
