"""What the operations share: an operation, the library of operators that a backend's kernels become, small helpers.

Every backend has the same operators in a namespace of its own, so that two of them can serve one device. An operator is
what torch.compile, fake tensors and dispatch modes can see. Inside torch.func transforms the reference computes,
because they do not look into operators that are registered from Python.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DISABLED = torch._C._disabled_torch_function_impl  # of Parameter, and of tensors that know dispatch alone


@dataclass(frozen=True)
class Operation:
    """One operation as backends see it; the public function stands beside it, in its module."""

    name: str
    reference: Callable[..., Any]  # the specification: takes checked arguments, runs everywhere
    register: Callable[["OperatorLibrary"], Callable[..., Any]]  # defines operators; a function like `reference`
    # Small ones are a compiler's work on a GPU, which fuses the reference. A backend without one leaves it to the
    # reference, also when the backend is asked for by name, so that one name serves a whole model.
    small: bool = False


class OperatorLibrary:
    """The operators `torch.ops.<namespace>.…` of one backend, and functions that take what the references take.

    device: the dispatch key that the kernels serve, "CPU" or "CUDA"
    kernels: gives the kernels, plain functions of tensors that know nothing of autograd; called by every kernel call,
        so that loading can wait for the first one. What they must be, each operation's `register` says.
    gradient_in_forward: whether the forward of cross-entropy can compute the gradient too
    """

    def __init__(
        self,
        namespace: str,
        device: str,
        kernels: Callable[[], Any],
        operations: Sequence[Operation],
        gradient_in_forward: bool = False,
    ) -> None:
        self._library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
        self.device, self.kernels, self.gradient_in_forward = device, kernels, gradient_in_forward
        self.ops = getattr(torch.ops, namespace)
        self._flops: dict[Any, Callable[..., int]] = {}  # by the operator
        self.functions: Mapping[str, Callable[..., Any]] = {one.name: one.register(self) for one in operations}

    def __getitem__(self, operation: str) -> Callable[..., Any]:
        return self.functions[operation]

    def define(
        self,
        name: str,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        """autograd: what to save, and how to differentiate. flops: from the arguments' shapes, for `count_flops`."""
        self._library.define(name + schema)  # type: ignore[no-untyped-call]
        self._library.impl(name, kernel, self.device)  # type: ignore[no-untyped-call]
        qualified = f"{self._library.ns}::{name}"
        torch.library.register_fake(qualified, fake, lib=self._library)
        if autograd is not None:
            save, differentiate = autograd

            def refusing_tangents(ctx: Any, *gradients: Tensor | None) -> Any:
                # Of forward-mode AD, where they come with the gradients alone: they would be lost without a word.
                if any(x is not None and has_tangent(x) for x in gradients):
                    raise NotImplementedError("the kernels' backward has no forward-mode AD; take backend=torch for it")
                return differentiate(ctx, *gradients)

            torch.library.register_autograd(qualified, refusing_tangents, setup_context=save, lib=self._library)
        if flops is not None:
            self._flops[getattr(self.ops, name)] = flops

    def count_flops(self) -> None:
        """Tell torch's FlopCounterMode about the operators, where one listens: the import takes a while."""
        if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
            return
        from torch.utils import _python_dispatch, flop_counter

        for operator, formula in self._flops.items():
            if operator not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(operator)(formula)
        for mode in _python_dispatch._get_current_dispatch_mode_stack():
            if isinstance(counter := getattr(mode, "counter", None), flop_counter.FlopCounterMode):
                for operator in self._flops:  # it took a copy when it was made
                    counter.flop_registry[operator] = flop_counter.flop_registry[operator]


def only_reference(*tensors: Tensor | None) -> bool:
    """Whether operators registered from Python would lose something that torch's own operations keep.

    Inside torch.func transforms and torch.jit.trace, for forward-mode AD's tangents, for layouts other than strides,
    and for subclasses that look at torch's functions, the reference gives what torch gives.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    return any(x is not None and not has_usual_form(x) for x in tensors)


def has_usual_form(x: Tensor) -> bool:
    """Whether a tensor has a usual type, strides and elements, and no tangent.

    Fake tensors, and others that operators know by their dispatch keys, have the usual form. What has no elements has
    no kernel: its results may have some, which nobody would write.
    """
    if not has_usual_type(x) or x.layout is not torch.strided or x.is_quantized or x.is_nested or x.numel() == 0:
        return False
    return not has_tangent(x)


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode AD gave x a tangent."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def is_batched(x: Tensor) -> bool:
    """Whether x stands for several tensors, as in `torch.vmap` and under `is_grads_batched`."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def has_usual_type(x: Tensor) -> bool:
    """Whether no type of its own would look at torch's functions, and want to be the result's."""
    return type(x) is Tensor or type(x).__torch_function__ is DISABLED


def second_derivative(f: Callable[[Tensor], Any], cotangents: Any, x: Tensor, upstream: Tensor) -> tuple[Any, Tensor]:
    """The gradients, with respect to the cotangents and to x, of f's gradient. Rare: they have no kernel."""

    def gradient(cotangents: Any, x: Tensor) -> Tensor:
        return torch.func.vjp(f, x)[1](cotangents)[0]  # type: ignore[no-any-return]

    return torch.func.vjp(gradient, cotangents, x)[1](upstream)  # type: ignore[no-any-return]


def computing_dtype(x: Tensor) -> torch.dtype:
    """What the references compute in, and the dtype of what kernels keep for each row."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))
