"""Every .cu compiles with nvcc, no kernel spills registers, and each stays within the budget written beside it.

A budget is a line `// budget: <part of the kernel's name> registers<=N shared<=BYTES` in csrc/cuda. Of several that
match a kernel the longest counts; shared is what the kernel declares, beside the dynamic memory it is launched with.
What the compiler said is kept in build/nvcc until a source changes.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
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
chips = pytest.mark.parametrize("chip", [pytest.param(chip, marks=pytest.mark.slow) for chip in ("sm_80", "sm_90a")])


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, with its template arguments
    registers: int
    shared: int
    stack: int  # bytes of a frame in local memory
    spills: int  # bytes stored and loaded

    @property
    def short_name(self) -> str:
        return without_namespace(self.name).partition("<")[0]


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


@pytest.mark.slow
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


@chips
def test_gradients_of_logits_are_stored_16_bytes_at_a_time(chip: str) -> None:
    """An assignment of 16 bytes is not always one store: nvcc 13.0 once made four of 4 bytes of it."""
    found = stores_by_size(compiled(KERNELS / "cross_entropy.cu", chip).with_suffix(".ptx").read_text())
    for kernel in ("short_rows", "long_rows", "gradients", "scale"):
        for element in ("float", "__half", "__nv_bfloat16"):
            sizes = [sizes for name, sizes in found.items() if re.match(rf"{kernel}<{element}\b", name)]
            assert sizes, f"no {kernel}<{element}>"
            assert all(each[16] for each in sizes)
            if element != "float":  # 2 bytes: the elements at a row's ends; 4: a row's maximum, sum and loss, or loss 0
                assert all(each[4] <= 4 and not each[8] for each in sizes)


def test_stores_are_counted_by_kernel_and_size() -> None:
    ptx = """
.visible .entry _ZN7chargpt5scaleIfEEvPfl(
    .param .u64 a
)
{
    st.global.cg.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
    st.global.v2.u32 [%rd1], {%r1, %r2};
    st.shared.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
    st.global.v4.f32 [%rd1+16], {%f1, %f2, %f3, %f4};
    st.global.u16 [%rd1+16], %rs1;
}
.visible .entry plain(
)
{
    st.global.u32 [%rd1], %r1;
}
"""
    assert stores_by_size(ptx) == {"scale<float>": {16: 2, 8: 1, 2: 1}, "plain": {4: 1}}


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
    """For a chip what ptxas said, with the PTX beside it in a .ptx; for compute_… the PTX."""
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
    with tempfile.TemporaryDirectory(dir=CACHE) as between:
        if what == "-cubin":
            command += ["--keep", "--keep-dir", between]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-5000:]}"
        if what == "-cubin":
            unfinished.write_text(done.stderr)
            Path(between, f"{source.stem}.ptx").replace(result.with_suffix(".ptx"))
    return unfinished.replace(result)


def stores_by_size(ptx: str) -> dict[str, Counter[int]]:
    """How many stores to global memory each kernel has of each number of bytes."""
    _, *kernels = re.split(r"\.entry (?=\w+\()", ptx)
    names = demangled(tuple(kernel.partition("(")[0] for kernel in kernels))
    pattern = re.compile(r"\bst\.global(?:\.c[a-z])?(?:\.v(\d))?\.[bfsu](\d+)\b")
    sizes = [Counter(int(n or 1) * int(bits) // 8 for n, bits in pattern.findall(kernel)) for kernel in kernels]
    return dict(zip(map(without_namespace, names), sizes, strict=True))


def without_namespace(name: str) -> str:
    """`scale<float>` of `void chargpt::cuda::(anonymous namespace)::scale<float>(float*, long)`."""
    match = re.match(r"(?:void )?(?:\w+::)*(\w+(?:<[^()]*>)?)", name.replace("(anonymous namespace)::", ""))
    assert match is not None
    return match[1]


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
