"""Which implementations of the kernels exist here, which one a call gets, and why.

An implementation is one entry of `IMPLEMENTATIONS`, in order of preference: "auto" takes the first that can serve the
operation on the tensor's device and dtype, and the last, the reference, serves everything.

On a GPU "auto" takes only what has passed all checks on that kind of GPU, as recorded in proven.json; any other
implementation that can run there computes when it is asked for by name. The order prefers CUDA to Triton. This is
reasoned, not measured. The CUDA kernels are made for what this project trains: up to 512 positions they keep a head's
keys and values in shared memory, and they compile before a run, not in its first steps. From some 1024 positions on,
with heads of 64 channels and more, Triton should be faster on a Hopper GPU, because it emits that generation's matrix
instructions (wgmma); ask for it by name there. The choice is made once for a device and a dtype and does not see
shapes, so that one run is computed by one implementation throughout.
"""

import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from chargpt.errors import ConfigError
from chargpt.kernels import cpp, cuda, native, proven, reference, triton
from chargpt.kernels.compiling import assume_constant_result
from chargpt.kernels.triton import operators as triton_operators

Operation = Literal["causal_attention", "softmax_cross_entropy", "add_rms_norm", "qkv_heads", "relu_squared"]
OPERATIONS: tuple[Operation, ...] = typing.get_args(Operation)
# The small ones. An implementation without them leaves them to the reference, also when it is asked for by name, so
# that one name serves a whole model. On a GPU they are a compiler's work: torch.compile fuses the reference.
SMALL: tuple[Operation, ...] = ("add_rms_norm", "qkv_heads", "relu_squared")


@dataclass(frozen=True)
class Implementation:
    """The functions take what the reference's take: checked arguments, and the dropout seed already drawn."""

    name: str
    summary: str
    causal_attention: Callable[..., Any] | None = None  # None: not in this version of chargpt
    softmax_cross_entropy: Callable[..., Any] | None = None
    add_rms_norm: Callable[..., Any] | None = None
    qkv_heads: Callable[..., Any] | None = None
    relu_squared: Callable[..., Any] | None = None
    devices: tuple[str, ...] | None = None  # device types it runs on; None: all
    dtypes: tuple[torch.dtype, ...] | None = None  # dtypes it takes; None: all floating ones
    problem: Callable[[], str | None] = lambda: None  # why it cannot run in this process
    unproven: Callable[[], str | None] = lambda: None  # why "auto" leaves it alone all the same where it can run


IMPLEMENTATIONS = (
    Implementation(
        "cuda",
        "CUDA kernels",
        cuda.causal_attention,
        cuda.softmax_cross_entropy,
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        problem=cuda.problem,
        unproven=lambda: proven.why_not("cuda"),
    ),
    Implementation(
        "triton",
        "Triton kernels",
        triton_operators.causal_attention,
        triton_operators.softmax_cross_entropy,
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        problem=triton.problem,
        unproven=lambda: proven.why_not("triton"),
    ),
    Implementation(
        "cpp",
        "C++ kernels for the CPU",
        cpp.causal_attention,
        cpp.softmax_cross_entropy,
        cpp.add_rms_norm,
        cpp.qkv_heads,
        cpp.relu_squared,
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
        problem=lambda: native.load().problem,
    ),
    Implementation(
        "torch",
        "the reference in PyTorch, on any device",
        reference.causal_attention,
        reference.softmax_cross_entropy,
        reference.add_rms_norm,
        reference.qkv_heads,
        reference.relu_squared,
    ),
)


@dataclass(frozen=True)
class Choice:
    """What a call gets."""

    name: str  # of the implementation
    reason: str  # why this one, in words


def available_implementations() -> tuple[str, ...]:
    """Names of the implementations that can run in this process, best first. "torch" is always among them."""
    return tuple(entry.name for entry in IMPLEMENTATIONS if _absence(entry) is None)


