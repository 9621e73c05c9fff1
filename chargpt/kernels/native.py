"""The compiled modules `chargpt._native` (C++) and `chargpt._native_cuda`, or one sentence that says why not.

A module built against another torch may crash or miscompute, so the versions recorded by setup.py in `_native.json`
are compared before a module is loaded.
"""

import functools
import importlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from chargpt.errors import ChargptError, ConfigError, shown
from chargpt.files import replaced_file
from chargpt.kernels import sources

RECORD = Path(__file__).parents[1] / "_native.json"  # written by setup.py next to the modules
INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")  # csrc/cpu/simd/isa.h
MEASURED = ("x86_64", "amd64")  # kinds of CPU on which the kernels are known to be faster than torch
FAILED = "`chargpt info --check` found them wrong or slower than PyTorch here"
REBUILD = "build it again with `pip install --no-build-isolation -e .`"


@dataclass(frozen=True)
class Native:
    """Exactly one of the two is None."""

    module: ModuleType | None
    problem: str | None  # why there is no module, and what to do


@functools.cache
def load() -> Native:
    """Load `chargpt._native` once. Whatever is wrong with it becomes `problem`.

    Raises ConfigError when CHARGPT_CPU_ISA names no instruction set: the module itself would ignore it.
    """
    asked = os.environ.get("CHARGPT_CPU_ISA")
    if asked is not None and asked not in INSTRUCTION_SETS:
        raise ConfigError(f"CHARGPT_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got {shown(asked)}")
    return _load("chargpt._native", check_record(RECORD))


@functools.cache
def load_cuda() -> Native:
    """Likewise `chargpt._native_cuda`. It loads without a GPU; its kernels need one."""
    return _load("chargpt._native_cuda", check_cuda_record(RECORD))


def unmeasured() -> str | None:
    """Why "auto" leaves the C++ kernels alone on this kind of CPU, though they run; None where they were measured."""
    kind = platform.machine()
    passed = checked("cpp", cpu_kind())
    if passed is False:
        return FAILED
    if passed or kind.lower() in MEASURED:
        return None
    return (
        f"on {kind} the C++ kernels pass their tests, but nobody has measured whether they are faster; "
        "`chargpt info --check` does"
    )


def cpu_kind() -> str:
    """What decides which code of the C++ kernels runs: the architecture, and the instruction sets that are used."""
    module = load().module
    isa = "none" if module is None else module.attention_isa(torch.empty(0, dtype=torch.bfloat16))
    return f"{platform.machine()} {isa}"


def checked(backend: str, kind: str) -> bool | None:
    """Whether `chargpt info --check` found it right and fast on this kind of device; None: not this code, or torch."""
    built = _read(RECORD)
    entries = built.get("checked") if isinstance(built, dict) else None
    entry = entries.get(f"{backend} {kind}") if isinstance(entries, dict) else None
    if not isinstance(entry, dict) or any(entry.get(key) != value for key, value in _code().items()):
        return None
    return entry.get("passed") is True


def require_record() -> dict[str, Any]:
    """What the build recorded. Raises ChargptError where it recorded nothing, or nothing can be added to it."""
    built = _read(RECORD)
    if isinstance(built, str):
        raise ChargptError(built)
    if not os.access(RECORD.parent, os.W_OK):
        raise ChargptError(f"{RECORD.parent} cannot be written, so what a check finds could not be remembered there")
    return built


def record_check(backend: str, kind: str, passed: bool, **found: Any) -> None:
    """Keep what a check found beside what the build recorded, so that the next build forgets it.

    Raises as `require_record` does.
    """
    built = require_record()
    entries = built.get("checked")
    entries = dict(entries) if isinstance(entries, dict) else {}
    entries[f"{backend} {kind}"] = {"passed": passed} | _code() | found
    with replaced_file(RECORD) as file:
        file.write((json.dumps(built | {"checked": entries}) + "\n").encode())


def _code() -> dict[str, str]:
    """What a check holds for, beside the native modules, whose build it is kept with."""
    return {"torch": torch.__version__, "kernels": _digest_of_kernels()}


@functools.cache
def _digest_of_kernels() -> str:
    return sources.digest(Path(__file__).parent, {".py"})


def check_record(record: Path) -> str | None:
    """Why the C++ module that `record` describes must not be loaded by this Python and this torch; None when it may."""
    built = _read(record)
    if isinstance(built, str):
        return built
    problem = built["problem"]
    return f"the native module was not built: {problem}" if problem is not None else _mismatch(built, record)


def check_cuda_record(record: Path) -> str | None:
    """Likewise for the module with the CUDA kernels, which may be there without the other."""
    built = _read(record)
    if isinstance(built, str):
        return built
    if not built.get("cuda"):
        return f"the CUDA kernels were not built: {built.get('cuda_problem') or built['problem'] or REBUILD}"
    return _mismatch(built, record)


def _read(record: Path) -> dict[str, Any] | str:
    """What setup.py wrote, or why it says nothing."""
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
        built["python"].split, built["torch"], built["problem"]
    except FileNotFoundError:
        return f"the native module was not built; {REBUILD}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"the record of the native module's build, {record}, is damaged; {REBUILD}"
    return built  # type: ignore[no-any-return]


def _mismatch(built: dict[str, Any], record: Path) -> str | None:
    python, built_torch = built["python"], built["torch"]
    if python.split(".")[:2] != platform.python_version().split(".")[:2]:
        return f"the native module was built for Python {python}, this is {platform.python_version()}; {REBUILD}"
    if built_torch != torch.__version__:
        return f"the native module was built against torch {built_torch}, this is {torch.__version__}; {REBUILD}"
    csrc = record.parents[1] / "csrc"  # of a checkout; a wheel has its sources inside the module alone
    if csrc.is_dir() and built.get("sources") != sources.digest(csrc):
        return f"the native module was built from other sources than those in {csrc}; {REBUILD}"
    return None


def cuda_build(record: Path) -> str | None:
    """The version of CUDA and the architectures that the CUDA kernels were built for; None: they were not."""
    built = json.loads(record.read_text(encoding="utf-8")).get("cuda")
    return built and f"CUDA {built}"


def _load(name: str, problem: str | None) -> Native:
    if problem is not None:
        return Native(None, problem)
    try:
        return Native(importlib.import_module(name), None)
    except (ImportError, OSError) as error:
        return Native(None, f"the native module failed to load ({error}); {REBUILD}")
