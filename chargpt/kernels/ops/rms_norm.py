"""The addition to the residual stream and RMSNorm in one: the public function, its reference, and its operators.

torch.compile and torch.func get the reference, which they can look into.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import (
    Operation,
    OperatorLibrary,
    computing_dtype,
    only_reference,
    second_derivative,
    shape_of,
)

RMS_EPS = 1e-6  # added to the mean square of a row before it divides
_HALVES = (torch.bfloat16, torch.float16)


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
    _check(x, y)
    in_region = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if in_region else x.dtype
    chosen = registry.function("add_rms_norm", x.device.type, x.dtype, impl)
    return chosen(x, y, dtype=dtype)  # type: ignore[no-any-return]


def _check(x: Tensor, y: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., C) with C at least 1, got {shape_of(x)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if y is None:
        return
    if y.shape != x.shape:
        raise ValueError(f"x and y must have one shape, got {shape_of(x)} and {shape_of(y)}")
    if y.dtype != x.dtype and y.dtype not in _HALVES:
        raise ValueError(f"y must have the dtype of x, bfloat16 or float16, got {y.dtype} beside {x.dtype}")
    if y.device != x.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}")


# ------------------------------------------------------------------------------------------------------------ reference


def reference(x: Tensor, y: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s = x + y, and s / sqrt(mean(s²) + ε) over the last axis. Zhang & Sennrich 2019, arXiv 1910.07467, equation 4.

    x, y: (..., C)
    returns: s in the dtype of x, rounded before it is normalised; the norm in `dtype`, computed in the computing dtype
    """
    with torch.autocast(x.device.type, enabled=False):
        s = x if y is None else (x + y).to(x.dtype)
        return s, rms_norm(s.to(computing_dtype(s))).to(dtype)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last axis, in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


# ------------------------------------------------------------------------------------------------------------ operators


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels `rms_norm_forward(x, dtype) -> normed, rstd` and
    `rms_norm_backward(dnormed, x, rstd) -> dx`."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    def differentiate(ctx: Any, dnormed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return library.ops.rms_norm_backward(dnormed, *ctx.saved_tensors), None

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dnormed, x = ctx.saved_tensors
        return *second_derivative(lambda x: reference(x, None, dtype=dnormed.dtype)[1], dnormed, x, upstream), None

    library.define(
        "rms_norm",
        "(Tensor x, ScalarType dtype) -> (Tensor normed, Tensor rstd)",
        lambda x, dtype: library.kernels().rms_norm_forward(x, dtype),
        lambda x, dtype: (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(x.numel() // x.shape[-1], dtype=computing_dtype(x)),
        ),
        (save, differentiate),
    )
    library.define(
        "rms_norm_backward",
        "(Tensor normed_gradient, Tensor x, Tensor rstd) -> Tensor",
        lambda *arguments: library.kernels().rms_norm_backward(*arguments),
        lambda _, x, __: x.new_empty(x.shape),
        (save_for_backward, differentiate_backward),
    )

    def add(x: Tensor, y: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `reference`. The addition is torch's: an operator must not return its argument x."""
        if only_reference(x, y):
            return reference(x, y, dtype=dtype)
        s = x if y is None else (x + y).to(x.dtype)
        return s, library.ops.rms_norm(s, dtype)[0]

    return add


OPERATION = Operation("add_rms_norm", reference, register, small=True)
