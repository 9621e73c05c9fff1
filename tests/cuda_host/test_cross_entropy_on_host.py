"""csrc/cuda/cross_entropy.cu, run on the CPU: the shared cases, against the truth in float64."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cases import (
    CROSS_ENTROPY_CASES,
    CrossEntropyCase,
    assert_as_right_as_torch,
    naive_cross_entropy,
    torch_cross_entropy,
)

from .build import library

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of DType
REDUCTIONS = ["none", "sum", "mean"]


class Options(ctypes.Structure):
    _fields_ = (
        ("ignore_index", ctypes.c_int64),
        ("label_smoothing", ctypes.c_double),
        ("z_loss", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class Problem(ctypes.Structure):
    """struct CrossEntropy"""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("logits", ctypes.c_void_p),
        ("N", ctypes.c_int64),
        ("V", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("options", Options),
        ("reduction", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    return library("cross_entropy")


# The last two hold 0.78 of a row of 2057 in float32, or in 16 bits.
@pytest.fixture(
    params=[(2, 232448), (1, 9000), (2, 2000), (1, 768 + 16 * 400), (2, 768 + 16 * 200)],
    ids=["row_held", "few_blocks", "row_read_twice", "float32_held_in_part", "halves_held_in_part"],
)
def chip(request: pytest.FixtureRequest, host: ctypes.CDLL) -> Any:
    """Multiprocessors and shared memory, which choose between the kernels for long rows."""
    host.set_chip(*request.param)
    yield
    host.set_chip(2, 232448)


class Run:
    """One call, and what its kernels need: rows as the binding makes them."""

    def __init__(self, host: ctypes.CDLL, logits: Tensor, targets: Tensor, **options: Any) -> None:
        self.host, self.shape, self.reduction = host, targets.shape, options.get("reduction", "mean")
        rows = logits.detach().reshape(-1, logits.shape[-1])
        self.rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
        self.targets = targets.reshape(-1).contiguous()
        self.N, self.V = rows.shape
        self.problem = Problem(
            DTYPES.index(logits.dtype),
            self.rows.data_ptr(),
            self.N,
            self.V,
            self.rows.stride(0),
            self.targets.data_ptr(),
            Options(
                options.get("ignore_index", -100),
                options.get("label_smoothing", 0),
                options.get("z_loss", 0),
                options.get("softcap") or 0,
            ),
            REDUCTIONS.index(self.reduction),
        )
        self.loss = torch.full(self.shape if self.reduction == "none" else (), torch.nan)
        self.normalisers = torch.full((2, self.N), torch.nan)

    def forward(self, with_gradient: bool) -> Tensor | None:
        gradient = self._new_gradient() if with_gradient else None
        arguments = [self.loss, self.normalisers, gradient]
        assert self.host.forward(ctypes.byref(self.problem), *map(pointer, arguments)) == 0
        return gradient

    def backward(self, upstream: Tensor) -> Tensor:
        gradient = self._new_gradient()
        arguments = [upstream.float().contiguous(), self.normalisers, gradient]
        assert self.host.backward(ctypes.byref(self.problem), *map(pointer, arguments)) == 0
        return gradient

    def _new_gradient(self) -> Tensor:
        return torch.full((*self.shape, self.V), torch.nan, dtype=self.rows.dtype)


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    assert x is None or x.is_contiguous()
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def check(host: ctypes.CDLL, case: CrossEntropyCase, dtype: torch.dtype, draws: int) -> None:
    """Loss and gradient, the gradient both from the forward and from the backward, that is, with numbers flowing in."""
    losses, forwards, backwards = [], [], []
    for draw in range(draws):
        logits, targets = case.inputs(dtype, draw)
        exact = logits.detach().double().requires_grad_()
        truth = naive_cross_entropy(exact, targets, **case.options)
        plain = torch_cross_entropy(logits, targets, **case.options)

        def gradients(upstream: Tensor) -> tuple[Tensor, Tensor]:
            return (
                torch.autograd.grad(truth, exact, upstream.double(), retain_graph=True)[0],  # noqa: B023
                torch.autograd.grad(plain, logits, upstream, retain_graph=True)[0],  # noqa: B023
            )

        run = Run(host, logits, targets, **case.options)
        gradient = run.forward(with_gradient=True)
        assert gradient is not None
        losses.append((run.loss, truth, plain))
        forwards.append((gradient, *gradients(torch.ones_like(run.loss))))
        upstream = torch.linspace(0.5, 2, run.loss.numel()).reshape(run.loss.shape)
        backwards.append((run.backward(upstream), *gradients(upstream)))

        alone = Run(host, logits, targets, **case.options)
        alone.forward(with_gradient=False)
        torch.testing.assert_close(alone.loss, run.loss, rtol=1e-6, atol=1e-6)
    assert_as_right_as_torch("loss", losses)
    assert_as_right_as_torch("gradient", forwards)
    assert_as_right_as_torch("gradient of the backward", backwards)


SHORT = [case for case in CROSS_ENTROPY_CASES if case.V <= 1000]
LONG = [case for case in CROSS_ENTROPY_CASES if case.V > 1000]
# Beyond the registers, so that a block has a row: just, and by much; 2057 is odd.
BLOCK_ROWS = [
    CrossEntropyCase("V2057", V=2057),
    CrossEntropyCase("V2057_some_ignored", shape=(40,), V=2057, ignored=0.4),
    CrossEntropyCase("V2057_all_ignored", V=2057, ignored=1.0),
    CrossEntropyCase("V2057_minus_inf_none", V=2057, minus_inf=True, options={"reduction": "none"}),
    CrossEntropyCase("V2057_huge", V=2057, spread=1e4),
    CrossEntropyCase("V4100_sliced", shape=(3, 4), V=4100, sliced=True, options={"label_smoothing": 0.1}),
    CrossEntropyCase(
        "V2057_everything",
        shape=(4, 9),
        V=2057,
        ignored=0.3,
        options={"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "reduction": "none"},
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_loses_no_more_than_torch(host: ctypes.CDLL, case: CrossEntropyCase, dtype: torch.dtype) -> None:
    check(host, case, dtype, draws=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BLOCK_ROWS, ids=lambda case: case.name)
@pytest.mark.usefixtures("chip")
def test_rows_of_a_block_lose_no_more_than_torch(host: ctypes.CDLL, case: CrossEntropyCase, dtype: torch.dtype) -> None:
    check(host, case, dtype, draws=2)


@pytest.mark.parametrize(("name", "dtype"), [("everything_V50257", torch.bfloat16), ("V50304", torch.float32)], ids=str)
def test_vocabulary_of_gpt2(host: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    (case,) = (case for case in LONG if case.name == name)
    check(host, case, dtype, draws=1)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("V", [5, 65, 2057])
def test_any_alignment_gives_the_same_bits(host: ctypes.CDLL, V: int, offset: int) -> None:
    """Logits and gradient at each address modulo 16 bytes: chunks are cut elsewhere, sums have another order."""
    logits, targets = CrossEntropyCase("aligned", V=V).inputs(torch.bfloat16)
    moved = torch.empty(logits.numel() + 8, dtype=torch.bfloat16)
    moved = moved[offset : offset + logits.numel()].view_as(logits).copy_(logits.detach())
    run, shifted = Run(host, logits, targets), Run(host, moved, targets)
    gradient, other = run.forward(with_gradient=True), shifted.forward(with_gradient=True)
    torch.testing.assert_close(shifted.loss, run.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other, gradient, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("V", [5, 65, 1000, 2057])
@pytest.mark.parametrize("target", [-1, 10**10, "V"])
def test_a_target_out_of_range_makes_nan_of_its_row_alone(host: ctypes.CDLL, V: int, target: int | str) -> None:
    logits, targets = CrossEntropyCase("out_of_range", V=V).inputs(torch.float32)
    targets[2] = V if target == "V" else target
    run = Run(host, logits, targets, reduction="none")
    expected = torch.arange(len(targets)) == 2
    for gradient in (run.forward(with_gradient=True), run.backward(torch.ones(len(targets)))):
        assert gradient is not None
        assert torch.equal(gradient.isnan().all(-1), expected)
        assert torch.equal(gradient.isnan().any(-1), expected)
    assert torch.equal(run.loss.isnan(), expected)
    mean = Run(host, logits, targets)
    mean.forward(with_gradient=False)
    assert mean.loss.isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("V", [5, 65, 1000, 2057])
def test_nan_and_infinity_are_not_hidden(host: ctypes.CDLL, V: int, value: float) -> None:
    logits = torch.zeros(3, V)
    logits[1, V - 1] = value
    run = Run(host, logits, torch.zeros(3, dtype=torch.int64), reduction="none")
    gradient = run.forward(with_gradient=True)
    assert gradient is not None
    assert run.loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("V", [65, 2057])
def test_ignored_rows_are_zero_whatever_is_in_them(host: ctypes.CDLL, V: int) -> None:
    logits = torch.full((5, V), torch.nan)
    logits[::2] = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, -100, 0, -100, 2])
    run = Run(host, logits, targets, z_loss=0.1, label_smoothing=0.1)
    for gradient in (run.forward(with_gradient=True), run.backward(torch.tensor(1.0))):
        assert gradient is not None
        assert (gradient.abs().sum(-1) > 0).tolist() == [True, False, True, False, True]
    assert run.loss.isfinite()


SPAN = 16384  # rows that one block counts, and whose losses it adds
# Its low 32 bits are those of 0, a target.
FAR_INDEX = -(2**40)


class ManyRows:
    """Rows of one logit, whose loss with a z-loss of 1 is the logit's square. As integers all sums are exact."""

    def __init__(self, host: ctypes.CDLL, N: int, kept: str = "three_quarters") -> None:
        row = torch.arange(N)
        self.kept = {
            "all": row >= 0,
            "three_quarters": row % 4 != 1,
            "one_of_each_span": row % SPAN == 7,
            "the_last": row == N - 1,
            "none": row < 0,
        }[kept]
        logits = torch.randint(1, 6, (N, 1), generator=torch.Generator().manual_seed(N)).float()
        targets = torch.where(self.kept, 0, FAR_INDEX)
        self.runs = {
            reduction: Run(host, logits, targets, z_loss=1.0, ignore_index=FAR_INDEX, reduction=reduction)
            for reduction in REDUCTIONS
        }
        losses = torch.where(self.kept, logits[:, 0] ** 2, 0)
        total, self.count = losses.double().sum(), max(int(self.kept.sum()), 1)
        self.losses = {"none": losses, "sum": total.float(), "mean": (total / self.count).float()}
        self.gradient = torch.where(self.kept[:, None], 2 * logits, 0)  # of the sum

    def check_loss(self, reduction: str) -> None:
        assert torch.equal(self.runs[reduction].loss, self.losses[reduction])

    def check_gradient(self, reduction: str, gradient: Tensor | None) -> None:
        wanted = self.gradient / self.count if reduction == "mean" else self.gradient
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=0)


