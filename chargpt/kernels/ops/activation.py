"""The activation between the two layers of an MLP: the public function, its reference, and its operators.

torch.compile and torch.func get the reference, which they can look into.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import Operation, OperatorLibrary, only_reference, second_derivative, shape_of

KINDS = ("none", "relu", "relu2", "gelu", "swiglu", "gelu_tanh")  # Activation in csrc/cpu/parts.h has their numbers


def activation(x: Tensor, kind: str, *, impl: str = "auto") -> Tensor:
    """One of these functions, element by element.

    kind: "relu": max(x, 0). "relu2": max(x, 0)² (So et al. 2021, arXiv 2109.08668, section 3). "gelu": x Φ(x), and
        "gelu_tanh": its approximation with tanh (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2). "swiglu":
        silu(gate) · h for x = (gate, h) along its last axis (Shazeer 2020, arXiv 2002.05202, equation 5)
    x: any shape and strides, floating; for "swiglu" (..., 2 W)
    impl: "auto", or the name of an implementation; "cuda" and "triton" have no such kernel and mean the reference
    returns: as x; for "swiglu" (..., W). Computed in float32 for lower precisions.

    Raises ValueError for an unknown kind and an x that does not fit it, ConfigError when `impl` cannot run.
    """
    if kind not in KINDS[1:]:
        raise ValueError(f"kind must be one of {', '.join(KINDS[1:])}, got {kind!r}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if kind == "swiglu" and (x.dim() == 0 or x.shape[-1] % 2):
        raise ValueError(f"x must be (..., 2 W) for swiglu, got {shape_of(x)}")
    chosen = registry.function("activation", x.device.type, x.dtype, impl)
    return chosen(x, kind)  # type: ignore[no-any-return]


def reference(x: Tensor, kind: str) -> Tensor:
    """As `activation`, from checked arguments."""
    with torch.autocast(x.device.type, enabled=False):
        if kind == "relu":
            return F.relu(x)
        if kind == "relu2":
            return F.relu(x).square()
        if kind == "swiglu":
            gate, h = x.chunk(2, dim=-1)
            return F.silu(gate) * h
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels `activation_forward(x, kind) -> y` and `activation_backward(dy, x, kind) -> dx`, where
    `kind` is a number of KINDS."""

    def halves(x: Tensor, kind: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2) if KINDS[kind] == "swiglu" else x.new_empty(x.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.kind = inputs
        ctx.save_for_backward(x)

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *given, ctx.kind = inputs
        ctx.save_for_backward(*given)

    def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dy, x = ctx.saved_tensors
        return *second_derivative(lambda x: reference(x, KINDS[ctx.kind]), dy, x, upstream), None

    library.define(
        "activation",
        "(Tensor x, int kind) -> Tensor",
        lambda *arguments: library.kernels().activation_forward(*arguments),
        halves,
        (save, lambda ctx, dy: (library.ops.activation_backward(dy, *ctx.saved_tensors, ctx.kind), None)),
    )
    library.define(
        "activation_backward",
        "(Tensor gradient, Tensor x, int kind) -> Tensor",
        lambda *arguments: library.kernels().activation_backward(*arguments),
        lambda _, x, kind: x.new_empty(x.shape),
        (save_for_backward, differentiate_backward),
    )

    return lambda x, kind: reference(x, kind) if only_reference(x) else library.ops.activation(x, KINDS.index(kind))


OPERATION = Operation("activation", reference, register, small=True)
