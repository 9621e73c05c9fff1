"""The inputs that every implementation of the kernels is tested on, and the truth for them.

The twins below are written unlike the references in `chargpt/kernels/ops/` on purpose: float64, explicit loops over
heads and rows, probabilities instead of log-softmax, and a Philox in plain Python integers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.errors import ConfigError
from chargpt.kernels import available_backends, resolve


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


@dataclass(frozen=True)
class AttentionCase:
    name: str
    B: int = 2
    H: int = 2
    T: int = 7
    D: int = 8
    S: int | None = None  # None: T
    H_kv: int | None = None  # None: H
    packed: bool = False  # q, k and v are strided views of one (B, T, 3, H, D) projection
    spread: float = 1.0  # standard deviation of q and k
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(
        self, dtype: torch.dtype = torch.float64, draw: int = 0, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as leaves that require gradients, or views of one that does; the same on every device."""
        generator = torch.Generator().manual_seed(_seed(self.name) + draw)
        S, H_kv = self.S or self.T, self.H_kv or self.H
        if self.packed:
            qkv = torch.randn(self.B, self.T, 3, self.H, self.D, generator=generator, dtype=torch.float64)
            qkv = (self.spread * qkv).to(device, dtype).requires_grad_()
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            return q, k, v
        shapes = [(self.B, self.H, self.T, self.D), (self.B, H_kv, S, self.D), (self.B, H_kv, S, self.D)]
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return tuple(x.to(device, dtype).requires_grad_() for x in (self.spread * q, self.spread * k, v))  # type: ignore[return-value]


# T and D: one, two, odd, and on both sides of a power of two, where tiles end. D = 31 does not fill whole vectors.
ATTENTION_CASES = [
    *(AttentionCase(f"T{T}", T=T) for T in (1, 2, 7, 63, 64, 65)),
    *(AttentionCase(f"T{T}", B=1, T=T) for T in (255, 256)),
    AttentionCase("T1000", B=1, H=1, T=1000),
    *(AttentionCase(f"D{D}", D=D, T=9) for D in (1, 8, 16, 31, 32, 64, 80, 128, 256)),
    AttentionCase("one_query_many_keys", T=1, S=70),
    AttentionCase("more_keys_than_queries", T=5, S=66, D=32),
    AttentionCase("grouped_heads", H=6, H_kv=2, T=33),
    AttentionCase("one_kv_head", H=4, H_kv=1, T=17, S=20),
    AttentionCase("window_1", T=65, options={"window": 1}),
    AttentionCase("window_16", T=65, D=32, options={"window": 16}),
    AttentionCase("window_over_all", T=9, options={"window": 100}),
    AttentionCase("window_more_keys_grouped", H=4, H_kv=2, T=7, S=65, options={"window": 3}),
    AttentionCase("scale", T=33, options={"scale": 0.3}),
    AttentionCase("negative_scale", T=33, options={"scale": -1.0}),
    AttentionCase("dropout", T=33, D=32, options={"dropout_p": 0.2}),
    AttentionCase("dropout_more_keys_window_grouped", H=4, H_kv=2, T=7, S=66, options={"dropout_p": 0.7, "window": 9}),
    AttentionCase("packed", T=64, D=32, packed=True),
    AttentionCase("packed_dropout", T=65, D=31, packed=True, options={"dropout_p": 0.1}),
    AttentionCase("sharp", T=64, D=32, spread=8.0),
    AttentionCase("no_batch", B=0),
    AttentionCase("no_queries", T=0, S=3),
    AttentionCase("nothing", T=0),
]
# Not for the GPU's 16-bit kernels: they take lse to the power of 2 and back, which scores of 10⁸ do not survive.
HUGE_ATTENTION = AttentionCase("huge", T=65, D=32, spread=1e4)


