"""Whether a backend is right and fast on the device at hand: what `chargpt info --check` asks.

Each operation, forward and backward, over awkward shapes, against the reference in float64; then at a shape of training
in turns with the reference. The project's own tests ask for far more, on the machines of its developers.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.cases import ATTENTION_CASES, CROSS_ENTROPY_CASES, AttentionCase, CrossEntropyCase
from chargpt.kernels.ops.activation import KINDS, activation
from chargpt.kernels.ops.add_norm import NORMS, add_norm
from chargpt.kernels.ops.attention import causal_attention
from chargpt.kernels.ops.cross_entropy import softmax_cross_entropy
from chargpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from chargpt.kernels.ops.packed_attention import packed_causal_attention
from chargpt.kernels.ops.qkv_heads import qkv_heads

SEED = 2026
DTYPES = (torch.float32, torch.bfloat16)
MARGIN = 8.0  # times the error of the reference in the same dtype, which in one draw may be lucky: 4.3 was seen
UNITS = 8.0  # in the last place: an error that is always allowed
ROUNDS = 20  # of timing


@dataclass(frozen=True)
class Case:
    """One call: `function(*inputs(dtype), **options, impl=…)`."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    name: str
    inputs: Callable[[torch.dtype], Sequence[Tensor]]  # floating ones, which want gradients
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
            problems = [problem for case, dtype in pairs for problem in _problems(case, impl, dtype)]
            found[name] = Finding(len(pairs), problems, 0.0 if problems else _speed(cases[-1], impl, device))
    return found


def _cases(device: str) -> dict[str, list[Case]]:
    """By operation. The last of each is of the size that a small model trains with, and is timed."""

    def of(function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Case:
        return Case(function, f"of {', '.join(map(str, shapes))}", partial(_drawn, shapes, device), options)

    def attention(case: AttentionCase) -> Case:
        inputs = partial(case.inputs, device=device)
        return Case(causal_attention, f"in case {case.name}", inputs, case.options | {"return_lse": True})

    def cross_entropy(case: CrossEntropyCase) -> Case:
        options = case.options | {"targets": case.inputs(device=device)[1]}
        return Case(
            softmax_cross_entropy, f"in case {case.name}", lambda dtype: case.inputs(dtype, device=device)[:1], options
        )

    def head(N: int, C: int, V: int) -> Case:
        n = torch.arange(N, device=device)
        return of(linear_cross_entropy, (N, C), (V, C), targets=torch.where(n % 5 == 3, -100, 7 * n % V))

    def norm(N: int, C: int, kind: str, p: float) -> Case:
        gains = [(C,), (C,)] if kind == "layernorm" else []
        return of(add_norm, (N, C), (N, C), *gains, norm=kind, dropout_p=p)

    def heads(B: int, T: int, H: int, H_kv: int, D: int, *, whole: bool) -> Case:
        angles = torch.outer(torch.arange(T), 1 / torch.arange(1, D // 2 + 1)).to(device)
        tables = {"cos": angles.cos(), "sin": angles.sin()} if whole else {}
        shapes = (B, T, (H + 2 * H_kv) * D), (B, T, H_kv * D)
        return of(qkv_heads, *shapes, n_head=H, n_kv_head=H_kv, qk_norm=whole, **tables)

    def active(N: int, C: int, kind: str) -> Case:
        return of(activation, (N, C), kind=kind)

    return {
        "causal_attention": [
            *map(attention, ATTENTION_CASES),
            of(packed_causal_attention, (2, 65, 4 * 48), n_head=2, n_kv_head=1, dropout_p=0.2),
            attention(AttentionCase("small_model", B=12, H=4, T=64, D=32)),
        ],
        "softmax_cross_entropy": [
            *map(cross_entropy, CROSS_ENTROPY_CASES),
            cross_entropy(CrossEntropyCase("small_model", shape=(768,))),
        ],
        "linear_cross_entropy": [head(5, 33, 65), head(510, 8, 50257), head(300, 16, 50257)],  # in parts on a CPU
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


def _drawn(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def _outputs(case: Case, inputs: Sequence[Tensor], impl: str) -> list[Tensor]:
    torch.manual_seed(SEED)  # of dropout
    made = case.function(*inputs, **case.options, impl=impl)
    return [made] if isinstance(made, Tensor) else list(made)


def _upstream(outputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed linear function."""
    return [torch.linspace(-1, 2, x.numel(), device=x.device).to(x.dtype).view(x.shape) for x in outputs]


def _results(case: Case, inputs: Sequence[Tensor], impl: str) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = _outputs(case, inputs, impl)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, _upstream(outputs))]


def _problems(case: Case, impl: str, dtype: torch.dtype) -> list[str]:
    inputs = case.inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    what = f"{case.function.__name__} {case.name} in {str(dtype).removeprefix('torch.')}"
    try:
        got = _results(case, inputs, impl)
    except Exception as error:  # whatever a compiler or a driver says on the devices of tomorrow
        return [f"{what}: {type(error).__name__}: {str(error)[:200]}"]
    columns = zip(got, _results(case, exact, "torch"), _results(case, inputs, "torch"), strict=True)
    return [f"{what}: {wrong}" for i, column in enumerate(columns) if (wrong := _wrong(f"result {i}", *column))]


def _wrong(name: str, got: Tensor, truth: Tensor, plain: Tensor) -> str | None:
    if got.shape != truth.shape or got.dtype != plain.dtype:
        return f"{name} is {got.dtype} {tuple(got.shape)}, expected {plain.dtype} {tuple(truth.shape)}"
    if truth.numel() == 0:
        return None
    error, usual, size = (_rms(x) for x in (got.double() - truth, plain.double() - truth, truth))
    allowed = max(MARGIN * usual, UNITS * torch.finfo(got.dtype).eps * size)
    return None if error <= allowed else f"{name} has an error of {error:.3g} where {allowed:.3g} is allowed"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _speed(case: Case, impl: str, device: str) -> float:
    inputs = case.inputs(torch.float32)
    upstream = _upstream(_outputs(case, inputs, "torch"))

    def walk(name: str) -> None:
        torch.autograd.grad(_outputs(case, inputs, name), inputs, upstream)
        if device != "cpu":
            torch.cuda.synchronize()

    return ratio(partial(walk, "torch"), partial(walk, impl), ROUNDS)


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """The time of one through that of the other: of the least, in turns, so that other work does not decide."""
    least = {slow: math.inf, fast: math.inf}
    for _ in range(rounds):
        for function in least:
            begin = time.perf_counter()
            function()
            least[function] = min(least[function], time.perf_counter() - begin)
    return least[slow] / least[fast]
