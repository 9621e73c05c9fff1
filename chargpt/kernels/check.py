"""Whether a backend is right and fast on the device at hand: what `chargpt info --check` asks.

Each operation, forward and backward, over awkward shapes, against the reference in float64; then at a shape of training
in turns with the reference. The project's own tests ask for far more, on the machines of its developers.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.activation import KINDS, activation
from chargpt.kernels.ops.add_norm import NORMS, add_norm
from chargpt.kernels.ops.attention import causal_attention
from chargpt.kernels.ops.cross_entropy import softmax_cross_entropy
from chargpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from chargpt.kernels.ops.qkv_heads import qkv_heads

SEED = 2026
DTYPES = (torch.float32, torch.bfloat16)
MARGIN = 4.0  # times the error of the reference in the same dtype
UNITS = 8.0  # in the last place: an error that is always allowed
ROUNDS = 20  # of timing


@dataclass(frozen=True)
class Case:
    """One call: `function(*inputs, **options, impl=…)` on floating inputs of these shapes."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: Sequence[tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What was found of one operation."""

    checks: int
    problems: list[str]  # what is wrong, one sentence each
    speed: float  # the reference's time, forward and backward, through the backend's; 0 where something is wrong


def check(impl: str, device: str) -> dict[str, Finding]:
    """What the backend `impl` does on `device`, by operation, but for those that it leaves to the reference.

    Raises ConfigError when `impl` cannot run here.
    """
    found = {}
    for name, cases in _cases(device).items():
        operation = "softmax_cross_entropy" if name == "linear_cross_entropy" else name  # whose kernels it takes
        if registry.resolve(operation, device, torch.float32, impl).name == impl:
            pairs = [(case, dtype) for case in cases for dtype in DTYPES]
            problems = [problem for case, dtype in pairs for problem in _problems(case, impl, device, dtype)]
            found[name] = Finding(len(pairs), problems, 0.0 if problems else _speed(cases[-1], impl, device))
    return found


def _cases(device: str) -> dict[str, list[Case]]:
    """By operation. The last of each is of the size that a small model trains with, and is timed."""

    def attention(B: int, H: int, H_kv: int, T: int, S: int, D: int, **options: Any) -> Case:
        return Case(causal_attention, [(B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D)], options | {"return_lse": True})

    def targets(N: int, V: int) -> Tensor:  # some of them ignored
        n = torch.arange(N, device=device)
        return torch.where(n % 5 == 3, -100, 7 * n % V)

    def cross_entropy(N: int, V: int, **options: Any) -> Case:
        return Case(softmax_cross_entropy, [(N, V)], options | {"targets": targets(N, V)})

    def head(N: int, C: int, V: int) -> Case:
        return Case(linear_cross_entropy, [(N, C), (V, C)], {"targets": targets(N, V)})

    def norm(N: int, C: int, kind: str, p: float) -> Case:
        gains = [(C,), (C,)] if kind == "layernorm" else []
        return Case(add_norm, [(N, C), (N, C), *gains], {"norm": kind, "dropout_p": p})

    def heads(B: int, T: int, H: int, H_kv: int, D: int, *, whole: bool) -> Case:
        angles = torch.outer(torch.arange(T), 1 / torch.arange(1, D // 2 + 1)).to(device)
        tables = {"cos": angles.cos(), "sin": angles.sin()} if whole else {}
        options = {"n_head": H, "n_kv_head": H_kv, "qk_norm": whole} | tables
        return Case(qkv_heads, [(B, T, (H + 2 * H_kv) * D), (B, T, H_kv * D)], options)

    def active(N: int, C: int, kind: str) -> Case:
        return Case(activation, [(N, C)], {"kind": kind})

    return {
        "causal_attention": [
            attention(1, 1, 1, 1, 1, 1),
            attention(2, 4, 2, 7, 66, 31, window=9),
            attention(1, 2, 1, 65, 65, 80, dropout_p=0.2),
            attention(1, 3, 3, 300, 300, 128),
            attention(12, 4, 4, 64, 64, 32),
        ],
        "softmax_cross_entropy": [
            cross_entropy(1, 1),
            cross_entropy(17, 65, label_smoothing=0.1, z_loss=0.01, softcap=5.0),
            cross_entropy(40, 129),
            cross_entropy(3, 50257),
            cross_entropy(768, 65),
        ],
        "linear_cross_entropy": [head(5, 33, 65), head(300, 16, 50257)],
        "add_norm": [
            *(norm(N, C, kind, p) for N, C in ((1, 1), (40, 65)) for kind in NORMS for p in (0.0, 0.3)),
            norm(768, 128, "layernorm", 0.0),
        ],
        "qkv_heads": [
            heads(2, 7, 3, 1, 6, whole=True),
            heads(1, 65, 4, 2, 34, whole=True),
            heads(2, 9, 2, 2, 17, whole=False),
            heads(12, 64, 4, 4, 32, whole=True),
        ],
        "activation": [
            *(active(N, C, kind) for N, C in ((1, 2), (9, 130)) for kind in KINDS if kind != "none"),
            active(768, 512, "gelu"),
        ],
    }


def _inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def _outputs(case: Case, inputs: list[Tensor], impl: str) -> list[Tensor]:
    torch.manual_seed(SEED)  # of dropout
    made = case.function(*inputs, **case.options, impl=impl)
    return [made] if isinstance(made, Tensor) else list(made)


def _upstream(outputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed linear function."""
    return [torch.linspace(-1, 2, x.numel(), device=x.device).to(x.dtype).view(x.shape) for x in outputs]


def _results(case: Case, inputs: list[Tensor], impl: str) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = _outputs(case, inputs, impl)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, _upstream(outputs))]


def _problems(case: Case, impl: str, device: str, dtype: torch.dtype) -> list[str]:
    inputs = _inputs(case, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    what = f"{case.function.__name__} of {', '.join(map(str, case.shapes))} in {str(dtype).removeprefix('torch.')}"
    try:
        got = _results(case, inputs, impl)
    except Exception as error:  # whatever a compiler or a driver says on the devices of tomorrow
        return [f"{what}: {type(error).__name__}: {str(error)[:200]}"]
    columns = zip(got, _results(case, exact, "torch"), _results(case, inputs, "torch"), strict=True)
    return [f"{what}: {wrong}" for i, column in enumerate(columns) if (wrong := _wrong(f"result {i}", *column))]


def _wrong(name: str, got: Tensor, truth: Tensor, plain: Tensor) -> str | None:
    if got.shape != truth.shape or got.dtype != plain.dtype:
        return f"{name} is {got.dtype} {tuple(got.shape)}, expected {plain.dtype} {tuple(truth.shape)}"
    error, usual, size = (_rms(x) for x in (got.double() - truth, plain.double() - truth, truth))
    allowed = max(MARGIN * usual, UNITS * torch.finfo(got.dtype).eps * size)
    return None if error <= allowed else f"{name} has an error of {error:.3g} where {allowed:.3g} is allowed"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _speed(case: Case, impl: str, device: str) -> float:
    """Of the least times, in turns, so that other work on the machine does not decide."""
    inputs = _inputs(case, device, torch.float32)
    upstream = _upstream(_outputs(case, inputs, "torch"))
    least = {impl: math.inf, "torch": math.inf}
    for _ in range(ROUNDS):
        for name in least:
            begin = time.perf_counter()
            torch.autograd.grad(_outputs(case, inputs, name), inputs, upstream)
            if device != "cpu":
                torch.cuda.synchronize()
            least[name] = min(least[name], time.perf_counter() - begin)
    return least["torch"] / least[impl]
