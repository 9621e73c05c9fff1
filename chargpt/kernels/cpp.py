"""The C++ kernels for the CPU, as functions that take what the reference's take.

Plain tensors in eager mode go straight to the native module, which has its own autograd nodes: at the sizes of a small
GPT a trip through Python operators costs as much as the kernel. Whatever needs to see an operator gets one; both run
the same C++.
"""

from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import native, reference
from chargpt.kernels.block_operators import BlockOperators
from chargpt.kernels.operators import MAX_HEAD_SIZE


def _module() -> Any:
    return native.load().module


_OPERATORS = BlockOperators("chargpt", "CPU", _module)  # csrc/bindings.cpp looks its operators up by these names


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    dropout_p: float,
    window: int | None,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `reference.causal_attention`, for float32, bfloat16 and float64 on the CPU; D above 256 is left to it."""
    if q.shape[-1] <= MAX_HEAD_SIZE and not torch.compiler.is_compiling() and _module().is_plain(q, k, v):
        outputs = _module().causal_attention(q, k, v, scale, dropout_p, window, seed)
        return outputs if return_lse else outputs[0]  # type: ignore[no-any-return]
    return _OPERATORS.causal_attention(
        q, k, v, scale=scale, dropout_p=dropout_p, window=window, seed=seed, return_lse=return_lse
    )


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """As `reference.softmax_cross_entropy`, for float32, bfloat16 and float64 logits on the CPU."""
    if not torch.compiler.is_compiling() and _module().is_plain(logits, targets):
        options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
        return _module().softmax_cross_entropy(logits, targets, *options)  # type: ignore[no-any-return]
    return _OPERATORS.softmax_cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )


def add_rms_norm(x: Tensor, y: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`, for float32, bfloat16 and float64 on the CPU.

    y and the norm may be bfloat16 beside a float32 x; other mixtures are left to the reference, and so is
    torch.compile, which fuses it.
    """
    if torch.compiler.is_compiling() or not _same_or_half(x.dtype, x.dtype if y is None else y.dtype, dtype):
        return reference.add_rms_norm(x, y, dtype=dtype)
    if _module().is_plain(x) if y is None else _module().is_plain(x, y):
        return _module().add_rms_norm(x, y, dtype)  # type: ignore[no-any-return]
    return _OPERATORS.add_rms_norm(x, y, dtype=dtype)


def qkv_heads(
    qkv: Tensor,
    value_rows: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    n_head: int,
    n_kv_head: int,
    qk_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.qkv_heads`, for float32, bfloat16 and float64 on the CPU.

    Value rows that are neither of the dtype of qkv nor float32 beside a bfloat16 qkv are cast before; torch.compile is
    left to the reference, which it fuses.
    """
    options: Any = {"n_head": n_head, "n_kv_head": n_kv_head, "qk_norm": qk_norm}
    if torch.compiler.is_compiling():
        return reference.qkv_heads(qkv, value_rows, cos, sin, **options)
    if value_rows is not None and not _same_or_half(value_rows.dtype, qkv.dtype):
        value_rows = value_rows.to(qkv.dtype)
    if _module().is_plain(*(x for x in (qkv, value_rows, cos, sin) if x is not None)):
        return _module().qkv_heads(qkv, value_rows, cos, sin, n_head, n_kv_head, qk_norm)  # type: ignore[no-any-return]
    return _OPERATORS.qkv_heads(qkv, value_rows, cos, sin, **options)


def relu_squared(x: Tensor) -> Tensor:
    """As `reference.relu_squared`, for float32, bfloat16 and float64 on the CPU; torch.compile is left to it."""
    if torch.compiler.is_compiling():
        return reference.relu_squared(x)
    return _module().relu_squared(x) if _module().is_plain(x) else _OPERATORS.relu_squared(x)


def _same_or_half(dtype: torch.dtype, *others: torch.dtype) -> bool:
    """Whether the kernels take these dtypes beside `dtype`: each the same, or bfloat16 beside float32."""
    return all(x == dtype or (dtype == torch.float32 and x == torch.bfloat16) for x in others)
