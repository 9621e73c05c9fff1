"""The two operations where the time goes: causal attention and softmax cross-entropy.

The function fixes the mathematics, `impl` chooses who computes it (see registry.py); reference.py is the specification.
"""

import math
from typing import Literal, overload

import torch
from torch import Generator, Tensor

from chargpt.kernels import registry
from chargpt.kernels.registry import available_implementations, describe_implementations, resolve

__all__ = [
    "available_implementations",
    "causal_attention",
    "describe_implementations",
    "resolve",
    "softmax_cross_entropy",
]

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

    Raises ValueError for tensors that do not fit together, ConfigError when `impl` cannot run.
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
