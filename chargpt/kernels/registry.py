"""Which implementations of the kernels exist here, which one a call gets, and why.

An implementation is one entry of `IMPLEMENTATIONS`, in order of preference: "auto" takes the first that can serve the
operation on the tensor's device and dtype, and the last, the reference, serves everything.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from chargpt.errors import ConfigError
from chargpt.kernels import native

Operation = Literal["causal_attention", "softmax_cross_entropy"]


@dataclass(frozen=True)
class Implementation:
    """One implementation of both operations."""

    name: str
    summary: str
    module: str | None  # holds a function for each operation; None: not in this version of chargpt
    devices: tuple[str, ...] | None = None  # device types it runs on; None: all
    dtypes: tuple[torch.dtype, ...] | None = None  # dtypes it takes; None: all floating ones
    problem: Callable[[], str | None] = lambda: None  # why it cannot run in this process


def _missing(kind: str) -> Callable[[], str]:
    return lambda: f"this version of chargpt has no {kind} kernels"


IMPLEMENTATIONS = (
    Implementation("cuda", "CUDA C++", None, ("cuda",), problem=_missing("CUDA")),
    Implementation("triton", "Triton", None, ("cuda",), problem=_missing("Triton")),
    Implementation("cpp", "C++ for the CPU", None, ("cpu",), problem=lambda: native.load().problem or _missing("C++")()),
    Implementation("torch", "the reference in PyTorch, on any device", "chargpt.kernels.reference"),
)


@dataclass(frozen=True)
class Choice:
    """What a call gets."""

    name: str  # of the implementation
    reason: str  # why this one, in words


def available_implementations() -> tuple[str, ...]:
    """Names of the implementations that can run in this process, best first. "torch" is always among them."""
    return tuple(entry.name for entry in IMPLEMENTATIONS if entry.problem() is None)


def describe_implementations() -> dict[str, str]:
    """For every known name, best first: "available: …", or "not available: …" with the reason."""
    return {
        entry.name: f"available: {entry.summary}" if (problem := entry.problem()) is None else f"not available: {problem}"
        for entry in IMPLEMENTATIONS
    }


def resolve(operation: Operation, device: torch.device | str, dtype: torch.dtype, impl: str = "auto") -> Choice:
    """The implementation that a call of `operation` with such tensors gets, and why.

    Raises ConfigError when `impl` is unknown, or is asked for by name and cannot serve the call.
    """
    device_type = torch.device(device).type
    refusals = {entry.name: _refusal(entry, device_type, dtype) for entry in IMPLEMENTATIONS}
    if impl == "auto":
        name = next(name for name, refusal in refusals.items() if refusal is None)
        better = list(refusals.items())[: list(refusals).index(name)]
        return Choice(name, "; ".join(f"{other}: {refusal}" for other, refusal in better) or "the preferred one")
    if impl not in refusals:
        raise ConfigError(f"kernels must be auto, {', '.join(refusals)}, got {impl!r}")
    if refusals[impl] is not None:
        raise ConfigError(f"kernels={impl} cannot run {operation}: {refusals[impl]}; use kernels=auto or kernels=torch")
    return Choice(impl, "asked for by name")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def function(operation: Operation, device_type: str, dtype: torch.dtype, impl: str) -> Callable[..., Any]:
    """The function that carries out `operation`; resolved once for each combination. Raises as `resolve` does."""
    return _function(operation, device_type, dtype, impl)


@functools.cache
def _function(operation: Operation, device_type: str, dtype: torch.dtype, impl: str) -> Callable[..., Any]:
    name = resolve(operation, device_type, dtype, impl).name
    module = next(entry.module for entry in IMPLEMENTATIONS if entry.name == name)
    assert module is not None, f"{name} is available but has no module"
    return getattr(importlib.import_module(module), operation)  # type: ignore[no-any-return]


def _refusal(entry: Implementation, device_type: str, dtype: torch.dtype) -> str | None:
    problem = entry.problem()
    if problem is not None:
        return problem
    if entry.devices is not None and device_type not in entry.devices:
        return f"it runs on {' and '.join(entry.devices)}, not on {device_type}"
    if entry.dtypes is not None and dtype not in entry.dtypes:
        return f"it takes {', '.join(str(dtype) for dtype in entry.dtypes)}, not {dtype}"
    return None
