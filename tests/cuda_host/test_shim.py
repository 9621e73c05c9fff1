"""The shim that runs CUDA kernels on the CPU: it computes what the PTX manual says, and notices what is wrong."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from .build import library, run_watched


@pytest.fixture(scope="module")
def shim() -> ctypes.CDLL:
    return library("shim")


def pointer(x: np.ndarray[Any, Any] | torch.Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous() if isinstance(x, torch.Tensor) else x.flags["C_CONTIGUOUS"]
    return ctypes.c_void_p(x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data)


def test_every_thread_of_the_grid_runs_once(shim: ctypes.CDLL) -> None:
    grid, block = np.array([3, 2, 4], np.uint32), np.array([5, 7, 3], np.uint32)
    out = np.full((*grid[::-1], *block[::-1], 6), -1, np.int32)
    assert shim.run_indices(pointer(grid), pointer(block), pointer(out)) == 0
    coordinates = np.indices(out.shape[:-1])[[2, 1, 0, 5, 4, 3]]
    np.testing.assert_array_equal(out, np.moveaxis(coordinates, 0, -1))


@pytest.mark.parametrize(
    ("grid", "block"), [((0, 1, 1), (32, 1, 1)), ((1, 70000, 1), (32, 1, 1)), ((1, 1, 1), (1025, 1, 1))]
)
def test_launches_that_no_chip_takes_are_errors(
    shim: ctypes.CDLL, grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    three = ctypes.c_uint * 3
    assert shim.run_indices(three(*grid), three(*block), None) == 9  # cudaErrorInvalidConfiguration


def test_shuffles_and_votes(shim: ctypes.CDLL) -> None:
    votes = np.array([lane % 3 - 1 for lane in range(32)], np.int32)
    out = np.zeros((10, 32), np.int32)
    assert shim.run_shuffles(pointer(votes), pointer(out)) == 0
    lanes = range(32)
    ballot = sum(1 << lane for lane in lanes if votes[lane] > 0)
    expected = [
        [105 for _ in lanes],
        [100 + lane // 8 * 8 + (lane + 1) % 8 for lane in lanes],
        [100 + (lane ^ 16) for lane in lanes],
        [100 + (lane ^ 3) for lane in lanes],
        [100 + (lane + 5 if lane + 5 < 32 else lane) for lane in lanes],
        [100 + (lane - 3 if lane % 16 >= 3 else lane) for lane in lanes],
        [ctypes.c_int32(ballot).value for _ in lanes],
        [1 for _ in lanes],
        [0 for _ in lanes],
        [(201 + 2 * (lane // 2 * 2)) * (1 if lane < 16 else 4) for lane in lanes],
    ]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("threads", [1, 32, 33, 256, 1024])
def test_barriers(shim: ctypes.CDLL, threads: int) -> None:
    values = np.arange(9 * threads, dtype=np.int32).reshape(9, threads)
    out = np.zeros_like(values)
    assert shim.run_reverse(pointer(values), pointer(out), 9, threads) == 0
    np.testing.assert_array_equal(out, values[:, ::-1])


def test_shared_memory_that_nobody_has_written_is_nan(shim: ctypes.CDLL) -> None:
    out = np.zeros(32, np.float32)
    assert shim.run_untouched_shared(pointer(out)) == 0
    assert np.isnan(out).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_is_a_matrix_product(shim: ctypes.CDLL, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
    d = torch.randn(16, 8, generator=generator)
    expected = d.double() + a.double() @ b.double()
    assert shim.run_product(pointer(a), pointer(b), pointer(d), dtype == torch.bfloat16) == 0
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-5)


def test_ldmatrix(shim: ctypes.CDLL) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 12), np.uint32)
    assert shim.run_load_matrices(pointer(matrices), pointer(out)) == 0
    for lane in range(32):
        g, t = lane // 4, lane % 4
        plain = [int(m[g, 2 * t]) | int(m[g, 2 * t + 1]) << 16 for m in matrices]
        transposed = [int(m[2 * t, g]) | int(m[2 * t + 1, g]) << 16 for m in matrices]
        assert out[lane].tolist() == plain + transposed + plain[:2] + transposed[:2]


def test_asynchronous_copies_arrive_with_the_wait_for_their_group(shim: ctypes.CDLL) -> None:
    values = np.arange(1, 17, dtype=np.float32)
    memory = np.zeros(20, np.float32)
    source = memory[(-memory.ctypes.data // 4) % 4 :][:16]  # at a multiple of 16 bytes
    source[:] = values
    out = np.zeros((4, 4), np.float32)
    assert shim.run_copies(pointer(source), pointer(out)) == 0
    nan = np.nan
    np.testing.assert_array_equal(out, [[nan] * 4, [1, 0, nan, nan], [1, 0, 9, nan], [1, 0, 9, 13]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_torchs(shim: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    shim.widen(pointer(bits), pointer(wide), len(bits), dtype == torch.bfloat16)
    torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32).view(torch.float32)
    near = wide[None] * torch.tensor([1, 1 + 2**-11, 1 - 2**-11, 1 + 2**-12, 1 + 2**-8, 1 + 2**-9])[:, None]  # ties
    x = torch.cat([x, near.reshape(-1)])
    narrow = torch.empty(len(x), dtype=torch.int16)
    shim.narrow(pointer(x), pointer(narrow), len(x), dtype == torch.bfloat16)
    torch.testing.assert_close(narrow.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("half_a_block_at_a_barrier", ["32 threads (0, …) wait in __syncthreads", "32 threads (32, …) returned"]),
        ("different_barriers", ["different barriers"]),
        ("lanes_missing_from_a_shuffle", ["wait in __shfl_xor_sync", "returned"]),
        ("lanes_in_different_shuffles", ["different operations", "__shfl_xor_sync", "__shfl_down_sync"]),
        ("caller_not_in_its_mask", ["not in its own mask"]),
        ("reads_from_a_lane_outside_the_mask", ["a lane that takes no part"]),
    ],
)
def test_threads_that_never_meet_are_reported(
    shim: ctypes.CDLL, capfd: pytest.CaptureFixture[str], kernel: str, said: list[str]
) -> None:
    assert shim.run_by_name(kernel.encode()) == 719  # cudaErrorLaunchFailure
    message = capfd.readouterr().err
    assert all(part in message for part in [*said, "shim_test.cpp:"]), message


@pytest.mark.parametrize(
    ("kind", "kernel", "said"),
    [
        ("tsan", "no_barrier_before_reading", "data race"),
        ("tsan", "no_barrier_before_writing_again", "data race"),
        ("tsan", "warp_barrier_between_warps", "data race"),
        ("tsan", "shuffle_for_a_barrier", "data race"),
        ("tsan", "copy_without_barrier", "data race"),
        ("tsan", "copy_over_what_others_read", "data race"),
        ("tsan", "two_blocks_write_the_same", "data race"),
        ("tsan", "two_blocks_read_and_write", "data race"),
        ("tsan", "ldmatrix_without_barrier", "data race"),
        ("asan", "past_shared", "heap-buffer-overflow"),
        ("asan", "past_global", "heap-buffer-overflow"),
        ("asan", "past_an_array", "out of bounds"),
        ("asan", "misaligned_vector", "misaligned address"),
    ],
)
def test_sanitizers_see_what_is_wrong(kind: str, kernel: str, said: str) -> None:
    done = run_watched("shim", kind, kernel)
    assert done.returncode != 0
    assert said in done.stderr
    assert kernel in done.stderr  # in the trace


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers_are_silent_where_nothing_is_wrong(kind: str) -> None:
    done = run_watched("shim", kind, "fine")
    assert (done.returncode, done.stderr) == (0, "")
