"""What this project trains, first: its own attention shapes with and without dropout, and its cross-entropies.

Each attention is timed with its inputs out of L2, as in a training step, and once more with them in it. The ceilings of
the card stand beside the numbers.
"""

import torch

from benchmarks.gpu import attention, cross_entropy
from benchmarks.gpu.ceilings import copy_bandwidth, matrix_product
from benchmarks.gpu.program import Program

# nanoGPT's 10.65 M model at its batch, and GPT-2 small's heads. The CUDA kernels take 512 keys into shared memory, and
# walk over 520 in tiles: the two beside each other say whether the bound lies right.
ATTENTION = ((64, 6, 256, 64), (64, 12, 1024, 64), (64, 6, 512, 64), (64, 6, 520, 64))
DROPOUT = 0.2
CROSS_ENTROPY = ((16_384, 65), (16_384, 50_257))


def main() -> None:
    program = Program(__doc__)
    copied = copy_bandwidth(program)
    program.note(copy_gigabytes_per_second=copied, matrix_product_tflops=matrix_product(program))
    for number, (B, H, T, D) in enumerate(ATTENTION):
        shape = (2, 3, T // 32, D) if program.dry else (B, H, T, D)
        for dropout_p in (0.0, DROPOUT)[: 2 if number < 2 else 1]:
            attention.measure(program, shape, dropout_p=dropout_p, warm=True)
    for rows, V in CROSS_ENTROPY:
        cross_entropy.measure(program, rows // 8192 if program.dry else rows, V, torch.bfloat16, copied)
    program.finish()


if __name__ == "__main__":
    main()
