"""Softmax cross-entropy, loss and gradient: ours in CUDA and in Triton against torch's, eager and compiled.

The traffic that cannot be avoided is one read of the logits and one write of their gradient. It is set against what the
same GPU copies in a second, also counted as a read and a write.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.ceilings import copy_bandwidth
from benchmarks.gpu.program import Function, Program
from chargpt.kernels import softmax_cross_entropy

# Rows, vocabulary, dtype: between one and two gigabytes of logits. The project's own are in shapes.py.
CASES = (
    (16_384, 50_304, torch.bfloat16),
    (8_388_608, 65, torch.bfloat16),
    (32_768, 32_000, torch.bfloat16),
    (8_192, 128_256, torch.bfloat16),
    (8_192, 50_257, torch.float32),
)


def main() -> None:
    program = Program(__doc__)
    copied = copy_bandwidth(program)
    program.note(copy_gigabytes_per_second=copied)
    for rows, V, dtype in CASES:
        measure(program, max(1, rows // 8192) if program.dry else rows, V, dtype, copied)
    program.finish()


def measure(program: Program, rows: int, V: int, dtype: torch.dtype, copied: float) -> None:
    """copied: what `copy_bandwidth` found"""
    case = f"({rows}, {V}) {str(dtype).removeprefix('torch.')}"
    logits = torch.randn(rows, V, dtype=dtype, device=program.device).requires_grad_()
    targets = torch.randint(V, (rows,), device=program.device)
    functions, refused = contenders(program, logits, targets)
    times = program.time(case, functions, refused, seconds=1.5)
    if times is not None:
        traffic = 2 * logits.numel() * logits.element_size()
        speed = {name: traffic / (1e6 * times.median(name)) for name in times.times}
        torchs = [name for name in ("eager", "compiled") if name in times.times]
        program.record(
            {
                "case": case,
                "shape": (rows, V),
                "dtype": str(dtype).removeprefix("torch."),
                **times.summary(),
                "gigabytes_per_second": speed,
                "share_of_copy": {name: value / copied for name, value in speed.items()},
                "ratio": {
                    name: {other: times.ratio(other, name) for other in torchs}
                    for name in times.times
                    if name not in torchs
                },
            }
        )


def contenders(program: Program, logits: Tensor, targets: Tensor) -> tuple[dict[str, Function], dict[str, str]]:
    def ours(impl: str) -> Function:
        return lambda: torch.autograd.grad(softmax_cross_entropy(logits, targets, impl=impl), logits)

    torch.compiler.reset()  # one shape at a time: past eight, torch.compile would silently run eagerly
    # A dry run only traces: inductor would spend its time on compiling C++.
    compiled = torch.compile(F.cross_entropy, dynamic=False, backend="eager" if program.dry else "inductor")

    def torchs(loss: Callable[[Tensor, Tensor], Tensor]) -> Function:
        return lambda: torch.autograd.grad(loss(logits, targets), logits)

    names, refused = program.ours("softmax_cross_entropy", logits.dtype)
    functions = {name: ours(name) for name in names}
    return functions | {"eager": torchs(F.cross_entropy), "compiled": torchs(compiled)}, refused


if __name__ == "__main__":
    main()
