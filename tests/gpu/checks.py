"""Everything that must hold for a kernel on a device: the shared list of cases, and what only a GPU can show.

A check is a name and a function that says what is wrong, so that pytest can assert that nothing is, and `make gpu` can
run all of them where there is no pytest and report every failure. Truth is the reference in float64 on the same
device; how close an implementation must come to it is the rule in `kernels/cases.py`.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels import add_norm, causal_attention, packed_causal_attention, qkv_heads, softmax_cross_entropy
from chargpt.kernels.philox import dropout_keep_mask, row_keep_mask
from kernels.cases import (
    ATTENTION_CASES,
    CROSS_ENTROPY_CASES,
    DRAWS,
    AttentionCase,
    CrossEntropyCase,
    assert_as_right_as_torch,
    implementations,
    kept_share,
    torch_attention,
    torch_cross_entropy,
)
from kernels.loss_curve import DIFFERENCE, small_model, training_losses

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = 2024
# Of float32, for the lse of 16-bit inputs, which torch's plain path adds up exactly. Tensor cores cut sums off two bits
# below float32: emulated, that made an lse of 256 channels wrong by 1.2 units.
TENSOR_CORE_UNITS = 2

# Sizes that fill a GPU with blocks, and head sizes and lengths at the edges of its tiles.
LARGE_ATTENTION_CASES = [
    AttentionCase("model_T256", B=8, H=6, T=256, D=64, packed=True),
    AttentionCase("model_T256_dropout", B=8, H=6, T=256, D=64, packed=True, options={"dropout_p": 0.2}),
    AttentionCase("gpt2_T1024", B=2, H=12, T=1024, D=64, packed=True),
    AttentionCase("T4096_D128", B=1, H=4, T=4096, D=128),
    *(AttentionCase(f"T{T}_D{D}", B=1, H=3, T=T, D=D) for D in (32, 64, 128) for T in (127, 129, 511, 513)),
    *(AttentionCase(f"T200_D{D}", B=1, T=200, D=D) for D in (24, 48, 72, 96, 160, 192)),
    AttentionCase("grouped_T300_D128", B=2, H=32, H_kv=8, T=300, D=128),
    AttentionCase("window_T1000", B=1, H=4, T=1000, D=64, options={"window": 100, "dropout_p": 0.1}),
    AttentionCase("one_query_of_4000", H=8, H_kv=2, T=1, S=4000, D=64),
    AttentionCase("many_heads", B=66_000, H=1, T=3, D=16),  # more than 65,535, which is the most in a grid's y and z
]
LARGE_CROSS_ENTROPY_CASES = [
    CrossEntropyCase("rows_100000_V65", shape=(100_000,), V=65, ignored=0.1),
    CrossEntropyCase("rows_70000_V3", shape=(70_000,), V=3),
    *(CrossEntropyCase(f"rows_500_V{V}", shape=(500,), V=V, ignored=0.1) for V in (32_000, 50_257, 50_304, 128_256)),
    CrossEntropyCase("rows_100_V300000", shape=(100,), V=300_000),  # no block holds such a row
]


@dataclass(frozen=True)
class NormCase:
    """A branch of N rows and C channels is dropped out, added to the stream, and normalised."""

    N: int
    C: int
    norm: str = "layernorm"
    gains: int = 2  # weight, bias
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return f"{self.norm}_{self.N}x{self.C}_gains{self.gains}_p{self.dropout_p}"

    def inputs(self, dtype: torch.dtype, draw: int, device: str) -> list[Tensor]:
        """x, y, weight, bias, as leaves; the same on every device."""
        generator = torch.Generator().manual_seed(self.N + 7 * self.C + draw)
        shapes = [(self.N, self.C), (self.N, self.C), *[(self.C,)] * self.gains]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(device, dtype).requires_grad_() for x in drawn]


NORM_CASES = [
    *(NormCase(N, C) for N, C in ((1, 1), (3, 65), (700, 384), (40, 1600), (5, 4096), (3, 5000))),
    *(
        NormCase(700, 128, norm, gains)
        for norm, gains in (("layernorm", 0), ("layernorm", 1), ("rmsnorm", 0), ("rmsnorm", 2))
    ),
    *(NormCase(N, C, dropout_p=0.2) for N, C in ((3, 65), (700, 384))),
    NormCase(70_000, 65, dropout_p=0.5),
    NormCase(33, 100, "none", 0, 0.9),
]

# One case for each path through the kernels, to know within seconds whether they work at all. The CUDA kernels keep a
# head's keys and values resident where there are as many heads as multiprocessors, so there are 384 of them.
SMOKE_ATTENTION_CASES = [
    AttentionCase("smoke_resident", B=64, H=6, T=256, D=64, packed=True),
    AttentionCase("smoke_resident_dropout", B=64, H=6, T=256, D=64, packed=True, options={"dropout_p": 0.2}),
    AttentionCase("smoke_streaming", B=2, H=12, T=1024, D=64, packed=True),
    AttentionCase("smoke_D128", B=2, H=4, T=300, D=128),
    AttentionCase("smoke_grouped", B=2, H=8, H_kv=2, T=300, D=64),
]
SMOKE_NORM_CASE = NormCase(16_384, 384, dropout_p=0.2)
SMOKE_CROSS_ENTROPY_CASES = [
    CrossEntropyCase("smoke_V65", shape=(16_384,), V=65, ignored=0.1),
    CrossEntropyCase("smoke_V50257", shape=(256,), V=50_257, ignored=0.1),
]


class SkippedError(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold for one implementation."""

    name: str
    operation: str
    impl: str
    dtype: str
    family: str  # checks of one family run the same compiled kernels
    problems: Callable[[], list[str]]  # what is wrong, nothing when all is right. Raises SkippedError
    alone: bool = False  # it takes so much of the GPU's memory that no other check may run beside it

    def __str__(self) -> str:
        return f"{self.operation} {self.impl} {self.dtype} {self.name}"