@dataclass(frozen=True)
class CrossEntropyCase:
    name: str
    shape: tuple[int, ...] = (6,)
    V: int = 65
    spread: float = 3.0  # standard deviation of the logits
    ignored: float = 0.0  # share of ignored rows
    minus_inf: bool = False  # some logits, none of them a target's, are −inf
    strided: bool = False  # every other column of a wider tensor
    sliced: bool = False  # the first columns of a wider tensor: whole rows, with gaps between them
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype = torch.float64, draw: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """logits as a leaf that requires gradients (or a view of one), and targets; the same on every device."""
        generator = torch.Generator().manual_seed(_seed(self.name) + draw)
        logits = self.spread * torch.randn(*self.shape, self.V, generator=generator, dtype=torch.float64)
        targets = torch.randint(self.V, self.shape, generator=generator)
        if self.minus_inf:
            hidden = torch.rand(logits.shape, generator=generator) < 0.3
            logits = logits.masked_fill(hidden.scatter(-1, targets[..., None], False), -torch.inf)
        rows = torch.rand(self.shape, generator=generator)
        targets = targets.masked_fill(rows < self.ignored, self.options.get("ignore_index", -100)).to(device)
        if self.strided:
            wide = torch.zeros(*self.shape, 2 * self.V, dtype=dtype, device=device)
            wide[..., ::2] = logits
            return wide.requires_grad_()[..., ::2], targets
        if self.sliced:
            wide = torch.zeros(*self.shape, self.V + 7, dtype=dtype, device=device)
            wide[..., : self.V] = logits
            return wide.requires_grad_()[..., : self.V], targets
        return logits.to(device, dtype).requires_grad_(), targets


ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}

# V: one, two, tiny Shakespeare's 65, on both sides of whole vectors (16, 128), GPT-2's odd 50257 and its padded 50304.
# 17 rows are one more than the lanes of the widest vector.
CROSS_ENTROPY_CASES = [
    *(CrossEntropyCase(f"V{V}", V=V) for V in (1, 2, 15, 16, 17, 64, 65, 127, 128, 129, 1000)),
    *(CrossEntropyCase(f"V{V}", shape=(2,), V=V) for V in (50257, 50304)),
    *(CrossEntropyCase(f"everything_V{V}", shape=(17,), V=V, ignored=0.2, options=ALL_OPTIONS) for V in (1, 2, 65)),
    CrossEntropyCase("everything_V50257", shape=(3,), V=50257, ignored=0.3, options=ALL_OPTIONS),
    CrossEntropyCase("all_but_softcap", shape=(17,), ignored=0.2, options={"label_smoothing": 0.1, "z_loss": 0.01}),
    CrossEntropyCase("all_but_softcap_V1000", V=1000, options={"label_smoothing": 0.1, "z_loss": 0.01}),
    CrossEntropyCase("rows_15", shape=(15,)),
    CrossEntropyCase("rows_17", shape=(17,), ignored=0.3),
    CrossEntropyCase("batch_and_time", shape=(3, 5)),
    CrossEntropyCase("one_row_no_dimension", shape=()),
    CrossEntropyCase("some_ignored", shape=(40,), ignored=0.4),
    CrossEntropyCase("some_ignored_none", shape=(5, 8), ignored=0.4, options={"reduction": "none"}),
    CrossEntropyCase("ignore_index_in_range", shape=(40,), V=5, ignored=0.3, options={"ignore_index": 2}),
    CrossEntropyCase("all_ignored", ignored=1.0),
    CrossEntropyCase("all_ignored_everything_on", ignored=1.0, options={"label_smoothing": 0.1, "z_loss": 0.1}),
    CrossEntropyCase("sum", shape=(4, 7), options={"reduction": "sum"}),
    CrossEntropyCase("smoothing", ignored=0.3, options={"label_smoothing": 0.1}),
    CrossEntropyCase("smoothing_1", options={"label_smoothing": 1.0}),
    CrossEntropyCase("z_loss", ignored=0.3, options={"z_loss": 0.01}),
    CrossEntropyCase("softcap", options={"softcap": 5.0}),
    CrossEntropyCase(
        "everything",
        shape=(4, 9),
        V=1000,
        ignored=0.3,
        options={"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "reduction": "none"},
    ),
    CrossEntropyCase("huge", spread=1e4),
    CrossEntropyCase("huge_none", spread=1e4, options={"reduction": "none"}),
    CrossEntropyCase("huge_V1000", V=1000, spread=1e4),
    CrossEntropyCase("huge_softcap", spread=1e4, options={"softcap": 30.0}),
    CrossEntropyCase("minus_inf", minus_inf=True),
    CrossEntropyCase("minus_inf_V1000_none", V=1000, minus_inf=True, options={"reduction": "none"}),
    CrossEntropyCase("minus_inf_V2", shape=(20,), V=2, minus_inf=True),
    CrossEntropyCase("strided", shape=(4, 5), strided=True),
    CrossEntropyCase("sliced", shape=(20,), sliced=True),
    CrossEntropyCase("sliced_batch_V1000", shape=(4, 5), V=1000, sliced=True),
    CrossEntropyCase("no_rows", shape=(0,)),
    CrossEntropyCase("no_rows_none", shape=(2, 0), options={"reduction": "none"}),
]


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


def _seed(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
