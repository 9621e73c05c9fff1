"""Which backends of the kernels exist here, which one a call gets, and why.

A backend is one entry of `BACKENDS`, in order of preference: "auto" takes the first that can serve the
operation on the tensor's device and dtype, and the last, the reference, serves everything.

On a GPU "auto" takes only what has passed all checks on that kind of GPU, as recorded in proven.json; any other
backend that can run there computes when it is asked for by name. The order prefers CUDA to Triton. This is
reasoned, not measured. The CUDA kernels are made for what this project trains: up to 512 positions they keep a head's
keys and values in shared memory, and they compile before a run, not in its first steps. From some 1024 positions on,
with heads of 64 channels and more, Triton should be faster on a Hopper GPU, because it emits that generation's matrix
instructions (wgmma); ask for it by name there. The choice is made once for a device and a dtype and does not see
shapes, so that one run is computed by one backend throughout.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chargpt.errors import ConfigError
from chargpt.kernels.compiling import assume_constant_result
from chargpt.kernels.ops import OPERATIONS


@dataclass(frozen=True)
class Backend:
    """One that computes operations. The functions take what the references take: checked arguments, a drawn seed."""

    name: str
    summary: str
    functions: Mapping[str, Callable[..., Any]]  # by operation
    devices: tuple[str, ...] | None = None  # device types it runs on; None: all
    dtypes: tuple[torch.dtype, ...] | None = None  # dtypes it takes; None: all floating ones
    problem: Callable[[], str | None] = lambda: None  # why it cannot run in this process
    unproven: Callable[[], str | None] = lambda: None  # why "auto" leaves it alone all the same where it can run


BACKENDS: tuple[Backend, ...] = ()  # best first; backends/__init__.py lists them


@dataclass(frozen=True)
class Choice:
    """What a call gets."""

    name: str  # of the backend
    reason: str  # why this one, in words


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run in this process, best first. "torch" is always among them."""
    return tuple(entry.name for entry in BACKENDS if _absence(entry) is None)


def describe_backends() -> dict[str, str]:
    """For every known name, best first: "available: …", with what "auto" has against it, or "not available: …"."""
    return {
        entry.name: f"available: {entry.summary}{_limits(entry)}" if absence is None else f"not available: {absence}"
        for entry in BACKENDS
        for absence in [_absence(entry)]
    }


def resolve(operation: str, device: torch.device | str, dtype: torch.dtype, impl: str = "auto") -> Choice:
    """The backend that a call of `operation` with such tensors gets, and why.

    Raises ConfigError when `impl` is unknown, or is asked for by name and cannot serve the call.
    """
    device_type = torch.device(device).type
    if impl == "auto":
        return _first(operation, device_type, dtype)
    entry = next((entry for entry in BACKENDS if entry.name == impl), None)
    if entry is None:
        known = ", ".join(entry.name for entry in BACKENDS)
        raise ConfigError(f"backend must be one of auto, {known}; got {impl!r}")
    refusal = _absence(entry) or _refusal(entry, operation, device_type, dtype)
    if OPERATIONS[operation].small and refusal == _has_no(operation):
        return Choice(BACKENDS[-1].name, f"{impl} leaves it to the reference")
    if refusal is not None:
        raise ConfigError(f"backend={impl} cannot run {operation}: {refusal}; use backend=auto or backend=torch")
    return Choice(impl, "asked for by name")


def _first(operation: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The first backend that serves, and why none before it; those for other devices are not worth a word."""
    reasons: list[str] = []
    for entry in BACKENDS:
        if entry.devices is not None and device_type not in entry.devices:
            continue
        refusal = _absence(entry) or _refusal(entry, operation, device_type, dtype) or entry.unproven()
        if refusal is None:
            return Choice(entry.name, "; ".join(reasons) or "first choice")
        reasons.append(f"not {entry.name}, because {refusal}")
    raise AssertionError("the reference serves every call")


def function(operation: str, device_type: str, dtype: torch.dtype, impl: str) -> Callable[..., Any]:
    """What computes the operation for such tensors. Raises ConfigError as `resolve` does."""
    return BACKENDS[choose(operation, device_type, dtype, impl)].functions[operation]


def by_reference(operation: str, device_type: str, dtype: torch.dtype, impl: str) -> bool:
    """Whether the reference computes the operation for such tensors. Raises ConfigError as `resolve` does."""
    return choose(operation, device_type, dtype, impl) == len(BACKENDS) - 1


@assume_constant_result
def choose(operation: str, device_type: str, dtype: torch.dtype, impl: str) -> int:
    """`resolve` for the hot path: an index into BACKENDS, found once for each combination of arguments.

    torch.compile takes the index as a constant and does not trace the search.
    """
    return _choose(operation, device_type, dtype, impl)


@functools.cache
def _choose(operation: str, device_type: str, dtype: torch.dtype, impl: str) -> int:
    name = resolve(operation, device_type, dtype, impl).name
    return [entry.name for entry in BACKENDS].index(name)


def _absence(entry: Backend) -> str | None:
    if (problem := entry.problem()) is not None:
        return problem
    if not entry.functions:
        return f"this version of chargpt has no {entry.summary}"
    return None


def _limits(entry: Backend) -> str:
    """What a backend that can run here leaves to others, as the end of a sentence."""
    missing = [name for name, one in OPERATIONS.items() if not one.small and name not in entry.functions]
    limits = f", without {' and '.join(missing)}" if missing else ""
    unproven = entry.unproven()
    return limits if unproven is None else f"{limits}; auto leaves them alone: {unproven}"


def _refusal(entry: Backend, operation: str, device_type: str, dtype: torch.dtype) -> str | None:
    if entry.devices is not None and device_type not in entry.devices:
        return f"it runs on {' and '.join(entry.devices)}, not on {device_type}"
    if entry.dtypes is not None and dtype not in entry.dtypes:
        return f"it takes {', '.join(str(dtype) for dtype in entry.dtypes)}, not {dtype}"
    if operation not in entry.functions:
        return _has_no(operation)
    return None


def _has_no(operation: str) -> str:
    return f"it has no {operation}"