# On both sides of one span and of two; and where a thread has no row, or one more than others.
@pytest.mark.parametrize("kept", ["all", "three_quarters", "one_of_each_span", "the_last", "none"])
@pytest.mark.parametrize("N", [1, 1023, 1025, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, 2 * SPAN + 1])
def test_sums_over_many_rows(host: ctypes.CDLL, N: int, kept: str) -> None:
    many = ManyRows(host, N, kept)
    for reduction in ("sum", "mean"):
        many.runs[reduction].forward(with_gradient=False)
        many.check_loss(reduction)
    many.check_gradient("mean", many.runs["mean"].backward(torch.tensor(1.0)))


@pytest.mark.parametrize("N", [SPAN, 5 * SPAN - 1])
def test_gradients_of_many_rows_and_two_calls_give_the_same_bits(host: ctypes.CDLL, N: int) -> None:
    one, two = ManyRows(host, N), ManyRows(host, N)
    for reduction in REDUCTIONS:
        gradients = [many.runs[reduction].forward(with_gradient=True) for many in (one, two)]
        one.check_loss(reduction)
        two.check_loss(reduction)
        one.check_gradient(reduction, gradients[0])
        assert torch.equal(*gradients)


def sum_in_order(losses: Tensor) -> Tensor:
    """In float64: in a span those of every 1024th row, then these sums in pairs, fours, …; so too the spans' sums."""

    def sum_of_block(x: Tensor) -> Tensor:
        rounds = torch.nn.functional.pad(x, (0, -len(x) % 1024)).reshape(-1, 1024)
        sums = torch.zeros(1024, dtype=torch.float64)
        for numbers in rounds:
            sums = sums + numbers
        while len(sums) > 1:
            sums = sums[::2] + sums[1::2]
        return sums[0]

    spans = [sum_of_block(span) for span in losses.double().split(SPAN)]
    return sum_of_block(torch.stack(spans)).float()


