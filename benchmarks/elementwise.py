"""A block's small operators, forward and backward: the C++ kernels against the torch reference, run eagerly.

Run as `python -m benchmarks.elementwise [--threads 2]`. The dtypes are those of a step under bfloat16 autocast: the
residual stream is float32, and the branches, the norms and the projections are bfloat16.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Measurement, compare, report
from chargpt.kernels import activation, add_norm, qkv_heads

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

        def rms(impl: str, x: Tensor, y: Tensor) -> Outputs:
            with torch.autocast("cpu", half):  # noqa: B023
                return add_norm(x, y, norm="rmsnorm", impl=impl)

        def layer(impl: str, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, p: float = 0.0) -> Outputs:
            with torch.autocast("cpu", half):  # noqa: B023
                return add_norm(x, y, weight, bias, norm="layernorm", dropout_p=p, impl=impl)

        def with_dropout(impl: str, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
            """What a model in plain torch does: its own mask, three operations."""
            if impl == "cpp":
                return layer(impl, x, y, weight, bias, 0.2)
            s = x + F.dropout(y, 0.2)
            return s, F.layer_norm(s, s.shape[-1:], weight, bias).bfloat16()

        def heads(impl: str, qkv: Tensor, rows: Tensor, H: int = H, cos: Tensor = cos, sin: Tensor = sin) -> Outputs:
            return qkv_heads(qkv, rows, cos, sin, n_head=H, n_kv_head=H, qk_norm=True, impl=impl)

        gains = (1 + random(C), random(C))
        measurements += measure(f"add_norm rmsnorm {shape}", rms, (x, y), "4")
        measurements += measure(f"add_norm layernorm {shape}", layer, (x, y, *gains), "4")
        measurements += measure(f"add_norm layernorm, dropout 0.2 {shape}", with_dropout, (x, y, *gains), "4")
        measurements += measure(f"qkv_heads {shape}, {H} heads", heads, (qkv, rows), "4")
        for kind in ("relu2", "gelu", "gelu_tanh", "swiglu"):
            hidden = random(B, T, 8 * C if kind == "swiglu" else 4 * C).bfloat16()

            def function(impl: str, x: Tensor, kind: str = kind) -> Outputs:
                return activation(x, kind, impl=impl)

            measurements += measure(f"{kind} ({B}, {T}, {4 * C})", function, (hidden,), "2")
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
