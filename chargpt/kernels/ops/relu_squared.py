"""The square of ReLU: the public function, its reference, and its operators.

torch.compile and torch.func get the reference, which they can look into.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.common import Operation, OperatorLibrary, only_reference, second_derivative


def relu_squared(x: Tensor, *, impl: str = "auto") -> Tensor:
    """max(x, 0)², the activation of So et al. 2021, arXiv 2109.08668.

    x: any shape and strides, floating
    impl: "auto", or the name of an implementation; "cuda" and "triton" have no such kernel and mean the reference
    returns: as x

    Raises ValueError for an x that is not floating, ConfigError when `impl` cannot run.
    """
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    chosen = registry.function("relu_squared", x.device.type, x.dtype, impl)
    return chosen(x)  # type: ignore[no-any-return]


def reference(x: Tensor) -> Tensor:
    """max(x, 0)². So et al. 2021, arXiv 2109.08668, section 3."""
    with torch.autocast(x.device.type, enabled=False):
        return F.relu(x).square()


def register(library: OperatorLibrary) -> Any:
    """Operators over the kernels `relu_squared_forward(x) -> y` and `relu_squared_backward(dy, x) -> dx`."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        dy, x = ctx.saved_tensors
        return second_derivative(reference, dy, x, upstream)

    library.define(
        "relu_squared",
        "(Tensor x) -> Tensor",
        lambda x: library.kernels().relu_squared_forward(x),
        lambda x: x.new_empty(x.shape),
        (save, lambda ctx, dy: library.ops.relu_squared_backward(dy, *ctx.saved_tensors)),
    )
    library.define(
        "relu_squared_backward",
        "(Tensor gradient, Tensor x) -> Tensor",
        lambda *arguments: library.kernels().relu_squared_backward(*arguments),
        lambda _, x: x.new_empty(x.shape),
        (save, differentiate_backward),
    )

    return lambda x: reference(x) if only_reference(x) else library.ops.relu_squared(x)


OPERATION = Operation("relu_squared", reference, register, small=True)
