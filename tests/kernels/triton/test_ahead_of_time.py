"""Proof without a GPU, leg 2: every Triton kernel compiles to machine code for sm_80 and sm_90, within their means.

The functions that launch the kernels run as they do on a GPU, on tensors without memory, up to the launch itself: so
what is compiled, with which types, alignments and block sizes, is what a GPU would get. The reports come from the
cuobjdump that Triton brings.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set, so nothing compiles", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from chargpt.kernels.backends.triton import add_norm, attention, cross_entropy  # noqa: E402
from chargpt.kernels.backends.triton.backend import LONGEST_ROW  # noqa: E402
from chargpt.kernels.ops.add_norm import NORMS  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes for one block
ATTENTION_KERNELS = ["forward_kernel", "delta_kernel", "key_gradients_kernel", "query_gradients_kernel"]
CROSS_ENTROPY_KERNELS = ["whole_rows_kernel", "long_rows_kernel", "count_kernel", "sum_kernel", "scale_kernel"]
NORM_KERNELS = ["norm_kernel", "norm_backward_kernel", "add_parts_kernel", "row_dropout_kernel"]


class NoGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # so that the kernels of two architectures are kept apart

    def get_current_stream(self, _: int) -> int:
        return 0


class Launch(NamedTuple):
    name: str
    grid: Any
    kernel: Any  # as compiled


class Compiled:
    """Stands in for a kernel: compiles what it is asked to launch."""

    def __init__(self, kernel: Any, into: list[Launch]) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: Any) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.into.append(Launch(self.kernel.__name__, grid, compiled))

        return compile_only


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Fills with what calls would have launched."""
    launches: list[Launch] = []
    listed = (attention, ATTENTION_KERNELS), (cross_entropy, CROSS_ENTROPY_KERNELS), (add_norm, NORM_KERNELS)
    for module, names in listed:
        for name in names:
            monkeypatch.setattr(module, name, Compiled(getattr(module, name), launches))
    before = driver._active
    driver.set_active(NoGPU(request.param))
    yield launches
    driver._active = before


def check(launches: list[Launch], tmp_path: Path) -> None:
    """No spills, no stack, no atomics, and shared memory within the chip's limit."""
    for name, kernel in {launch.kernel.hash: (launch.name, launch.kernel) for launch in launches}.values():
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage", cubin)))
        spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass", cubin)))
        capability = kernel.metadata.target.arch
        used = f"{usage['REG']} registers, {kernel.metadata.shared} bytes, {dict(tensor_core_instructions(kernel))}"
        print(f"{name} sm_{capability}: {used}")
        assert (usage["STACK"], usage["LOCAL"], spills) == ("0", "0", 0), name
        assert not re.search(r"\b(?:atom|red)\.", kernel.asm["ptx"]), name
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], name


