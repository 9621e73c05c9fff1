"""The C++ kernels for the CPU, as functions that take what the reference's take.

Plain tensors in eager mode go straight to the native module, which has its own autograd nodes: at the sizes of a small
GPT a trip through Python operators costs as much as the kernel. Whatever needs to see an operator gets one; both run
the same C++.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import native
from chargpt.kernels.ops import OPERATIONS, linear_cross_entropy
from chargpt.kernels.ops.activation import KINDS
from chargpt.kernels.ops.add_norm import NORMS
from chargpt.kernels.ops.attention import MAX_HEAD_SIZE
from chargpt.kernels.ops.common import OperatorLibrary, has_usual_type
from chargpt.kernels.ops.cross_entropy import NAMES, losses_and_gradient


def _module() -> Any:
    return native.load().module


LIBRARY = OperatorLibrary("chargpt", "CPU", _module, [*OPERATIONS.values()])  # csrc looks these names up


def _natively(*tensors: Tensor | None) -> bool:
    """Whether the module may take these tensors as they are."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if x is not None]
    return all(map(has_usual_type, given)) and _module().is_plain(*given)


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
    """As the reference, for float32, bfloat16 and float64 on the CPU; D above 256 is left to it."""
    if q.shape[-1] <= MAX_HEAD_SIZE and _natively(q, k, v):
        outputs = _module().causal_attention(q, k, v, scale, dropout_p, window, seed)
        return outputs if return_lse else outputs[0]  # type: ignore[no-any-return]
    return LIBRARY["causal_attention"](  # type: ignore[no-any-return]
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
    """As the reference, for float32, bfloat16 and float64 logits on the CPU."""
    if _natively(logits, targets):
        options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
        return _module().softmax_cross_entropy(logits, targets, *options)  # type: ignore[no-any-return]
    return LIBRARY["softmax_cross_entropy"](  # type: ignore[no-any-return]
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )


def softmax_cross_entropy_gradient_(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As `losses_and_gradient`; the gradient takes the place of the logits, which are contiguous."""
    if _natively(logits, targets):
        values = (options[name] for name in NAMES if name != "reduction")
        return _module().softmax_cross_entropy_gradient_(logits, targets, *values), logits
    return losses_and_gradient(softmax_cross_entropy, logits, targets, **options)


def add_transposed_product_(c: Tensor, a: Tensor, b: Tensor) -> None:
    """As the operation's own, without a rounding between: for bfloat16 a and b, and a float32 c."""
    if c.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16 and _natively(c, a, b):
        _module().add_transposed_product_(c, a, b)
    else:
        linear_cross_entropy.add_transposed_product_(c, a, b)


def add_norm(
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As the reference, for float32, bfloat16 and float64 on the CPU.

    y and the norm may be bfloat16 beside a float32 x; other mixtures are left to the reference, and so is
    torch.compile, which fuses it.
    """
    stream = y if x is None else x
    assert stream is not None
    options: Any = {"norm": norm, "dropout_p": dropout_p, "seed": seed, "dtype": dtype}
    taken = _same_or_half(stream.dtype, stream.dtype if y is None else y.dtype, dtype)
    if torch.compiler.is_compiling() or not taken:
        return OPERATIONS["add_norm"].reference(x, y, weight, bias, **options)  # type: ignore[no-any-return]
    if _natively(x, y, weight, bias, seed):
        return _module().add_norm(x, y, weight, bias, NORMS.index(norm), dropout_p, seed, dtype)  # type: ignore[no-any-return]
    return LIBRARY["add_norm"](x, y, weight, bias, **options)  # type: ignore[no-any-return]


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
    """As the reference, for float32, bfloat16 and float64 on the CPU.

    Value rows that are neither of the dtype of qkv nor float32 beside a bfloat16 qkv are cast before; torch.compile is
    left to the reference, which it fuses.
    """
    options: Any = {"n_head": n_head, "n_kv_head": n_kv_head, "qk_norm": qk_norm}
    if torch.compiler.is_compiling():
        return OPERATIONS["qkv_heads"].reference(qkv, value_rows, cos, sin, **options)  # type: ignore[no-any-return]
    if value_rows is not None and not _same_or_half(value_rows.dtype, qkv.dtype):
        value_rows = value_rows.to(qkv.dtype)
    if _natively(qkv, value_rows, cos, sin):
        return _module().qkv_heads(qkv, value_rows, cos, sin, n_head, n_kv_head, qk_norm)  # type: ignore[no-any-return]
    return LIBRARY["qkv_heads"](qkv, value_rows, cos, sin, **options)  # type: ignore[no-any-return]


def activation(x: Tensor, kind: str) -> Tensor:
    """As the reference, for float32, bfloat16 and float64 on the CPU; torch.compile is left to it."""
    if torch.compiler.is_compiling():
        return OPERATIONS["activation"].reference(x, kind)  # type: ignore[no-any-return]
    if _natively(x):
        return _module().activation(x, KINDS.index(kind))  # type: ignore[no-any-return]
    return LIBRARY["activation"](x, kind)  # type: ignore[no-any-return]


def _same_or_half(dtype: torch.dtype, *others: torch.dtype) -> bool:
    """Whether the kernels take these dtypes beside `dtype`: each the same, or bfloat16 beside float32."""
    return all(x == dtype or (dtype == torch.float32 and x == torch.bfloat16) for x in others)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_attention": causal_attention,
    "softmax_cross_entropy": softmax_cross_entropy,
    "softmax_cross_entropy_gradient_": softmax_cross_entropy_gradient_,
    "add_transposed_product_": add_transposed_product_,
    "add_norm": add_norm,
    "qkv_heads": qkv_heads,
    "activation": activation,
}