def describe_implementations() -> dict[str, str]:
    """For every known name, best first: "available: …", with what "auto" has against it, or "not available: …"."""
    absences = {entry: _absence(entry) for entry in IMPLEMENTATIONS}
    return {
        entry.name: f"available: {entry.summary}{_limits(entry)}" if absence is None else f"not available: {absence}"
        for entry, absence in absences.items()
    }


def resolve(operation: Operation, device: torch.device | str, dtype: torch.dtype, impl: str = "auto") -> Choice:
    """The implementation that a call of `operation` with such tensors gets, and why.

    Raises ConfigError when `impl` is unknown, or is asked for by name and cannot serve the call.
    """
    device_type = torch.device(device).type
    if impl == "auto":
        return _first(operation, device_type, dtype)
    entry = next((entry for entry in IMPLEMENTATIONS if entry.name == impl), None)
    if entry is None:
        known = ", ".join(entry.name for entry in IMPLEMENTATIONS)
        raise ConfigError(f"kernels must be one of auto, {known}; got {impl!r}")
    refusal = _absence(entry) or _refusal(entry, operation, device_type, dtype)
    if operation in SMALL and refusal == _has_no(operation):
        return Choice(IMPLEMENTATIONS[-1].name, f"{impl} leaves it to the reference")
    if refusal is not None:
        raise ConfigError(f"kernels={impl} cannot run {operation}: {refusal}; use kernels=auto or kernels=torch")
    return Choice(impl, "asked for by name")


def _first(operation: Operation, device_type: str, dtype: torch.dtype) -> Choice:
    """The first implementation that serves, and why none before it; those for other devices are not worth a word."""
    reasons: list[str] = []
    for entry in IMPLEMENTATIONS:
        if entry.devices is not None and device_type not in entry.devices:
            continue
        refusal = _absence(entry) or _refusal(entry, operation, device_type, dtype) or entry.unproven()
        if refusal is None:
            return Choice(entry.name, "; ".join(reasons) or "first choice")
        reasons.append(f"not {entry.name}, because {refusal}")
    raise AssertionError("the reference serves every call")


@assume_constant_result
def choose(operation: Operation, device_type: str, dtype: torch.dtype, impl: str) -> int:
    """`resolve` for the hot path: an index into IMPLEMENTATIONS, found once for each combination of arguments.

    torch.compile takes the index as a constant and does not trace the search.
    """
    return _choose(operation, device_type, dtype, impl)


@functools.cache
def _choose(operation: Operation, device_type: str, dtype: torch.dtype, impl: str) -> int:
    name = resolve(operation, device_type, dtype, impl).name
    return [entry.name for entry in IMPLEMENTATIONS].index(name)


def _absence(entry: Implementation) -> str | None:
    if (problem := entry.problem()) is not None:
        return problem
    if entry.causal_attention is None and entry.softmax_cross_entropy is None:
        return f"this version of chargpt has no {entry.summary}"
    return None


def _limits(entry: Implementation) -> str:
    """What an implementation that can run here leaves to others, as the end of a sentence."""
    missing = [operation for operation in OPERATIONS if operation not in SMALL and getattr(entry, operation) is None]
    limits = f", without {' and '.join(missing)}" if missing else ""
    unproven = entry.unproven()
    return limits if unproven is None else f"{limits}; auto leaves them alone: {unproven}"


def _refusal(entry: Implementation, operation: Operation, device_type: str, dtype: torch.dtype) -> str | None:
    if entry.devices is not None and device_type not in entry.devices:
        return f"it runs on {' and '.join(entry.devices)}, not on {device_type}"
    if entry.dtypes is not None and dtype not in entry.dtypes:
        return f"it takes {', '.join(str(dtype) for dtype in entry.dtypes)}, not {dtype}"
    if getattr(entry, operation) is None:
        return _has_no(operation)
    return None


def _has_no(operation: Operation) -> str:
    return f"it has no {operation}"
