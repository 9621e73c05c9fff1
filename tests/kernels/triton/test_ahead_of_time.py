"""Proof without a GPU, leg 2: every Triton kernel compiles to machine code for sm_80 and sm_90, within their means.

The functions that launch the kernels run as they do on a GPU, on tensors without memory, up to the launch itself: so
what is compiled, with which types, alignments and block sizes, is what a GPU would get. The reports come from the
cuobjdump that Triton brings.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set, so nothing compiles", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from chargpt.kernels.triton import attention, cross_entropy  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes for one block
ATTENTION_KERNELS = ["forward_kernel", "delta_kernel", "key_gradients_kernel", "query_gradients_kernel"]
CROSS_ENTROPY_KERNELS = ["whole_rows_kernel", "long_rows_kernel", "count_kernel", "sum_kernel", "scale_kernel"]


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


class Compiled:
    """Stands in for a kernel: compiles what it is asked to launch."""

    def __init__(self, kernel: Any, into: dict[str, Any]) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: Any) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            self.into[self.kernel.__name__] = self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_only


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Fills with the kernels, by name, that calls would have launched."""
    kernels: dict[str, Any] = {}
    for module, names in ((attention, ATTENTION_KERNELS), (cross_entropy, CROSS_ENTROPY_KERNELS)):
        for name in names:
            monkeypatch.setattr(module, name, Compiled(getattr(module, name), kernels))
    before = driver._active
    driver.set_active(NoGPU(request.param))
    yield kernels
    driver._active = before


def check(kernels: dict[str, Any], tmp_path: Path) -> None:
    """No spills, no stack, and shared memory within the chip's limit."""
    for name, kernel in kernels.items():
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage", cubin)))
        spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("-sass", cubin)))
        capability = kernel.metadata.target.arch
        tensor_cores = len(re.findall(r"mma\.sync|wgmma\.mma_async", kernel.asm["ptx"]))
        print(f"{name} sm_{capability}: {usage['REG']} registers, {kernel.metadata.shared} bytes, {tensor_cores} mma")
        assert (usage["STACK"], usage["LOCAL"], spills) == ("0", "0", 0), name
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], name


def dump(option: str, cubin: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout


def compile_attention(dtype: torch.dtype, D: int, options: tuple[Any, ...], T: int = 512, **tiles: Any) -> None:
    q, k, v = (torch.empty(4, T, heads, D, dtype=dtype, device="meta").transpose(1, 2) for heads in (8, 4, 4))
    out, lse = attention.causal_attention_forward(q, k, v, *options, **tiles.get("forward", {}))
    attention.causal_attention_backward(out, lse, q, k, v, out, lse, *options, **tiles.get("backward", {}))


SEED = torch.tensor(7)
# dtype, D, dropout, window, T; bfloat16 and D = 64 is what the project trains with, and the next three have spilled
# with larger tiles. The others are slow together.
QUICK = [
    (torch.bfloat16, 64, 0.0, None, 512),
    (torch.bfloat16, 31, 0.2, 100, 512),
    (torch.bfloat16, 128, 0.0, 100, 512),
    (torch.float32, 64, 0.0, None, 512),
]
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
    compiled: dict[str, Any], tmp_path: Path, dtype: torch.dtype, D: int, dropout: float, window: int | None, T: int
) -> None:
    compile_attention(dtype, D, (0.125, dropout, window, SEED if dropout else None), T)
    assert sorted(compiled) == sorted(ATTENTION_KERNELS)
    check(compiled, tmp_path)
    for name in {*ATTENTION_KERNELS} - {"delta_kernel"}:
        used = re.search(r"mma\.sync|wgmma\.mma_async", compiled[name].asm["ptx"]) is not None
        assert used == (dtype != torch.float32), name  # float32 must not go through TF32


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
    compiled: dict[str, Any], tmp_path: Path, dtype: torch.dtype, V: int, options: tuple[Any, ...]
) -> None:
    compile_cross_entropy(dtype, V, options)
    check(compiled, tmp_path)
    if V == 50257:  # the inside of a row of odd length moves by 16 bytes: as bits, four words or two pairs
        ptx = compiled["long_rows_kernel"].asm["ptx"]
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx)
        assert re.search(r"st\.global(\.\w+)*\.v4\.b32", ptx)


@pytest.mark.parametrize(("H", "T", "S", "p"), [(8, 1, 1, 0.1), (8, 17, 33, 0.3), (3, 512, 512, 0.9)])
def test_no_compilation_for_another_length_or_seed(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, H: int, T: int, S: int, p: float
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
def test_every_candidate_of_the_autotuner_compiles(compiled: dict[str, Any]) -> None:
    """They may spill, and lose for it; that they compile and fit is what an autotuner needs of most of them."""
    by_name = {kernel.__name__: tiles for kernel, tiles in attention.CANDIDATES.items()}
    assert sorted(by_name) == ["forward_kernel", "key_gradients_kernel", "query_gradients_kernel"]
    for forward, key, query in zip(*by_name.values(), strict=True):
        backward = {"key_tiles": key, "query_tiles": query}
        tiles = {"forward": {"tiles": forward}, "backward": backward}
        compile_attention(torch.bfloat16, 64, (0.125, 0.0, None, None), **tiles)
        for name, kernel in compiled.items():
            assert kernel.metadata.shared <= SHARED_LIMIT[kernel.metadata.target.arch], name


def test_importing_chargpt_imports_no_triton_kernels_and_needs_no_triton() -> None:
    program = """if True:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import chargpt.kernels
        from chargpt.kernels import triton
        assert triton.problem() == "triton is not installed"
        assert "chargpt.kernels.triton.attention" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)
