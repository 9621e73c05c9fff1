"""Softmax cross-entropy, forward and backward: the C++ kernel against torch's, eager and compiled; GPT-2's head.

Run as `python -m benchmarks.cross_entropy [--threads 2]`. Logits are a leaf, as the head's output would be; every round
drops the last gradient first, as a training step does.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Measurement, compare, report
from chargpt.kernels import linear_cross_entropy, softmax_cross_entropy

CASES = (  # rows, vocabulary, dtype, goal
    (2048, 50257, torch.float32, "eager 8, compiled 4"),
    (2048, 50257, torch.bfloat16, "eager 8, compiled 4"),
    (16384, 65, torch.float32, "eager 3"),
    (768, 65, torch.float32, "eager 3"),
    (16384, 65, torch.bfloat16, ""),
    (768, 65, torch.bfloat16, ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    measurements = []
    for rows, V, dtype, goal in CASES:
        logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        targets = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(2))
        measurements += measure(logits, targets, goal)
    measurements += [head(torch.bfloat16, "1.7, products 0.83"), head(torch.float32, "1.25, products 0.83")]
    report("cross_entropy", measurements, {"ceiling": ceiling()})


def measure(logits: Tensor, targets: Tensor, goal: str) -> list[Measurement]:
    """Loss and gradient, then the loss alone."""

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def step() -> None:
            logits.grad = None
            loss(logits, targets).backward()

        return step

    def alone(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: loss(logits, targets))

    def cpp(logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, targets, impl="cpp")

    torch.compiler.reset()  # one shape at a time: past eight, torch.compile would silently run eagerly
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch": F.cross_entropy,
        "torch compiled": torch.compile(F.cross_entropy, dynamic=False),
        "cpp": cpp,
    }
    pairs = [("torch", "cpp"), ("torch compiled", "cpp")]
    shape = f"({', '.join(map(str, logits.shape))}) {str(logits.dtype).removeprefix('torch.')}"
    return [
        compare(f"loss and gradient {shape}", {name: with_gradient(f) for name, f in losses.items()}, pairs, goal=goal),
        compare(f"loss alone {shape}", {name: alone(f) for name, f in losses.items()}, pairs, seconds=2),
    ]


def head(dtype: torch.dtype, goal: str) -> Measurement:
    """Loss and gradients of the head of GPT-2 and its input, whose three products alone take most of the time."""
    N, C, V = 4096, 768, 50257
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(V, C, generator=generator)).requires_grad_()  # float32, as in training
    targets = torch.randint(V, (N,), generator=generator)

    def products() -> None:
        x, w = h.detach(), weight.detach().to(dtype)
        logits = x @ w.t()
        logits @ w
        logits.t() @ x

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            h.grad = weight.grad = None
            loss().backward()

        return run

    def in_parts() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return linear_cross_entropy(h, weight, targets)

    functions: dict[str, Callable[[], None]] = {
        "products": products,
        "torch": step(lambda: F.cross_entropy(F.linear(h, weight.to(dtype)), targets)),
        "torch in parts": step(lambda: F.linear_cross_entropy(h, weight.to(dtype), targets)),
        "cpp, all logits": step(lambda: softmax_cross_entropy(F.linear(h, weight.to(dtype)), targets)),
        "cpp": step(in_parts),
    }
    case = f"head ({N}, {C}, {V}) {str(dtype).removeprefix('torch.')}"
    ratios = [(name, "cpp") for name in functions if name != "cpp"]
    return compare(case, functions, ratios, goal=goal, warm_up=1)


def ceiling() -> str:
    """How fast memory can be: reading 412 MB and writing as much, which (2048, 50257) in float32 cannot avoid."""
    source = torch.zeros(2048, 50257)
    kept = torch.empty_like(source)

    def copy_to_new() -> None:
        torch.empty_like(source).copy_(source)

    copies = compare("", {"warm": lambda: kept.copy_(source), "new": copy_to_new}, [("new", "warm")], seconds=1)
    return (
        f"copying 412 MB takes {copies.fastest['warm']:.0f} ms into memory in use, "
        f"{copies.fastest['new']:.0f} ms into a new tensor"
    )


if __name__ == "__main__":
    main()
