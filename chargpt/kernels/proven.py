"""On which kinds of GPU "auto" may take a GPU's kernels: those for which proven.json records a pass of `make gpu`, and
this machine's after a pass of `chargpt info --check`.

A kind is a compute capability. The file is derived from the suite's results (`python -m benchmarks.gpu.proven` writes
it) and comes with the package, so that an installation needs no results of its own.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chargpt.kernels import native

FILE = Path(__file__).with_name("proven.json")
IMPLEMENTATIONS = ("cuda", "triton")
OPERATIONS = {
    "cuda": ("causal_attention", "softmax_cross_entropy"),
    "triton": ("causal_attention", "softmax_cross_entropy", "add_norm"),
}
DTYPES = ("float32", "float16", "bfloat16")

# Of an implementation, of a compute capability: which card passed, when, with which torch, how many checks.
Record = dict[str, dict[str, dict[str, Any]]]


def why_not(implementation: str) -> str | None:
    """Why "auto" leaves `implementation` alone on this machine's GPUs; None when all passed, or there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return None
    try:
        recorded = read(FILE)[implementation]
    except ValueError as error:
        return str(error)
    here = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
    found = {kind: native.checked(implementation, kind) for kind in (f"{major}.{minor}" for major, minor in here)}
    if False in found.values():
        return native.FAILED
    missing = [kind for kind, passed in found.items() if kind not in recorded and not passed]
    if not missing:
        return None
    return (
        f"no pass of `make gpu` is recorded for compute capability {' and '.join(missing)}; "
        "`chargpt info --check` checks them here"
    )


def read(file: Path) -> Record:
    """The content of such a file. Raises ValueError when it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if all(isinstance(entry, dict) for name in IMPLEMENTATIONS for entry in content[name].values()):
            return content  # type: ignore[no-any-return]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{file}, the record of passes of `make gpu`, is missing or damaged; install chargpt again")


def record(results: Path) -> Record:
    """What the file must hold, by the results that `make gpu` left in the folder `results`, one file for each card.

    An implementation has passed on a kind when it has no fault on any card of that kind; the entry is of the newest
    run. A run without checks of an implementation says nothing about it.

    Raises ValueError for a file that holds something else.
    """
    verdicts = [verdict for path in sorted(results.glob("gpu-*.json")) for verdict in _verdicts(path)]
    faults = {(verdict.implementation, verdict.kind) for verdict in verdicts if not verdict.passed}
    found: Record = {name: {} for name in IMPLEMENTATIONS}
    for verdict in sorted(verdicts, key=lambda verdict: str(verdict.entry["time"])):
        if (verdict.implementation, verdict.kind) not in faults:
            found[verdict.implementation][verdict.kind] = verdict.entry
    return found


@dataclass(frozen=True)
class _Verdict:
    """What one file says about one implementation."""

    implementation: str
    kind: str
    passed: bool
    entry: dict[str, Any]  # for the record


def _verdicts(path: Path) -> list[_Verdict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["dry"] or "build" not in content or "cases" not in content:
            return []
        machine, cases = content["build"]["notes"]["machine"], content["cases"]["notes"]
        step = content["steps"]["cases"]  # which may be of an earlier day than the build beside it
        about = {"device": machine["device"], "time": step["ended"], "torch": step["torch"], "results": path.name}
        return [
            _Verdict(name, machine["capability"], _passed(cases, name), about | {"checks": _checks(cases, name)})
            for name in IMPLEMENTATIONS
            if any(_is_of(name, row) for row in cases["table"])
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no result of `make gpu`: {type(error).__name__}: {error}") from None


def _passed(cases: dict[str, Any], implementation: str) -> bool:
    """All operations were checked in all dtypes, nothing failed, and only for want of memory was anything left out.

    What there was no time for is among the failures.
    """
    rows = {name: row for name, row in cases["table"].items() if _is_of(implementation, name)}
    needed = [f"{operation} {implementation} {dtype}" for operation in OPERATIONS[implementation] for dtype in DTYPES]
    failed = [name for name in cases["failed"] if _is_of(implementation, name)]
    skipped = [reason for name, reason in cases["skipped"].items() if _is_of(implementation, name)]
    return (
        all(rows.get(name, {}).get("passed", 0) > 0 for name in needed)
        and not failed
        and not any(row.get("failed", 0) for row in rows.values())
        and all("memory" in reason for reason in skipped)
    )


def _checks(cases: dict[str, Any], implementation: str) -> int:
    """How many checks passed."""
    return sum(row.get("passed", 0) for name, row in cases["table"].items() if _is_of(implementation, name))


def _is_of(implementation: str, name: str) -> bool:
    """Whether a row, or a check, is one of this implementation, whose name stands before the dtype."""
    found = re.match(rf".+? (\S+) ({'|'.join(DTYPES)})(?!\S)", name)
    if found is None:
        raise ValueError(f"{name!r} names no implementation and dtype")
    return found[1] == implementation
