"""Every .cu compiles with nvcc, no kernel spills registers, and each stays within the budget written beside it.

A budget is a line `// budget: <part of the kernel's name> registers<=N shared<=BYTES` in csrc/cuda. Of several that
match a kernel the longest counts; shared is what the kernel declares, beside the dynamic memory it is launched with.
What the compiler said is kept in build/nvcc until a source changes.
"""

import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "nvcc"
SOURCES = sorted(KERNELS.glob("*.cu"))

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.timeout(1200),  # a busy machine may need ten times the minute of an idle one
]
# Both chips together take nearly two minutes of one core, so the tests compile for the one the kernels are designed on.
chips = pytest.mark.parametrize("chip", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90a"])


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, with its template arguments
    registers: int
    shared: int
    stack: int  # bytes of a frame in local memory
    spills: int  # bytes stored and loaded

    @property
    def short_name(self) -> str:
        match = re.match(r"(?:void )?(?:\w+::)*(\w+)", self.name.replace("(anonymous namespace)::", ""))
        assert match is not None
        return match[1]


@dataclass(frozen=True)
class Budget:
    name: str
    registers: int
    shared: int


@chips
def test_no_kernel_spills(chip: str) -> None:
    spilling = [kernel for kernel in kernels(chip) if kernel.spills or kernel.stack]
    assert not spilling, "\n".join(map(str, spilling))


@chips
def test_every_kernel_stays_within_its_budget(chip: str) -> None:
    beyond = []
    for kernel in kernels(chip):
        budget = budget_of(kernel)
        if budget is None or kernel.registers > budget.registers or kernel.shared > budget.shared:
            beyond.append(f"{kernel}: {budget or 'no budget'}")
    assert not beyond, "\n".join(beyond)


@chips
def test_every_budget_is_some_kernels(chip: str) -> None:
    assert set(budgets()) == {budget_of(kernel) for kernel in kernels(chip)} - {None}


def test_every_source_with_kernels_was_looked_at() -> None:
    """A kernel that no launcher names is not compiled, and would escape the tests above."""
    pattern = re.compile(r"__global__ void (?:__launch_bounds__\([^()]*\) )?(\w+)\(")
    defined = {name for path in _files() for name in pattern.findall(path.read_text())}
    compiled = {kernel.short_name for kernel in kernels("sm_90a")}
    assert compiled == defined


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_newer_chips_get_ptx(source: Path) -> None:
    """What a chip newer than those above runs: its driver compiles this."""
    ptx = compiled(source, "compute_90").read_text()
    assert ".target sm_90" in ptx
    assert ".entry" in ptx


def test_what_ptxas_says_is_understood() -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7chargpt5scaleIfEEvPfl' for 'sm_90a'
ptxas info    : Function properties for _ZN7chargpt5scaleIfEEvPfl
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compile time = 9.862 ms
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert parse(log) == [
        Kernel("void chargpt::scale<float>(float*, long)", 32, 128, 16, 12),
        Kernel("plain", 8, 0, 0, 0),
    ]
    assert [kernel.short_name for kernel in parse(log)] == ["scale", "plain"]


# ------------------------------------------------------------------------------------------------------------ compiling


@cache
def kernels(chip: str) -> list[Kernel]:
    """All that csrc/cuda has, compiled for `chip`, two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        logs = pool.map(lambda source: compiled(source, chip).read_text(), SOURCES)
    found = [kernel for log in logs for kernel in parse(log)]
    assert found
    return found


def compiled(source: Path, target: str) -> Path:
    """For a chip what ptxas said, for compute_… the PTX."""
    identity = hashlib.sha256(_version().encode())
    for path in sorted(included(source)):
        identity.update(path.name.encode() + b"\0" + path.read_bytes())
    result = CACHE / f"{source.stem}-{target}-{identity.hexdigest()[:16]}"
    if result.exists():
        return result
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{source.stem}-{target}-*"):
        old.unlink()
    unfinished, what = result.with_suffix(".unfinished"), "-ptx" if target.startswith("compute") else "-cubin"
    command = ["nvcc", what, f"-arch={target}", "-std=c++20", "-Xptxas", "-v", "-o", str(unfinished), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-5000:]}"
    if what == "-cubin":
        unfinished.write_text(done.stderr)
    return unfinished.replace(result)


def parse(log: str) -> list[Kernel]:
    """ptxas -v: for each kernel its mangled name, then its stack and spills, then registers and shared memory."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(pattern.finditer(log))
    names = demangled(tuple(match["name"] for match in found))
    return [
        Kernel(
            name,
            int(match["registers"]),
            sum(map(int, re.findall(r"(\d+) bytes smem", match["rest"]))),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
        )
        for name, match in zip(names, found, strict=True)
    ]


def demangled(names: tuple[str, ...]) -> list[str]:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    given = "\n".join(names)
    done = subprocess.run(["c++filt"], input=given, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def included(source: Path) -> set[Path]:
    """The source and the files of csrc/cuda that it includes, directly or not."""
    found, new = set(), [source]
    while new:
        path = new.pop()
        found.add(path)
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        new += [KERNELS / name for name in names if (KERNELS / name).exists() and KERNELS / name not in found]
    return found


@cache
def _version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


# -------------------------------------------------------------------------------------------------------------- budgets


@cache
def budgets() -> tuple[Budget, ...]:
    pattern = re.compile(r"// budget: (.+) registers<=(\d+) shared<=(\d+)$", re.MULTILINE)
    lines = [match for path in _files() for match in pattern.finditer(path.read_text())]
    return tuple(Budget(match[1], int(match[2]), int(match[3])) for match in lines)


def budget_of(kernel: Kernel) -> Budget | None:
    matching = [budget for budget in budgets() if budget.name in kernel.name]
    return max(matching, key=lambda budget: len(budget.name), default=None)


def _files() -> list[Path]:
    return sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")])
