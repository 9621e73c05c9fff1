"""The C++ kernels for the CPU, as functions that take what the reference's take.

Plain tensors in eager mode go straight to the native module, which has its own autograd nodes: at the sizes of a small
GPT a trip through Python operators costs as much as the kernel. Whatever needs to see an operator gets one; both run
the same C++.
"""

from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import native
from chargpt.kernels.operators import MAX_HEAD_SIZE, Operators


def _module() -> Any:
    return native.load().module


_OPERATORS = Operators("chargpt", "CPU", _module)  # csrc/bindings.cpp looks its operators up by these names


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
