"""The shim that runs CUDA kernels on the CPU: it computes what the PTX manual says, and notices what is wrong."""

import ctypes
from collections.abc import Callable, Iterator
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


# Below, touch_ends<0>, <1>, … are kernels of one test each: what may be launched depends on what was before.
KIB = 1 << 10
CHIP = 227 * KIB  # shared memory that a block can have
INVALID_VALUE = 1


@pytest.fixture
def chip(shim: ctypes.CDLL) -> Iterator[Callable[[int, int], None]]:
    """Moves to a device of so much shared memory."""
    yield shim.set_chip
    shim.set_chip(0, CHIP)


def test_a_bare_launch_has_what_the_attribute_says(shim: ctypes.CDLL) -> None:
    def largest(number: int, *sizes: int) -> int:
        return max(size for size in sizes if shim.run_touch_ends_bare(number, size) == 0)

    assert shim.run_touch_ends_bare(0, 48 * KIB + 1) == INVALID_VALUE
    assert largest(0, 1, 48 * KIB, 48 * KIB + 1) == 48 * KIB
    assert shim.set_shared_limit(0, 100 * KIB) == 0
    assert largest(0, 1, 100 * KIB, 100 * KIB + 1) == 100 * KIB
    assert largest(1, 48 * KIB, 100 * KIB) == 48 * KIB  # another kernel
    assert shim.set_shared_limit(0, 60 * KIB) == 0
    assert largest(0, 60 * KIB, 60 * KIB + 1, 100 * KIB) == 60 * KIB
    for impossible in (-1, CHIP + 1):
        assert shim.set_shared_limit(0, impossible) == INVALID_VALUE
        assert shim.last_error() == INVALID_VALUE
        assert shim.last_error() == 0
    assert largest(0, 60 * KIB, 60 * KIB + 1) == 60 * KIB


def test_a_small_launch_leaves_the_limit_of_a_large_one(shim: ctypes.CDLL) -> None:
    assert shim.shared_limit(2) == 48 * KIB
    for size in (48 * KIB + 1, 200 * KIB, 60 * KIB, 1, 48 * KIB):
        assert shim.run_touch_ends(2, size) == 0
        assert shim.shared_limit(2) == CHIP


def test_host_threads_that_launch_one_kernel_do_not_disturb_each_other(shim: ctypes.CDLL) -> None:
    failed, lowered = ctypes.c_int(-1), ctypes.c_int(-1)
    sizes = (ctypes.c_int * 2)(60 * KIB, 200 * KIB)
    shim.run_from_host_threads(3, sizes, 2, 3000, ctypes.byref(failed), ctypes.byref(lowered))
    assert (failed.value, lowered.value) == (0, 0)


def test_every_device_gets_a_limit_of_its_own(shim: ctypes.CDLL, chip: Callable[[int, int], None]) -> None:
    for device, shared in ((0, CHIP), (1, 99 * KIB), (2, 163 * KIB)):
        chip(device, shared)
        assert shim.run_touch_ends(4, shared) == 0
        assert shim.run_touch_ends(4, shared + 1) == INVALID_VALUE
        assert shim.shared_limit(4) == shared


@pytest.mark.parametrize("size", [CHIP + 1, 2**31 - 1])
def test_a_launch_of_more_than_the_chip_has_is_an_error_of_its_own(shim: ctypes.CDLL, size: int) -> None:
    before = shim.launches()
    assert shim.run_touch_ends(5, size) == INVALID_VALUE
    assert shim.launches() == before  # launch.cuh says so, whatever a launch would say
    assert shim.last_error() == 0
    assert shim.run_touch_ends(5, CHIP) == 0


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
@pytest.mark.parametrize("what", ["fine", "host_threads"])
def test_sanitizers_are_silent_where_nothing_is_wrong(what: str, kind: str) -> None:
    done = run_watched("shim", kind, what)
    assert (done.returncode, done.stderr) == (0, "")