def tensor_core_instructions(kernel: Any) -> Counter[str]:
    """How many of each kind: `mma.sync`, of one warp, or sm_90's own `wgmma.mma_async`, of four."""
    return Counter(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", kernel.asm["ptx"]))


def dump(option: str, cubin: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout


def compile_attention(dtype: torch.dtype, D: int, options: tuple[Any, ...], T: int = 512, **tiles: Any) -> None:
    q, k, v = (torch.empty(4, T, heads, D, dtype=dtype, device="meta").transpose(1, 2) for heads in (8, 4, 4))
    out, lse = attention.causal_attention_forward(q, k, v, *options, **tiles.get("forward", {}))
    attention.causal_attention_backward(out, lse, q, k, v, out, lse, *options, **tiles.get("backward", {}))


SEED = torch.tensor(7)
# dtype, D, dropout, window, T: what the project trains with, and what has spilled with larger tiles.
QUICK = [(torch.bfloat16, 64, 0.2, None, 512), (torch.bfloat16, 128, 0.0, 100, 512)]
THOROUGH = [
    (dtype, D, dropout, window, T)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for D in (16, 31, 32, 64, 80, 128, 256)
    for dropout, window, T in ((0.0, None, 512), (0.2, None, 512), (0.0, 100, 512), (0.2, 100, 512), (0.0, None, 1))
    if dtype != torch.float16 or D == 64
]


@pytest.mark.parametrize(
    ("dtype", "D", "dropout", "window", "T"),
    [*QUICK, *(pytest.param(*entry, marks=pytest.mark.slow) for entry in THOROUGH if entry not in QUICK)],
    ids=str,
)
def test_attention_compiles_within_its_means(
    compiled: list[Launch], tmp_path: Path, dtype: torch.dtype, D: int, dropout: float, window: int | None, T: int
) -> None:
    compile_attention(dtype, D, (0.125, dropout, window, SEED if dropout else None), T)
    assert sorted(launch.name for launch in compiled) == sorted(ATTENTION_KERNELS)
    check(compiled, tmp_path)
    small_tiles = D % 8 != 0 or D > 128  # for dK, dV and dQ, with fewer rows of S than the 64 that `wgmma` wants
    for name, _, kernel in compiled:
        if name == "delta_kernel" or dtype == torch.float32:  # which must not go through TF32
            expected = set()
        elif kernel.metadata.target.arch < 90 or (small_tiles and name != "forward_kernel"):
            expected = {"mma.sync"}
        else:
            expected = {"wgmma.mma_async"}
        assert {*tensor_core_instructions(kernel)} == expected, name


def compile_cross_entropy(dtype: torch.dtype, V: int, options: tuple[Any, ...]) -> Tensor:
    logits, targets = torch.empty(64, V, dtype=dtype, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    loss, normalisers, gradient = cross_entropy.softmax_cross_entropy_forward(logits, targets, *options, True)
    assert gradient is not None
    cross_entropy.scale_(gradient, loss)
    return cross_entropy.softmax_cross_entropy_backward(loss, logits, targets, normalisers, *options)


PLAIN, EVERYTHING = (-100, 0.0, 0.0, None, "mean"), (-100, 0.1, 1e-4, 30.0, "mean")
VOCABULARIES = [1, 65, 1000, 8192, 32000, 50257, 50304]


@pytest.mark.parametrize(
    ("dtype", "V", "options"),
    [(torch.bfloat16, 65, PLAIN), (torch.bfloat16, 50257, PLAIN)]
    + [
        pytest.param(dtype, V, options, marks=pytest.mark.slow)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for V in VOCABULARIES
        for options in (PLAIN, EVERYTHING)
    ],
    ids=str,
)
def test_cross_entropy_compiles_within_its_means(
    compiled: list[Launch], tmp_path: Path, dtype: torch.dtype, V: int, options: tuple[Any, ...]
) -> None:
    compile_cross_entropy(dtype, V, options)
    check(compiled, tmp_path)
    if V == 50257:  # the inside of a row of odd length moves by 16 bytes: as bits, four words or two pairs
        for ptx in (launch.kernel.asm["ptx"] for launch in compiled if launch.name == "long_rows_kernel"):
            assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx)
            assert re.search(r"st\.global(\.\w+)*\.v4\.b32", ptx)


@pytest.mark.parametrize(
    ("C", "dtype", "gains"),
    [(384, torch.bfloat16, 1)]
    + [
        pytest.param(C, dtype, gains, marks=pytest.mark.slow)
        for C in (1, 65, 384, 768, 1600, LONGEST_ROW)
        for dtype in (torch.bfloat16, torch.float32)
        for gains in (0, 2)
    ],
    ids=str,
)
def test_norms_and_their_dropout_compile_within_their_means(
    compiled: list[Launch], tmp_path: Path, C: int, dtype: torch.dtype, gains: int
) -> None:
    """The stream is in float32, the norm in the dtype of the autocast region."""
    x = torch.empty(16_384, C, device="meta")
    weight, bias = [*(torch.empty(C, device="meta") for _ in range(gains)), None, None][:2]
    for kind in ("layernorm", "rmsnorm"):
        norm = NORMS.index(kind)
        out, statistics = add_norm.norm_forward(x, weight, bias, norm, dtype)
        add_norm.norm_backward(out, x, weight, bias, statistics, norm)
    add_norm.row_dropout(x, 0.25, SEED)
    assert {launch.name for launch in compiled} == {*NORM_KERNELS} - (set() if gains else {"add_parts_kernel"})
    check(compiled, tmp_path)


@pytest.mark.slow
def test_few_rows_are_counted_and_added_in_one_launch_and_many_in_two(compiled: list[Launch], tmp_path: Path) -> None:
    def grids(N: int) -> list[tuple[str, tuple[int, ...]]]:
        compiled.clear()
        cross_entropy._one_over_count(torch.empty(N, dtype=torch.int64, device="meta"), -100)
        cross_entropy._sum(torch.empty(N, device="meta"), torch.empty((), device="meta"))
        check(compiled, tmp_path)
        return [(launch.name, launch.grid) for launch in compiled]

    assert grids(64 * 256) == [("count_kernel", (1,)), ("sum_kernel", (1,))]
    many = 8 << 20
    assert grids(many) == [(name, grid) for name in ("count_kernel", "sum_kernel") for grid in ((512,), (1,))]
    assert grids(2**31)[:3] == [("count_kernel", (programs,)) for programs in (2**17, 8, 1)]


def test_no_compilation_for_another_number_of_rows(compiled: list[Launch]) -> None:
    def kernels(*numbers: int) -> set[str]:
        for N in numbers:
            scale = cross_entropy._one_over_count(torch.empty(N, dtype=torch.int64, device="meta"), -100)
            cross_entropy._sum(torch.empty(N, device="meta"), scale)
        return {launch.kernel.hash for launch in compiled}

    few_and_more_than_32_bits = kernels(1, 2**31 + 1)
    assert kernels(0, 17, 16_384, 16_385, 8_400_000, 2**31 - 1) == few_and_more_than_32_bits


def test_tiles_are_those_that_triton_has() -> None:
    tiles = [config for configs in attention.CANDIDATES.values() for config in configs]
    tiles += [config for pairs in attention.TILES.values() for _, config in pairs]
    assert len(tiles) > 30
    for config in tiles:
        for number in (config.num_warps, *config.kwargs.values()):
            assert number == 2 ** (number.bit_length() - 1), config
        assert 1 <= config.num_warps <= 16
        assert 1 <= config.num_stages <= 3


@pytest.mark.parametrize(("H", "T", "S", "p"), [(8, 1, 1, 0.1), (8, 17, 33, 0.3), (3, 512, 512, 0.9)])
def test_no_compilation_for_another_length_or_seed(
    compiled: list[Launch], monkeypatch: pytest.MonkeyPatch, H: int, T: int, S: int, p: float
) -> None:
    """Sampling grows T by one at each step: beyond the block sizes, nothing may be compiled for it."""
    kernel = attention.forward_kernel.kernel
    sizes = []
    for lengths, seed, rate in (((48, 64), 16, 0.5), ((T, S), 2**61 + 1, p)):
        q, k = (torch.empty(2, n, H, 64, dtype=torch.float16, device="meta").transpose(1, 2) for n in lengths)
        options = (0.1, rate, None, torch.tensor(seed))
        attention.causal_attention_forward(q, k, k, *options, tiles=attention._tiles(32, 32, 4, 2))
        sizes.append(len(kernel.device_caches[driver.active.get_current_device()][0]))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_candidate_of_the_autotuner_compiles(compiled: list[Launch]) -> None:
    """They may spill, and lose for it; that they compile and fit is what an autotuner needs of most of them."""
    by_name = {kernel.__name__: tiles for kernel, tiles in attention.CANDIDATES.items()}
    assert sorted(by_name) == ["forward_kernel", "key_gradients_kernel", "query_gradients_kernel"]
    for forward, key, query in zip(*by_name.values(), strict=True):
        backward = {"key_tiles": key, "query_tiles": query}
        tiles = {"forward": {"tiles": forward}, "backward": backward}
        compile_attention(torch.bfloat16, 64, (0.125, 0.0, None, None), **tiles)
        for name, _, kernel in compiled:
            assert kernel.metadata.shared <= SHARED_LIMIT[kernel.metadata.target.arch], name


def test_importing_chargpt_imports_no_triton_kernels_and_needs_no_triton() -> None:
    program = """if True:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import chargpt.kernels
        from chargpt.kernels.backends import triton
        assert triton.problem() == "triton is not installed"
        assert "chargpt.kernels.backends.triton.attention" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)