def all_checks(device: str, impls: Iterable[str] | None = None, small: bool = False) -> list[Check]:
    """Every check of every implementation under test on `device`, or of those in `impls`.

    small: large cases shrink, and what needs a GPU or gigabytes is left out, so that a CPU walks through all the rest
    """
    checks = []
    for impl, dtype in _under_test("causal_attention", device, impls):
        large = map(_shrink_attention if small else _same, LARGE_ATTENTION_CASES)
        checks += [_attention_check(impl, dtype, case, device, DRAWS) for case in ATTENTION_CASES]
        checks += [_attention_check(impl, dtype, case, device, _draws(case)) for case in large]
        checks += [
            _check(f"packed_{p}", "causal_attention", impl, dtype, 64, packed_problems, p, device, small)
            for p in (0, 0.2)
        ]
        checks += [
            _check(f"dropout_mask_{mask}", "causal_attention", impl, dtype, mask.D, mask_problems, mask, device)
            for mask in MASKS
        ]
    for impl, dtype in _under_test("softmax_cross_entropy", device, impls):
        large = map(_shrink_cross_entropy if small else _same, LARGE_CROSS_ENTROPY_CASES)
        checks += [_cross_entropy_check(impl, dtype, case, device, DRAWS) for case in CROSS_ENTROPY_CASES]
        checks += [_cross_entropy_check(impl, dtype, case, device, [0]) for case in large]
    for impl, dtype in _under_test("add_norm", device, impls):
        checks += [_norm_check(impl, dtype, case, device, small) for case in NORM_CASES]
    around: dict[str, Callable[..., list[str]]] = {
        "compiles_into_one_graph": compile_problems,
        "trains_as_the_reference": training_problems,
    }
    if not small:
        around |= {
            "runs_on_the_current_stream": stream_problems,
            "can_be_captured_in_a_graph": capture_problems,
            "draws_anew_in_a_graph": dropout_capture_problems,
            "a_graphed_step": graphed_step_problems,
            "two_host_threads": thread_problems,
            "a_compiled_step": compiled_step_problems,
            "attention_beyond_2^31_elements": far_attention_problems,
            "cross_entropy_beyond_2^31_elements": far_cross_entropy_problems,
        }
    for impl in dict.fromkeys(impl for impl, _ in _under_test("causal_attention", device, impls)):
        checks += [
            _check(name, "both operations", impl, torch.bfloat16, "both", problems, device)
            for name, problems in around.items()
        ]
    return [dataclasses.replace(check, alone="beyond_2^31" in check.name) for check in checks]


