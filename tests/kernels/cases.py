"""What every implementation is tested with: the cases of `chargpt/kernels/cases.py`, and the truth for them.

The twins below are written unlike the references in `chargpt/kernels/ops/` on purpose: float64, explicit loops over
heads and rows, probabilities instead of log-softmax, and a Philox in plain Python integers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.errors import ConfigError
from chargpt.kernels import available_backends, resolve
from chargpt.kernels.cases import (
    ALL_OPTIONS,
    ATTENTION_CASES,
    CROSS_ENTROPY_CASES,
    HUGE_ATTENTION,
    AttentionCase,
    CrossEntropyCase,
    case_seed,
)

__all__ = [
    "ALL_OPTIONS",
    "ATTENTION_CASES",
    "CROSS_ENTROPY_CASES",
    "DRAWS",
    "HUGE_ATTENTION",
    "AttentionCase",
    "CrossEntropyCase",
    "assert_as_right_as_torch",
    "case_seed",
    "implementations",
    "kept_share",
    "naive_attention",
    "naive_cross_entropy",
    "naive_keep",
    "naive_philox",
    "torch_attention",
    "torch_cross_entropy",
]


def implementations(operation: str, *dtypes: torch.dtype, device: str = "cpu") -> list[Any]:
    """The implementations that run `operation` here, or pairs of one and a dtype that it takes: for parametrisation."""

    def serves(name: str, dtype: torch.dtype) -> bool:
        try:
            return resolve(operation, device, dtype, name).name == name
        except ConfigError:
            return False

    names = available_backends()
    if not dtypes:
        return [name for name in names if serves(name, torch.float32)]
    return [(name, dtype) for name in names for dtype in dtypes if serves(name, dtype)]


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seed: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """O and lse, row by row: query i attends to the slice of keys it may see."""
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    out, lse = 0 * q, 0 * q[..., 0]
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h * H_kv // H], v[b, h * H_kv // H]
            for i in range(T):
                last = S - T + i
                first = 0 if window is None else max(0, last - window + 1)
                scores = scale * (keys[first : last + 1] @ q[b, h, i])
                top = scores.max()
                weights = (scores - top).exp()
                lse[b, h, i] = top + weights.sum().log()
                p = weights / weights.sum()
                if seed is not None:
                    kept = [naive_keep(seed, dropout_p, b * H + h, last, s) for s in range(first, last + 1)]
                    p = p * p.new_tensor(kept) / kept_share(dropout_p)
                out[b, h, i] = p @ values[first : last + 1]
    return out, lse


def naive_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Row by row; terms with weight zero are left out, so that 0 · ∞ never arises."""
    V = logits.shape[-1]
    losses = []
    counted = 0
    for x, y in zip(logits.reshape(-1, V), targets.reshape(-1).tolist(), strict=True):
        if y == ignore_index:
            losses.append(0 * x[0])
            continue
        counted += 1
        if softcap is not None:
            x = softcap * (x / softcap).tanh()
        top = x.max()
        lse = top + (x - top).exp().sum().log()
        loss = (1 - label_smoothing) * (lse - x[y]) + z_loss * lse * lse
        if label_smoothing > 0:
            loss = loss + label_smoothing * (lse - x).sum() / V
        losses.append(loss)
    per_row = torch.stack(losses) if losses else logits.reshape(-1)
    if reduction == "none":
        return per_row.reshape(targets.shape)
    return per_row.sum() / (max(counted, 1) if reduction == "mean" else 1)


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,  # (B, H, T, S)
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's plain path in the dtype of the inputs: what it loses to rounding is the measure for the others."""
    (T, D), S = q.shape[2:], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    hidden = (distance < 0) | (distance >= (S if window is None else window))
    scores = (q @ k.mT * (1 / math.sqrt(D) if scale is None else scale)).masked_fill(hidden, -torch.inf)
    P = scores.softmax(-1)
    if keep is not None:
        P = P * keep / kept_share(dropout_p)
    return P @ v, scores.logsumexp(-1)


def torch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """F.cross_entropy on float32 logits, and what it lacks beside it."""
    x = logits.float().reshape(-1, logits.shape[-1])
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    y = targets.reshape(-1)
    loss = F.cross_entropy(x, y, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * torch.where(y == ignore_index, 0.0, x.logsumexp(-1) ** 2)
    if reduction == "none":
        return loss.reshape(targets.shape)
    return loss.sum() / (max(1, int((y != ignore_index).sum())) if reduction == "mean" else 1)


def naive_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-7 in Python integers (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0], c[1], c[2], c[3]


def naive_keep(seed: int, p: float, batch_head: int, query: int, key: int) -> bool:
    """Whether dropout keeps the weight at these absolute positions."""
    words = naive_philox((key // 8, query, batch_head, 0), (seed % 2**32, seed // 2**32))
    half = words[key % 8 // 2] >> 16 if key % 2 else words[key % 8 // 2] & 0xFFFF
    return half >= math.floor(p * 2**16)


def kept_share(p: float) -> float:
    """Of the weights: a probability is rounded down to a multiple of 2^-16."""
    return 1 - math.floor(p * 2**16) / 2**16


DRAWS = range(8)  # of inputs, judged together


def assert_as_right_as_torch(name: str, draws: list[tuple[Tensor, Tensor, Tensor]], units: float = 1) -> None:
    """The rule for all numerics: err by at most twice torch's own error, or by one unit in the last place.

    draws: (what is tested, the truth in float64, PyTorch's plain path in the dtype of what is tested)
    units: in the last place, where one is not enough

    "Twice" holds for the root mean square. The largest error may be four times torch's: it is the luck of one element,
    and equally good orders of a float32 sum were seen to differ by 2.6 in it.
    """
    for got, truth, torchs in draws:
        assert got.dtype == torchs.dtype, name
        assert got.shape == truth.shape == torchs.shape, name
    got, truth, torchs = (torch.cat([x.double().reshape(-1) for x in column]) for column in zip(*draws, strict=True))
    if got.numel() == 0:
        return
    assert got.isfinite().all(), name
    spacing = torch.finfo(draws[0][0].dtype).eps
    for measure, factor in ((_root_mean_square, 2), (_largest, 4)):
        error, torch_error = measure(got - truth), measure(torchs - truth)
        if math.isnan(torch_error):  # PyTorch's path overflows: float16 scores of huge inputs
            torch_error = 0.0
        allowed = max(factor * torch_error, units * spacing * measure(truth))
        assert error <= allowed, f"{name}: {measure.__name__[1:]} error {error:.3g}, allowed {allowed:.3g}"


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
