"""What this GPU does at best, measured: the bandwidth of a copy and the speed of a large matrix product."""

import statistics

import torch

from benchmarks.gpu.program import Program


def copy_bandwidth(program: Program) -> float:
    """Gigabytes per second, read and written, of torch's copy from one tensor to another on the device."""
    size = 2**20 if program.dry else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=program.device).random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * size / (1e6 * statistics.median(program.milliseconds(lambda: target.copy_(source)) for _ in range(21)))


def matrix_product(program: Program) -> float:
    """TFLOP/s of a bfloat16 product of two square matrices of random numbers. Zeros would be faster."""
    size = 256 if program.dry else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=program.device) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / (1e9 * statistics.median(program.milliseconds(lambda: a @ b) for _ in range(11)))