def smoke_checks(device: str, small: bool = False) -> list[Check]:
    """One check for each path through the kernels, in bfloat16."""
    attention = map(_shrink_attention if small else _same, SMOKE_ATTENTION_CASES)
    loss = map(_shrink_cross_entropy if small else _same, SMOKE_CROSS_ENTROPY_CASES)
    dtype = torch.bfloat16
    return [
        *(
            _attention_check(impl, dtype, case, device, [0])
            for case in attention
            for impl, of in _under_test("causal_attention", device)
            if of == dtype
        ),
        *(
            _cross_entropy_check(impl, dtype, case, device, [0])
            for case in loss
            for impl, of in _under_test("softmax_cross_entropy", device)
            if of == dtype
        ),
        *(
            _norm_check(impl, dtype, SMOKE_NORM_CASE, device, small)
            for impl, of in _under_test("add_norm", device)
            if of == dtype
        ),
    ]


def _under_test(operation: Any, device: str, impls: Iterable[str] | None = None) -> list[tuple[str, torch.dtype]]:
    """Pairs of an implementation and a dtype. On a GPU the reference is the truth, and has no kernel to prove there."""
    pairs = implementations(operation, *DTYPES, device=device)
    return [
        (impl, dtype)
        for impl, dtype in pairs
        if (impl in impls if impls is not None else impl != "torch" or device == "cpu")
    ]


def _attention_check(impl: str, dtype: torch.dtype, case: AttentionCase, device: str, draws: Iterable[int]) -> Check:
    return _check(case.name, "causal_attention", impl, dtype, case.D, attention_problems, case, device, draws)


def _cross_entropy_check(
    impl: str, dtype: torch.dtype, case: CrossEntropyCase, device: str, draws: Iterable[int]
) -> Check:
    return _check(case.name, "softmax_cross_entropy", impl, dtype, case.V, cross_entropy_problems, case, device, draws)


def _norm_check(impl: str, dtype: torch.dtype, case: NormCase, device: str, small: bool) -> Check:
    shrunk = dataclasses.replace(case, N=min(case.N, 100)) if small else case
    return _check(str(case), "add_norm", impl, dtype, case.C, norm_problems, shrunk, device)


def _check(
    name: str,
    operation: str,
    impl: str,
    dtype: torch.dtype,
    family: object,
    problems: Callable[..., list[str]],
    *arguments: Any,
) -> Check:
    short = str(dtype).removeprefix("torch.")
    return Check(name, operation, impl, short, f"{impl} {short} {family}", partial(problems, impl, dtype, *arguments))


def _draws(case: AttentionCase) -> range:
    """One draw of a large case holds as many numbers as all those of a small one."""
    return range(1) if case.B * case.H * case.T * case.D > 100_000 else DRAWS


def _same(case: Any) -> Any:
    return case


