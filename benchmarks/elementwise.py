"""A block's small operators, forward and backward: the C++ kernels against the torch reference, run eagerly.

Run as `python -m benchmarks.elementwise [--threads 2]`. The dtypes are those of a step under bfloat16 autocast: the
residual stream is float32, and the branches, the norms and the projections are bfloat16.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Measurement, compare, report
from chargpt.kernels import add_rms_norm, qkv_heads, relu_squared

SHAPES = ((64, 128, 128, 4), (32, 256, 256, 8), (64, 256, 384, 6))  # batch, time, channels, heads
Outputs = Tensor | tuple[Tensor, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    measurements = []
    for B, T, C, H in SHAPES:
        shape = f"({B}, {T}, {C})"
        x, y = random(B, T, C), random(B, T, C).bfloat16()
        half, qkv, rows = torch.bfloat16, random(B, T, 3 * C).bfloat16(), random(B, T, C).bfloat16()
        angles = torch.rand(T, C // H // 2, generator=torch.Generator().manual_seed(2))
        cos, sin = angles.cos(), angles.sin()

        def norm(impl: str, x: Tensor, y: Tensor) -> Outputs:
            with torch.autocast("cpu", half):  # noqa: B023
                return add_rms_norm(x, y, impl=impl)

        def heads(impl: str, qkv: Tensor, rows: Tensor, H: int = H, cos: Tensor = cos, sin: Tensor = sin) -> Outputs:
            return qkv_heads(qkv, rows, cos, sin, n_head=H, n_kv_head=H, qk_norm=True, impl=impl)

        def square(impl: str, x: Tensor) -> Outputs:
            return relu_squared(x, impl=impl)

        measurements += measure(f"add_rms_norm {shape}", norm, (x, y), "4")
        measurements += measure(f"qkv_heads {shape}, {H} heads", heads, (qkv, rows), "4")
        hidden = random(B, T, 4 * C).bfloat16()
        measurements += measure(f"relu_squared ({B}, {T}, {4 * C})", square, (hidden,), "2")
    report("elementwise", measurements)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def measure(case: str, function: Callable[..., Outputs], inputs: tuple[Tensor, ...], goal: str) -> list[Measurement]:
    """Forward and backward, then the forward alone. Gradients are dense and come in the layout of the outputs."""
    leaves = [x.requires_grad_() for x in inputs]
    outputs = as_tuple(function("cpp", *inputs))
    upstream = [torch.ones_like(x) for x in outputs]

    def both(impl: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(as_tuple(function(impl, *inputs)), leaves, upstream)

    def forward(impl: str) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(impl, *inputs))

    names, pairs = ("torch", "cpp"), [("torch", "cpp")]
    return [
        compare(f"{case}, forward and backward", {name: both(name) for name in names}, pairs, goal=goal),
        compare(f"{case}, forward", {name: forward(name) for name in names}, pairs, seconds=2),
    ]


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == "__main__":
    main()