@pytest.mark.parametrize("N", [700, SPAN, 3 * SPAN - 5])
@pytest.mark.usefixtures("chip")
def test_losses_are_added_in_one_order_on_every_chip(host: ctypes.CDLL, N: int) -> None:
    """The float32 result shows it: 2^24 + 1 is a tie, which small losses break if they meet before they meet 2^24,
    where each alone is less than half a digit of a float64."""
    random = np.random.default_rng(N)
    seen = set()
    for _ in range(8):
        logits = torch.zeros(N, 1)
        rows = random.choice(N, 4, replace=False)
        logits[rows, 0] = torch.tensor([2.0**12, 1, *[1.25 * 2**-15] * 2])
        run = Run(host, logits, torch.zeros(N, dtype=torch.int64), z_loss=1.0, reduction="sum")
        run.forward(with_gradient=False)
        assert run.loss == sum_in_order(logits[:, 0] ** 2)
        seen.add(run.loss.item())
    assert seen == {2.0**24, 2.0**24 + 2}


# A block is enough for one span; for more, a second launch adds what the blocks found.
@pytest.mark.parametrize(("N", "of_a_sum"), [(0, 1), (1, 1), (SPAN, 1), (SPAN + 1, 2), (3 * SPAN, 2)])
def test_launches_and_bytes_of_the_workspace(host: ctypes.CDLL, N: int, of_a_sum: int) -> None:
    host.workspace_bytes.restype = ctypes.c_int64
    of_rows = min(N, 1)
    launches = {"none": of_rows, "sum": of_rows + of_a_sum, "mean": of_rows + 2 * of_a_sum}
    count_and_losses = 16 + 4 * N
    several = -(-count_and_losses // 8) * 8 + 8 * -(-N // SPAN)
    for reduction, run in ManyRows(host, N).runs.items():
        before = host.launches()
        run.forward(with_gradient=False)
        assert host.launches() - before == launches[reduction]
        wanted = 0 if reduction == "none" else count_and_losses if of_a_sum == 1 else several
        assert host.workspace_bytes(ctypes.byref(run.problem)) == wanted


def test_the_normalisers_give_lse(host: ctypes.CDLL) -> None:
    for V in (65, 1000, 2057):
        logits, targets = CrossEntropyCase("lse", V=V).inputs(torch.float32)
        run = Run(host, logits, targets)
        run.forward(with_gradient=False)
        assert torch.equal(run.normalisers[0], logits.detach().amax(-1))
        torch.testing.assert_close(run.normalisers[0] + run.normalisers[1].log(), logits.detach().logsumexp(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 8192, 20003])
def test_scaling_a_gradient(host: ctypes.CDLL, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(count + 1, generator=generator).to(dtype)[1:]  # not at a multiple of 16 bytes
    for factor in (1.0, 0.3, torch.nan):
        expected = (gradient.float() * factor).to(dtype) if factor != 1 else gradient.clone()
        by = torch.tensor(factor)
        assert host.scale_gradient(DTYPES.index(dtype), pointer(gradient), ctypes.c_int64(count), pointer(by)) == 0
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_is_an_error(host: ctypes.CDLL) -> None:
    run = Run(host, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    run.problem.V = 0
    assert host.forward(ctypes.byref(run.problem), pointer(run.loss), pointer(run.normalisers), None) == 1
    run.problem.V = 2**31
    assert host.forward(ctypes.byref(run.problem), pointer(run.loss), pointer(run.normalisers), None) == 1