def _shrink_attention(case: AttentionCase) -> AttentionCase:
    S = None if case.S is None else -(-case.S // 16)
    return dataclasses.replace(case, B=min(case.B, 2), T=-(-case.T // 16), S=S)


def _shrink_cross_entropy(case: CrossEntropyCase) -> CrossEntropyCase:
    return dataclasses.replace(case, shape=(case.shape[0] // 100,))


# ------------------------------------------------------------------------------------------------------------- numerics


def attention_problems(
    impl: str, dtype: torch.dtype, case: AttentionCase, device: str, draws: Iterable[int] = DRAWS
) -> list[str]:
    """O, lse, dQ, dK and dV against the truth, and whether a second call gives the same bits."""
    keep, dropout_p = None, case.options.get("dropout_p", 0.0)
    if dropout_p > 0:
        T, S = case.T, case.S or case.T
        keep = dropout_keep_mask(_drawn_seed(), dropout_p, case.B * case.H, T, S, device).view(case.B, case.H, T, S)
    triples: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(5)]
    problems = []
    for draw in draws:
        inputs = case.inputs(dtype, draw, device)
        got = _attend(inputs, impl, case.options)
        if draw == 0 and not _same_bits(got, _attend(inputs, impl, case.options)):
            problems.append("a second call gives other bits")
        exact = tuple(x.detach().double().requires_grad_() for x in inputs)
        outputs = causal_attention(*exact, generator=_generator(), return_lse=True, impl="torch", **case.options)
        truth = (*outputs, *_gradients_of(outputs, exact))
        plain_out = torch_attention(*inputs, keep=keep, **case.options)[0]
        plain_lse = torch_attention(*(x.float() for x in inputs), **case.options)[1]
        plain = (plain_out, plain_lse, *_gradients_of((plain_out, plain_lse), inputs))
        for column, triple in zip(triples, zip(got, truth, plain, strict=True), strict=True):
            column.append(tuple(x.detach() for x in triple))
    for name, column in zip(("O", "lse", "dQ", "dK", "dV"), triples, strict=True):
        problems += _judged(name, column, _units(name, dtype, triples[1]))
    return problems


def packed_problems(impl: str, dtype: torch.dtype, dropout_p: float, device: str, small: bool) -> list[str]:
    """A packed projection's result and gradient are, bit for bit, those of its heads, which other checks judge."""
    B, H, H_kv, T, D = (2, 4, 2, 17, 64) if small else (8, 6, 6, 256, 64)
    numbers = torch.Generator().manual_seed(5)
    drawn = torch.randn(B, T, (H + 2 * H_kv) * D, generator=numbers)
    qkv = drawn.to(device, dtype).requires_grad_()
    heads: Any = {"n_head": H, "n_kv_head": H_kv}
    with poisoned_memory():
        together = packed_causal_attention(qkv, **heads, dropout_p=dropout_p, generator=_generator(), impl=impl)
        q, k, v = qkv_heads(qkv, **heads, qk_norm=False, impl=impl)
        out = causal_attention(q, k, v, dropout_p=dropout_p, generator=_generator(), impl=impl)
        apart = out.transpose(1, 2).flatten(2)
        found, expected = (_gradients_of((x,), (qkv,)) for x in (together, apart))
    pairs = {"O": ((together,), (apart,)), "the gradient": (found, expected)}
    return [f"{name} has other bits than that of the heads" for name, pair in pairs.items() if not _same_bits(*pair)]


def _units(name: str, dtype: torch.dtype, lse: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """In the last place. The backward pass makes P = exp(S − lse) of an lse in float32, which torch's keeps nowhere: it
    is rounded, and so is the difference, each by half of the spacing of floats of that size."""
    if dtype != torch.float32:
        return TENSOR_CORE_UNITS if name == "lse" else 1
    if name in ("O", "lse"):
        return 1
    largest = max((truth.abs().max().item() for _, truth, _ in lse if truth.numel()), default=0)
    return max(1.0, 2.0 ** math.floor(math.log2(max(largest, 1))))


def cross_entropy_problems(
    impl: str, dtype: torch.dtype, case: CrossEntropyCase, device: str, draws: Iterable[int] = DRAWS
) -> list[str]:
    """Loss and gradient against the truth, and whether a second call gives the same bits."""
    losses, gradients, problems = [], [], []
    for draw in draws:
        logits, targets = case.inputs(dtype, draw, device)
        got, gradient = _loss(logits, targets, impl, case.options)
        if draw == 0 and not _same_bits((got, gradient), _loss(logits, targets, impl, case.options)):
            problems.append("a second call gives other bits")
        exact = logits.detach().double().requires_grad_()
        truth = softmax_cross_entropy(exact, targets, impl="torch", **case.options)
        plain = torch_cross_entropy(logits, targets, **case.options)
        losses.append((got, truth.detach(), plain.detach()))
        gradients.append((gradient, _loss_gradient(truth, exact), _loss_gradient(plain, logits)))
    return problems + _judged("loss", losses) + _judged("gradient", gradients)


# Of the gradients of weight and bias, sums over all rows, whose order is not torch's.
GAIN_UNITS = 8


def norm_problems(impl: str, dtype: torch.dtype, case: NormCase, device: str) -> list[str]:
    """The sum, its norm and all gradients against the truth, and whether a second call gives the same bits."""
    options: dict[str, Any] = {"norm": case.norm, "dropout_p": case.dropout_p}

    def results(inputs: list[Tensor], function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        with poisoned_memory():
            outputs = function(*inputs)
            return *(x.detach() for x in outputs), *_gradients_of(outputs, tuple(inputs))

    def tested(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(*inputs, generator=_generator(), impl=impl, **options)

    def exact(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(*inputs, generator=_generator(), impl="torch", **options)

    def plain(x: Tensor, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if case.dropout_p:
            keep = row_keep_mask(_drawn_seed(), case.dropout_p, case.N, case.C, device)
            y = torch.where(keep, y / kept_share(case.dropout_p), 0)
        s = (x + y).to(dtype)
        if case.norm == "none":
            return s, s
        w, b = (None if gain is None else gain.float() for gain in (weight, bias))
        if case.norm == "layernorm":
            return s, F.layer_norm(s.float(), (case.C,), w, b).to(dtype)
        n = F.rms_norm(s.float(), (case.C,), w, 1e-6)
        return s, (n if b is None else n + b).to(dtype)

    columns, problems = [], []
    for draw in range(4):
        inputs = case.inputs(dtype, draw, device)
        got = results(inputs, tested)
        if draw == 0 and not _same_bits(got, results(inputs, tested)):
            problems.append("a second call gives other bits")
        truth = results([x.detach().double().requires_grad_() for x in inputs], exact)
        columns.append(list(zip(got, truth, results(inputs, plain), strict=True)))
    names = ("s", "norm", "dx", "dy", "dweight", "dbias")
    for name, triples in zip(names, zip(*columns, strict=True), strict=False):
        problems += _judged(name, list(triples), GAIN_UNITS if name in ("dweight", "dbias") else 1)
    return problems


def _judged(name: str, draws: list[tuple[Tensor, Tensor, Tensor]], units: float = 1) -> list[str]:
    try:
        assert_as_right_as_torch(name, draws, units)
    except AssertionError as error:
        return [str(error) or f"{name} is wrong"]
    return []


def _attend(inputs: tuple[Tensor, ...], impl: str, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """O, lse, dQ, dK and dV, from memory full of NaN, so that an element that nothing wrote is found."""
    with poisoned_memory():
        outputs = causal_attention(*inputs, generator=_generator(), return_lse=True, impl=impl, **options)
        return *(x.detach() for x in outputs), *_gradients_of(outputs, inputs)


def _loss(logits: Tensor, targets: Tensor, impl: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        loss = softmax_cross_entropy(logits, targets, impl=impl, **options)
        return loss.detach(), _loss_gradient(loss, logits)


def _gradients_of(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of fixed random linear functions of O and lse, so that both contribute."""
    weights = torch.Generator().manual_seed(7)
    upstream = [torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x) for x in outputs]
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)


def _loss_gradient(loss: Tensor, logits: Tensor) -> Tensor:
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return torch.autograd.grad(loss, logits, upstream)[0]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block torch.empty gives NaN, which torch does in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations of torch's own that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _same_bits(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _drawn_seed() -> Tensor:
    """The seed that causal_attention draws from `_generator()`; it has more than 32 bits."""
    return torch.randint(2**63 - 1, (), generator=_generator())


# --------------------------------------------------------------------------------------------------------- dropout mask


@dataclass(frozen=True)
class Mask:
    B: int
    H: int
    T: int
    S: int
    D: int
    dropout_p: float
    window: int | None = None

    def __str__(self) -> str:
        return f"T{self.T}_S{self.S}_D{self.D}_p{self.dropout_p}"


MASKS = [
    Mask(2, 3, 64, 64, 64, 0.2),
    Mask(1, 2, 130, 130, 32, 0.5),
    Mask(2, 2, 37, 101, 128, 0.9),
    Mask(1, 2, 300, 300, 64, 0.1, window=17),
]


def mask_problems(impl: str, dtype: torch.dtype, mask: Mask, device: str) -> list[str]:
    """The weights that survive dropout, bit for bit, as the forward and the backward pass see them.

    With q = k = 0 every visible weight is positive until it is dropped. Rows of an identity as values put D of the
    weights of each query into O; as dO they put D of the weights of each key into dV.
    """
    B, H, T, S, D = mask.B, mask.H, mask.T, mask.S, mask.D
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    visible = (distance >= 0) & (distance < (mask.window or S))
    kept = dropout_keep_mask(_drawn_seed(), mask.dropout_p, B * H, T, S, device).view(B, H, T, S) & visible
    q, k = (torch.zeros(B, H, n, D, dtype=dtype, device=device) for n in (T, S))
    options = {"dropout_p": mask.dropout_p, "window": mask.window, "impl": impl}
    forward, backward = torch.zeros_like(kept), torch.zeros_like(kept)
    for first in range(0, S, D):
        v = _identity_rows(S, D, first, q).requires_grad_()
        out = causal_attention(q, k, v, generator=_generator(), **options)
        width = min(D, S - first)
        forward[..., first : first + width] = out[..., :width] != 0
    for first in range(0, T, D):
        (dv,) = torch.autograd.grad(out, v, _identity_rows(T, D, first, q), retain_graph=True)  # (B, H, S, D)
        width = min(D, T - first)
        backward[:, :, first : first + width] = dv[..., :width].mT != 0
    return [
        f"the mask of the {name} pass differs from the rule at {int((got != kept).sum())} of {kept.numel()} weights"
        for name, got in (("forward", forward), ("backward", backward))
        if not torch.equal(got, kept)
    ]


def _identity_rows(rows: int, D: int, first: int, like: Tensor) -> Tensor:
    """(B, H, rows, D), zero but for a one at (first + j, j)."""
    numbers = torch.arange(rows, device=like.device)[:, None] - first == torch.arange(D, device=like.device)
    return numbers.to(like.dtype).expand(*like.shape[:2], rows, D).contiguous()


# ------------------------------------------------------------------------------------------- what surrounds the kernels


def compile_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """Under torch.compile each operation is one graph, forward and backward, and gives what it gives without."""
    q, k, v = AttentionCase("compile", H=4, H_kv=2, T=33, D=32).inputs(dtype, device=device)
    logits, targets = CrossEntropyCase("compile", ignored=0.3).inputs(dtype, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return causal_attention(q, k, v, window=9, return_lse=True, impl=impl)

    def lose(logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, targets, label_smoothing=0.1, impl=impl)

    torch.compiler.reset()
    # aot_eager traces forward and backward as inductor does, and generates no code
    compiled_attend, compiled_lose = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (attend, lose))
    problems = []
    got, eager = compiled_attend(q, k, v), attend(q, k, v)
    grads = (_gradients_of(outputs, (q, k, v)) for outputs in (got, eager))
    for name, x, y in zip(("O", "lse", "dQ", "dK", "dV"), (*got, *next(grads)), (*eager, *next(grads)), strict=True):
        problems += _close(f"compiled {name}", x, y)
    loss, eager_loss = compiled_lose(logits, targets), lose(logits, targets)
    problems += _close("compiled loss", loss, eager_loss)
    return problems + _close("compiled gradient", _loss_gradient(loss, logits), _loss_gradient(eager_loss, logits))


def _close(name: str, got: Tensor, expected: Tensor, **tolerance: float) -> list[str]:
    try:
        torch.testing.assert_close(got, expected, **tolerance)
    except AssertionError as error:
        return [f"{name}: {str(error).splitlines()[0]}"]
    return []


Work = Callable[[], tuple[Tensor, ...]]


def _work(impl: str, dtype: torch.dtype, device: str, T: int, V: int) -> tuple[tuple[Tensor, ...], Work]:
    """Inputs of both operations, and a function of them: O, the loss, and all gradients.

    There are heads for every multiprocessor, so that the CUDA kernels take shared memory by T and by V.
    """
    q, k, v = AttentionCase("work", B=24, H=6, T=T, D=64).inputs(dtype, device=device)
    logits, targets = CrossEntropyCase("work", shape=(1000,), V=V).inputs(dtype, device=device)
    upstream = torch.ones_like(q)

    def work() -> tuple[Tensor, ...]:
        out = causal_attention(q, k, v, impl=impl)
        loss = softmax_cross_entropy(logits, targets, impl=impl)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        return out.detach(), loss.detach(), *grads, *torch.autograd.grad(loss, logits)

    return (q, k, v, logits), work


def _two_works(impl: str, dtype: torch.dtype, device: str) -> list[tuple[tuple[Tensor, ...], Work]]:
    """One after the other they ask the same kernels for much shared memory, and for little."""
    return [_work(impl, dtype, device, T=512, V=50_257), _work(impl, dtype, device, T=256, V=32_000)]


def stream_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """On a stream whose inputs come late, kernels on any other stream would read the NaN from before."""
    inputs, work = _work(impl, dtype, device, T=256, V=65)
    expected = work()
    values = [x.detach().clone() for x in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for x in inputs:
            x.fill_(math.nan)
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        for x, value in zip(inputs, values, strict=True):
            x.copy_(value)
        with torch.enable_grad():
            got = work()
    stream.synchronize()
    return [] if _same_bits(got, expected) else ["on another stream the results differ"]


def capture_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """One graph of two lengths and two vocabularies can be replayed on new inputs: nothing in it waited for the GPU,
    read from the host, or took the shared memory of another call."""
    works = _two_works(impl, dtype, device)
    _warm_up(lambda: [work() for _, work in works])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [work() for _, work in works]
    with torch.no_grad():
        for inputs, _ in works:
            for x in inputs:
                x.mul_(0.5)
    expected = [work() for _, work in works]
    graph.replay()
    torch.cuda.synchronize()
    same = all(_same_bits(xs, ys) for xs, ys in zip(got, expected, strict=True))
    return [] if same else ["the replayed graph gives other results"]


def dropout_capture_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """Each replay drops other weights, the same ones in both passes. With a seed on the CPU it would repeat one mask:
    that is refused, in words."""
    q, k, v = AttentionCase("capture", B=24, H=6, T=64, D=64).inputs(dtype, device=device)
    upstream = torch.randn_like(q)

    def both() -> tuple[Tensor, Tensor]:
        out = causal_attention(q, k, v, dropout_p=0.2, impl=impl)
        return out.detach(), torch.autograd.grad(out, v, upstream)[0]

    _warm_up(both)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dv = both()
    replays, problems = [], []
    for _ in range(2):
        graph.replay()
        replays.append(out.clone())
        # O is linear in V, with a matrix that dropout is part of
        left, right = ((x.double() * y.double()).sum() for x, y in ((upstream, out), (dv, v)))
        scale = (upstream.double() * out.double()).abs().sum()
        if not (left - right).abs() < 1e-4 * scale:
            problems.append(f"replayed, the passes drop different weights: ⟨dO, O⟩ = {left:.6g}, ⟨dV, V⟩ = {right:.6g}")
    if torch.equal(*replays):
        problems.append("every replay drops the same weights")
    # The backward runs on the forward's stream: captured on another, the error would be of that, and not ours.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = causal_attention(q, k, v, dropout_p=0.2, generator=_generator(), impl=impl).sum()
        for name, call in (
            ("forward", lambda: causal_attention(q, k, v, dropout_p=0.2, generator=_generator(), impl=impl)),
            ("backward", lambda: torch.autograd.grad(out, (q, k, v))),
        ):
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                    call()
                problems.append(f"the {name} pass was captured with a seed on the CPU")
            except RuntimeError as error:
                if "dropout" not in str(error):
                    problems.append(f"the {name} pass refused without a reason: {error}"[:400])
            torch.cuda.synchronize()
    return problems


def graphed_step_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """200 steps of training, recorded once and replayed, give the losses of eager steps: each with its own batch,
    learning rate and dropout."""
    graphed, eager = (training_losses(impl, device, graphed=graphed) for graphed in (True, False))
    difference = (graphed - eager).abs().max().item()
    return [] if difference < DIFFERENCE else [f"losses differ by {difference:.2g}, allowed {DIFFERENCE:.2g}"]


def _warm_up(function: Callable[[], object]) -> None:
    """The first call may load modules, which a capture forbids."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)


def thread_problems(impl: str, dtype: torch.dtype, device: str, times: int = 50) -> list[str]:
    """Two host threads on streams of their own, whose calls take different amounts of shared memory, and at once."""
    works = _two_works(impl, dtype, device)
    expected = [work() for _, work in works]
    torch.cuda.synchronize()

    def repeat(number: int) -> list[str]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(times):
                got = works[number][1]()
                stream.synchronize()
                if not _same_bits(got, expected[number]):
                    return [f"host thread {number} gets other results than alone"]
        return []

    with ThreadPoolExecutor(len(works)) as threads:
        return [problem for problems in threads.map(repeat, range(len(works))) for problem in problems]


def training_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """200 steps of training give the losses that they give on the reference, up to rounding."""
    if impl == "torch":
        return []
    ours, reference = (training_losses(kernels, device) for kernels in (impl, "torch"))
    if not reference[-1] < 0.8 * reference[0]:
        return [f"the reference learnt nothing: its loss went from {reference[0]:.3f} to {reference[-1]:.3f}"]
    difference = (ours - reference).abs().max().item()
    return [] if difference < DIFFERENCE else [f"losses differ by {difference:.2g}, allowed {DIFFERENCE:.2g}"]


def compiled_step_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """Loss and gradients of a model that inductor compiled are as right as those of the model run eagerly."""
    model = small_model(impl, device, dropout=0.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # at first attention is so even that an error in its scores would not show
    exact = small_model("torch", device, dropout=0.0).double()
    exact.load_state_dict(model.state_dict())
    torch.compiler.reset()
    compiled = torch.compile(model)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    draws: list[list[tuple[Tensor, ...]]] = [[] for _ in names]
    for draw in range(4):
        idx = torch.randint(20, (4, 33), generator=torch.Generator().manual_seed(draw)).to(device)
        results = []
        for called, weights in ((compiled, model), (exact, exact), (model, model)):
            loss = called(idx, idx.roll(-1, 1))
            results.append((loss.detach(), *torch.autograd.grad(loss, list(weights.parameters()))))
        for column, triple in zip(draws, zip(*results, strict=True), strict=True):
            column.append(triple)
    # Eager errors that are small by luck are no measure: eight units in the last place are always allowed.
    return [
        problem for name, column in zip(names, draws, strict=True) for problem in _judged(f"compiled {name}", column, 8)
    ]


# ----------------------------------------------------------------------------------------------- offsets beyond 32 bits


def far_attention_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """The last of 700 sequences whose packed projection has more than 2^31 elements."""
    B, T, H, D = 700, 1024, 16, 64
    _require_gigabytes(20)
    qkv = torch.randn(B, T, 3, H, D, dtype=dtype, device=device).requires_grad_()
    upstream = torch.randn(B, T, H, D, dtype=dtype, device=device).transpose(1, 2)
    assert qkv.numel() > 2**31

    def attend(qkv: Tensor, upstream: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        out = function(*(x.transpose(1, 2) for x in qkv.unbind(2)))
        (gradient,) = torch.autograd.grad(out, qkv, upstream)
        return out[-1:].detach(), gradient[-1:]

    got = attend(qkv, upstream, partial(causal_attention, impl=impl))
    last, last_upstream = qkv[-1:].detach().requires_grad_(), upstream[-1:]
    exact = last.detach().double().requires_grad_()
    truth = attend(exact, last_upstream.double(), partial(causal_attention, impl="torch"))
    plain = attend(last, last_upstream, lambda q, k, v: torch_attention(q, k, v)[0])
    triples = zip(("O", "dQ, dK and dV"), got, truth, plain, strict=True)
    return [problem for name, *triple in triples for problem in _judged(name, [tuple(triple)])]


def far_cross_entropy_problems(impl: str, dtype: torch.dtype, device: str) -> list[str]:
    """The last of 43,000 rows of 50,257 logits, which are more than 2^31."""
    N, V = 43_000, 50_257
    _require_gigabytes(16)
    logits = torch.randn(N, V, dtype=dtype, device=device).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    assert logits.numel() > 2**31
    loss = softmax_cross_entropy(logits, targets, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    last, y = logits[-8:].detach(), targets[-8:]
    columns = []
    for x, function in (
        (last.double(), partial(softmax_cross_entropy, impl="torch")),
        (last.clone(), torch_cross_entropy),
    ):
        x.requires_grad_()
        rows = function(x, y, reduction="none")
        columns.append((rows.detach(), torch.autograd.grad(rows.sum(), x)[0]))
    got = (loss[-8:].detach(), gradient[-8:])
    triples = zip(("loss", "gradient"), got, *columns, strict=True)
    return [problem for name, *triple in triples for problem in _judged(name, [tuple(triple)])]


def _require_gigabytes(needed: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < needed:
        raise SkippedError(f"needs {needed} GB of the GPU's memory, {free:.1f} GB are free")
