"""The operations where the time goes: causal attention, softmax cross-entropy, and a block's small passes over memory.

The function fixes the mathematics, `impl` chooses who computes it (see registry.py); reference.py is the specification.
"""

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from chargpt.kernels import registry
from chargpt.kernels.registry import available_implementations, describe_implementations, resolve

__all__ = [
    "add_rms_norm",
    "available_implementations",
    "causal_attention",
    "describe_implementations",
    "linear_cross_entropy",
    "qkv_heads",
    "relu_squared",
    "resolve",
    "softmax_cross_entropy",
]

_HALVES = (torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    dropout_p: float = ...,
    window: int | None = ...,
    generator: Generator | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    dropout_p: float = ...,
    window: int | None = ...,
    generator: Generator | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    generator: Generator | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal scaled dot-product attention (Vaswani et al. 2017, equation 1), with grouped key and value heads.

    q: (B, H, T, D), floating; any strides
    k, v: (B, H_kv, S, D), H a multiple of H_kv: query head h reads key and value head h // (H / H_kv); S ≥ T ≥ 0.
        Queries and keys are aligned at the end: query i sees the keys up to S − T + i.
    scale: factor on q·k; None: 1 / √D
    dropout_p: probability in [0, 1) that an attention weight is dropped, after the softmax; others grow by 1 / (1 − p)
    window: each query sees only the last `window` of its keys, itself included; None: all
    generator: the CPU generator that dropout draws its 64-bit seed from; None: torch's default one. The mask is a
        function of that seed and of positions alone (`philox.dropout_keep_mask`), so it is the same on every device
        and in every implementation. Nothing is drawn when dropout_p is 0.
    return_lse: also return, for each query, the natural logarithm of Σ exp(scaled scores), before dropout
    impl: "auto", or the name of an implementation
    returns: O (B, H, T, D) in the dtype of q; with return_lse also lse (B, H, T) in float32, or float64 for float64

    bfloat16, float16 and float32 are accumulated in float32, inside autocast regions too. There q, k and v may have
    different dtypes (a normalised q beside a v from a linear layer): then all three are cast to the region's dtype.

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run, RuntimeError when a CUDA
    graph would capture dropout, in either pass: the seed is read on the host, so replays would repeat one mask.
    """
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_attention(q, k, v, dropout_p, window)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (), generator=generator)
    chosen = registry.IMPLEMENTATIONS[registry.choose("causal_attention", q.device.type, q.dtype, impl)]
    assert chosen.causal_attention is not None
    return chosen.causal_attention(  # type: ignore[no-any-return]
        q,
        k,
        v,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        dropout_p=dropout_p,
        window=window,
        seed=seed,
        return_lse=return_lse,
    )


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of softmax(logits) against integer targets: −log softmax(x)[target] for each row x.

    logits: (..., V), floating
    targets: (...), integer, in [0, V) or equal to ignore_index
    ignore_index: rows with this target have loss 0 and gradient 0 (if their logits have a softmax at all)
    label_smoothing: in [0, 1]; the target distribution is (1 − ε) · one-hot + ε / V, as torch defines it
    z_loss: adds z_loss · lse² to each row, lse = log Σ exp(x), which keeps the normaliser near 1 (Chowdhery et al.
        2022, section 5)
    softcap: the logits x become c · tanh(x / c) first (Gemma 2, section 2)
    reduction: "none": (...); "sum"; "mean": the sum divided by the number of rows that are not ignored. Where there
        is no such row the mean is 0 with gradient 0, so that an empty batch changes nothing (torch gives NaN).
    impl: "auto", or the name of an implementation
    returns: float32, or float64 for float64 logits

    Raises IndexError for a target out of range on the CPU; on a GPU, which nobody waits for, the CUDA and Triton
    kernels make its row's loss and gradient NaN, and the reference's device asserts. ValueError for tensors that do
    not fit together, ConfigError when `impl` cannot run.
    """
    _check_cross_entropy(logits, targets, label_smoothing, z_loss, softcap, reduction)
    chosen = registry.IMPLEMENTATIONS[registry.choose("softmax_cross_entropy", logits.device.type, logits.dtype, impl)]
    assert chosen.softmax_cross_entropy is not None
    try:
        return chosen.softmax_cross_entropy(  # type: ignore[no-any-return]
            logits,
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
        )
    except (IndexError, RuntimeError):
        if targets.device.type == "cpu":
            _check_targets(targets, logits.shape[-1], ignore_index)
        raise


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """The loss of a model's head: `softmax_cross_entropy` of the logits `h @ weight.T + bias`.

    h: (..., C), floating: hidden states
    weight: (V, C), floating; bias: (V,) or None
    targets, softcap, reduction, impl: as in `softmax_cross_entropy`
    returns: float32, or float64 for float64 logits

    Whoever needs the loss alone calls this, so that one day no implementation need ever make the (..., V) logits.
    Raises as `softmax_cross_entropy` does.
    """
    return softmax_cross_entropy(F.linear(h, weight, bias), targets, softcap=softcap, reduction=reduction, impl=impl)


def add_rms_norm(x: Tensor, y: Tensor | None = None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: s = x + y and s / sqrt(mean(s²) + 10⁻⁶).

    The mean runs over the last axis; there is no gain (Zhang & Sennrich 2019, arXiv 1910.07467, equation 4).

    x: (..., C), floating; any strides
    y: as x, in its dtype, bfloat16 or float16; None: nothing is added, and the first result is x itself
    impl: "auto", or the name of an implementation; "cuda" and "triton" have no such kernel and mean the reference
    returns: s in the dtype of x; the norm, computed in float32 (float64 for float64), in the autocast region's dtype
        where there is one and x is not float64, else in the dtype of x

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run.
    """
    _check_add_rms_norm(x, y)
    in_region = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if in_region else x.dtype
    chosen = registry.IMPLEMENTATIONS[registry.choose("add_rms_norm", x.device.type, x.dtype, impl)]
    assert chosen.add_rms_norm is not None
    return chosen.add_rms_norm(x, y, dtype=dtype)  # type: ignore[no-any-return]


def qkv_heads(
    qkv: Tensor,
    value_rows: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    n_head: int,
    n_kv_head: int,
    qk_norm: bool,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for `causal_attention` from the packed projection, normalised and rotated in one pass.

    qkv: (B, T, (H + 2 H_kv) D), floating: the heads of q, then of k, then of v; any strides
    value_rows: (B, T, H_kv D), floating: added to v
    cos, sin: (T', D/2) in float32 with T' ≥ T: position t turns channels i and i + D/2 of each head of q and k by the
        angle of row t (Su et al. 2021, arXiv 2104.09864, equation 34). They get no gradient. None: no rotation
    n_head, n_kv_head: H and H_kv
    qk_norm: divide each head of q and k by sqrt(mean over D of its squares + 10⁻⁶), before it is rotated
    impl: "auto", or the name of an implementation; "cuda" and "triton" have no such kernel and mean the reference
    returns: q (B, H, T, D), k and v (B, H_kv, T, D), in the dtype of qkv, computed in float32 (float64 for float64)
        and rounded once. They may share memory with qkv, so do not write into them.

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run.
    """
    _check_qkv_heads(qkv, value_rows, cos, sin, n_head, n_kv_head)
    chosen = registry.IMPLEMENTATIONS[registry.choose("qkv_heads", qkv.device.type, qkv.dtype, impl)]
    assert chosen.qkv_heads is not None
    return chosen.qkv_heads(  # type: ignore[no-any-return]
        qkv, value_rows, cos, sin, n_head=n_head, n_kv_head=n_kv_head, qk_norm=qk_norm
    )


def relu_squared(x: Tensor, *, impl: str = "auto") -> Tensor:
    """max(x, 0)², the activation of So et al. 2021, arXiv 2109.08668.

    x: any shape and strides, floating
    impl: "auto", or the name of an implementation; "cuda" and "triton" have no such kernel and mean the reference
    returns: as x

    Raises ValueError for an x that is not floating, ConfigError when `impl` cannot run.
    """
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    chosen = registry.IMPLEMENTATIONS[registry.choose("relu_squared", x.device.type, x.dtype, impl)]
    assert chosen.relu_squared is not None
    return chosen.relu_squared(x)  # type: ignore[no-any-return]


def _check_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, window: int | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q must be (B, H, T, D) and k (B, H_kv, S, D), got {_shape(q)} and {_shape(k)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got k {_shape(k)} and v {_shape(v)}")
    B, H, T, D = q.shape
    B_k, H_kv, S, D_k = k.shape
    if B_k != B or D_k != D or D == 0:
        raise ValueError(f"q and k must agree in B and D, and D be at least 1, got q {_shape(q)} and k {_shape(k)}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {H} and {H_kv}")
    if S < T:
        raise ValueError(f"k must have at least as many positions as q, got S={S} and T={T}")
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")


def _check_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be (..., V) with V at least 1 and targets (...), got {_shape(logits)} and {_shape(targets)}"
        )
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits must have a floating dtype, got {logits.dtype}")
    if targets.dtype not in _INTEGERS:
        raise ValueError(f"targets must have an integer dtype, got {targets.dtype}")
    if logits.device != targets.device:
        raise ValueError(f"logits and targets must be on one device, got {logits.device} and {targets.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")


def _check_add_rms_norm(x: Tensor, y: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., C) with C at least 1, got {_shape(x)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if y is None:
        return
    if y.shape != x.shape:
        raise ValueError(f"x and y must have one shape, got {_shape(x)} and {_shape(y)}")
    if y.dtype != x.dtype and y.dtype not in _HALVES:
        raise ValueError(f"y must have the dtype of x, bfloat16 or float16, got {y.dtype} beside {x.dtype}")
    if y.device != x.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}")


def _check_qkv_heads(
    qkv: Tensor, value_rows: Tensor | None, cos: Tensor | None, sin: Tensor | None, n_head: int, n_kv_head: int
) -> None:
    if n_head < 1 or n_kv_head < 1:
        raise ValueError(f"n_head and n_kv_head must be at least 1, got {n_head} and {n_kv_head}")
    heads = n_head + 2 * n_kv_head
    if qkv.dim() != 3 or qkv.shape[2] == 0 or qkv.shape[2] % heads:
        raise ValueError(f"qkv must be (B, T, {heads} D) with D at least 1, got {_shape(qkv)}")
    B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // heads
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"qkv must have a floating dtype, got {qkv.dtype}")
    if value_rows is not None:
        if value_rows.shape != (B, T, n_kv_head * D) or not value_rows.dtype.is_floating_point:
            raise ValueError(
                f"value_rows must be floating {(B, T, n_kv_head * D)} beside qkv {_shape(qkv)}, "
                f"got {value_rows.dtype} {_shape(value_rows)}"
            )
        if value_rows.device != qkv.device:
            raise ValueError(f"qkv and value_rows must be on one device, got {qkv.device} and {value_rows.device}")
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("cos and sin must be given together")
    if D % 2 or cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] < T or cos.shape[1] != D // 2:
        raise ValueError(
            f"cos and sin must be (at least {T}, D/2) with D={D} even, got {_shape(cos)} and {_shape(sin)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or not cos.device == sin.device == qkv.device:
        raise ValueError(
            f"cos and sin must be float32 on the device of qkv, {qkv.device}, "
            f"got {cos.dtype} on {cos.device} and {sin.dtype} on {sin.device}"
        )


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    """Name the first target out of range. Called only after an implementation has failed, so it costs nothing."""
    bad = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"targets must be in [0, {V}) or ignore_index={ignore_index}, "
            f"got {int(targets[position])} at position {position}"
        ) from None


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
