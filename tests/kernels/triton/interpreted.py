"""The Triton kernels on the CPU, in Triton's interpreter, on the shared cases. test_interpreter.py runs this file.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted.py -k … (and -m '' for the slow ones too).
"""

# ruff: noqa: I001 - the interpreter is made ready before the kernels are imported
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from . import interpreter  # noqa: F401

import triton
import triton.language as tl
from triton import Config

from chargpt.kernels.ops.add_norm import NORMS, normalised
from chargpt.kernels.ops.packed_attention import split
from chargpt.kernels.philox import dropout_keep_mask, philox_4x32, row_keep_mask
from chargpt.kernels.backends.triton import add_norm, attention, cross_entropy, problem
from chargpt.kernels.backends.triton.numerics import narrow
from chargpt.kernels.backends.triton.philox import ROUNDS, keep_tile

from ..cases import (
    ATTENTION_CASES,
    CROSS_ENTROPY_CASES,
    AttentionCase,
    CrossEntropyCase,
    assert_as_right_as_torch,
    kept_share,
    naive_cross_entropy,
    torch_attention,
    torch_cross_entropy,
)
from ..test_attention import gradients
from ..test_cross_entropy import gradient

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 0x1234567890ABCDEF
# Tiles that are smaller than most cases, and unequal, so that edges fall everywhere; and larger ones, which are faster.
SMALL, LARGE = (Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=4) for m, n in ((32, 16), (64, 32)))
FEW_PROGRAMS = Config({"ROWS": 4096})  # for many short rows: the interpreter takes a millisecond for each program

# What the default run takes of the cases: each feature once; float16 and bfloat16 differ in conversions alone.
QUICK = {
    torch.float32: [
        *("T1", "T7", "T65", "D31", "one_query_many_keys", "window_1", "negative_scale", "no_queries"),
        *("dropout_more_keys_window_grouped", "packed_dropout", "sharp", "no_batch", "nothing"),
    ],
    torch.float16: ["more_keys_than_queries", "dropout_more_keys_window_grouped"],
    torch.bfloat16: ["more_keys_than_queries", "dropout_more_keys_window_grouped"],
}
DRAWS = {"sharp": 7}  # of inputs, where the two that the others get are too few to judge by: few weights matter
WHOLE_DRAWS = {"D16": 32}  # so small that 8 leave the largest error to luck: on one CPU dK had 4.6 times torch's
LONG_ROWS = {"V50257", "V50304", "everything_V50257"}


def attention_grid() -> list[Any]:
    grid = [
        (case, dtype, DRAWS.get(case.name, 2))
        for dtype in DTYPES
        for case in ATTENTION_CASES
        if case.name in QUICK[dtype]
    ]
    whole = [(case, dtype, WHOLE_DRAWS.get(case.name, 8)) for dtype in DTYPES for case in ATTENTION_CASES]
    return [pytest.param(*entry, id=name_of(*entry)) for entry in grid] + [
        pytest.param(*entry, id=name_of(*entry), marks=pytest.mark.slow) for entry in whole
    ]


def cross_entropy_grid() -> list[Any]:
    whole = [(case, dtype, 8) for dtype in DTYPES for case in CROSS_ENTROPY_CASES]
    slow = {True: pytest.mark.slow, False: ()}
    return [
        pytest.param(*e, id=name_of(*e), marks=slow[e[0].name in LONG_ROWS or e[1] != torch.float32]) for e in whole
    ] + [
        pytest.param(case, dtype, 2, id=name_of(case, dtype, 2))
        for case in CROSS_ENTROPY_CASES
        for dtype in DTYPES
        if case.name in ("everything", "everything_V50257")
        and not (dtype == torch.float32 and case.name == "everything")
    ]


def name_of(case: Any, dtype: torch.dtype, draws: int) -> str:
    return f"{case.name}-{str(dtype).removeprefix('torch.')}-{draws}"


@pytest.mark.parametrize(("case", "dtype", "draws"), attention_grid())
def test_attention_loses_no_more_than_torch(case: AttentionCase, dtype: torch.dtype, draws: int) -> None:
    tiles = LARGE if case.T >= 60 else SMALL
    dropout_p, S = 1 - kept_share(case.options.get("dropout_p", 0.0)), case.S or case.T
    seed = torch.tensor(SEED) if dropout_p else None
    keep = None
    if seed is not None:
        keep = dropout_keep_mask(seed, dropout_p, case.B * case.H, case.T, S).view(case.B, case.H, case.T, S)
    scale = case.options.get("scale", 1 / math.sqrt(case.D))
    options = (scale, dropout_p, case.options.get("window"), seed)
    results = []
    for draw in range(draws):
        inputs = case.inputs(dtype, draw)
        exact = tuple(x.detach().double().requires_grad_() for x in inputs)
        qkv = tuple(x.detach() for x in inputs)
        got = attention.causal_attention_forward(*qkv, *options, tiles=tiles)
        upstream = torch.Generator().manual_seed(7)  # as `gradients` draws it
        given = [torch.randn(x.shape, generator=upstream, dtype=torch.float64).to(x.dtype) for x in got]
        ours = attention.causal_attention_backward(*given, *qkv, *got, *options, key_tiles=tiles, query_tiles=tiles)
        truth = torch_attention(*exact, keep=keep, **case.options)
        plain = torch_attention(*inputs, keep=keep, **case.options)[0]
        plain_lse = torch_attention(*(x.float() for x in inputs), **case.options)[1]
        outputs = zip(got, truth, (plain, plain_lse), strict=True)
        grads = ours, gradients(truth, exact), gradients((plain, plain_lse), inputs)
        results.append([*outputs, *zip(*grads, strict=True)])
    for name, triples in zip(("O", "lse", "dQ", "dK", "dV"), zip(*results, strict=True), strict=True):
        assert_as_right_as_torch(name, list(triples))


@pytest.mark.parametrize(("case", "dtype", "draws"), cross_entropy_grid())
def test_cross_entropy_loses_no_more_than_torch(case: CrossEntropyCase, dtype: torch.dtype, draws: int) -> None:
    losses, in_backward, in_forward = [], [], []
    for draw in range(draws):
        logits, targets = case.inputs(dtype, draw)
        exact = logits.detach().double().requires_grad_()
        truth, plain = (f(x, targets, **case.options) for f, x in
                        ((naive_cross_entropy, exact), (torch_cross_entropy, logits)))  # fmt: skip
        errors = gradient(truth, exact), gradient(plain, logits)
        loss, ours, reduced = cross_entropy_of(logits.detach(), targets, **case.options)
        losses.append((loss, truth, plain))
        in_backward.append((ours, *errors))
        if reduced is not None:  # `gradient` has 0.5 flow into a loss that is one number
            in_forward.append((0.5 * reduced, *errors))
    assert_as_right_as_torch("loss", losses)
    assert_as_right_as_torch("gradient", in_backward)
    if in_forward and dtype != torch.float16:  # where small gradients lose bits before they are scaled
        assert_as_right_as_torch("gradient in the forward", in_forward)


def cross_entropy_of(logits: Tensor, targets: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, its gradient from the backward, and the reduced loss's from the forward."""
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "reduction": "mean"}
    options = tuple((defaults | given).values())
    reduced = options[-1] != "none"
    loss, normalisers, early = cross_entropy.softmax_cross_entropy_forward(logits, targets, *options, reduced)
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
    return loss, cross_entropy.softmax_cross_entropy_backward(upstream, logits, targets, normalisers, *options), early


# Beside a whole number of programs, which add 16 numbers here, of programs of programs, and of those; and of real ones.
@pytest.mark.parametrize(
    ("at_once", "N"),
    [(16, n) for n in (0, 1, 15, 16, 17, 255, 256, 257, 4096, 4097)]
    + [(cross_entropy.ADDED_AT_ONCE, n) for n in (16383, 16384, 16385, 32769)],
)
@pytest.mark.parametrize("kept", [1.0, 0.03, 0.0])
def test_cross_entropy_s_mean_over_any_number_of_rows_is_exact(
    monkeypatch: pytest.MonkeyPatch, at_once: int, N: int, kept: float
) -> None:
    monkeypatch.setattr(cross_entropy, "ADDED_AT_ONCE", at_once)
    monkeypatch.setattr(cross_entropy, "whole_rows_tiles", lambda _: FEW_PROGRAMS)
    generator = torch.Generator().manual_seed(N)
    x = torch.randint(-3, 4, (N, 1), generator=generator).float()
    x[-1:], x[at_once - 1 : at_once + 1] = 3, 2  # what a program too few would lose, and its edge
    targets = torch.zeros(N).long()
    ignored = torch.rand(N, generator=generator) >= kept
    ignored[-1:] = ignored[at_once - 1 : at_once + 1] = kept == 0
    targets[ignored] = -100
    count, squares = int((~ignored).sum()), x[~ignored].square().sum()  # exact: integers below 2²⁴
    scale = torch.tensor(1 / max(count, 1))  # rounded once
    options = {"z_loss": 1.0}  # of rows of one logit the loss is its square, and the gradient twice itself
    loss, in_backward, in_forward = cross_entropy_of(x, targets, **options)
    assert torch.equal(loss, squares * scale)
    assert in_forward is not None
    expected = torch.where(ignored[:, None], 0, 2 * x) * scale
    assert torch.equal(in_forward, expected)
    assert torch.equal(in_backward, 0.5 * expected)  # what `cross_entropy_of` has flow into one number
    total, _, _ = cross_entropy_of(x, targets, **options, reduction="sum")
    assert torch.equal(total, squares)


@pytest.mark.parametrize("N", [16384, 40000])
def test_cross_entropy_s_sum_is_as_close_as_float32_and_has_the_same_bits_twice(
    monkeypatch: pytest.MonkeyPatch, N: int
) -> None:
    monkeypatch.setattr(cross_entropy, "whole_rows_tiles", lambda _: FEW_PROGRAMS)
    logits = 10 * torch.randn(N, 3, generator=torch.Generator().manual_seed(3))
    targets = torch.randint(3, (N,), generator=torch.Generator().manual_seed(4))
    options = {"reduction": "sum"}
    first, second = (cross_entropy_of(logits, targets, **options)[0] for _ in range(2))
    assert torch.equal(first, second)
    truth = torch_cross_entropy(logits.double(), targets, **options)
    assert abs(first / truth - 1) < 2**-22


@pytest.mark.parametrize(
    ("counts", "total"),
    [([2**30] * 2, 2**31), ([2**31 - 1, 2], 2**31 + 1), ([2**14] * 40000, 40000 * 2**14), ([2**24, 1], 2**24 + 1)],
    ids=["2^31", "2^31 + 1", "many parts", "2^24 + 1"],
)
def test_cross_entropy_s_counts_are_exact_up_to_two_to_the_31(counts: list[int], total: int) -> None:
    """Partial counts, as nothing here holds so many targets. 2²⁴ + 1 is no float32, but 1 over it has a nearest one."""
    one_over = cross_entropy._one_over_count(torch.tensor(counts), -100, are_counts=True)
    assert torch.equal(one_over, torch.tensor(1 / total))


# Rows: one, fewer than a tile, several shares, the last one empty. Channels: one, odd, a whole block, beyond one.
@pytest.mark.parametrize(("N", "C"), [(1, 1), (5, 3), (40, 65), (129, 16), (7, 384), (3, 1000), (2, 2049)])
@pytest.mark.parametrize(
    ("kind", "gains"), [("layernorm", 2), ("layernorm", 1), ("layernorm", 0), ("rmsnorm", 2), ("rmsnorm", 0)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_lose_no_more_than_torch(
    N: int, C: int, kind: str, gains: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(add_norm, "SHARES", 3)
    norm, columns = NORMS.index(kind), []
    for draw in range(4):
        generator = torch.Generator().manual_seed(draw)
        x, dy, *weights = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in ((N, C), (N, C), *[(C,)] * gains)
        )
        weight, bias = [*weights, None, None][:2]
        out, statistics = add_norm.norm_forward(3 * x + 1, weight, bias, norm, dtype)
        ours = out, *add_norm.norm_backward(dy, 3 * x + 1, weight, bias, statistics, norm)[: 1 + gains]
        found = [ours]
        for wide in (torch.float64, dtype):  # the reference computes in float32 for the second, and rounds
            leaves = [given.to(wide).requires_grad_() for given in ((3 * x + 1), *weights)]
            y = normalised(leaves[0], *[*leaves[1:], None, None][:2], kind, wide)
            found.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))))
        columns.append(list(zip(*found, strict=True)))
    for name, triples in zip(("norm", "dx", "dweight", "dbias"), zip(*columns, strict=True), strict=False):
        # NumPy adds the rows one by one where a GPU adds them in pairs.
        assert_as_right_as_torch(name, list(triples), 8 if name in ("dweight", "dbias") else 1)


def test_norms_give_the_same_bits_twice_and_take_any_strides() -> None:
    x, dy = (torch.randn(33, 130, generator=torch.Generator().manual_seed(i))[:, ::2] for i in (1, 2))
    weight = torch.randn(130)[::2]
    first, second, other = (
        (out, *add_norm.norm_backward(dy, given, weight, weight, statistics, 1))
        for given in (x, x, x.contiguous())
        for out, statistics in [add_norm.norm_forward(given, weight, weight, 1, torch.float32)]
    )
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_what_has_no_gains_gets_no_gradients_of_them() -> None:
    x = torch.randn(3, 8)
    _, statistics = add_norm.norm_forward(x, None, None, 2, torch.float32)
    assert [g.shape for g in add_norm.norm_backward(x, x, None, None, statistics, 2)] == [(3, 8), (0,), (0,)]


@pytest.mark.parametrize(("N", "C"), [(1, 1), (3, 7), (70, 50), (9, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_between_layers_is_the_reference_s(N: int, C: int, dtype: torch.dtype) -> None:
    x = torch.randn(N, C).to(dtype)
    for seed, p in ((SEED, 0.25), (2**62 + 3, 0.875), (-1, 0.5)):
        keep = row_keep_mask(torch.tensor(seed), p, N, C)
        expected = torch.where(keep, x.float() / (1 - p), 0.0).to(dtype)
        torch.testing.assert_close(add_norm.row_dropout(x, p, torch.tensor(seed)), expected, rtol=1e-6, atol=0)


@triton.jit
def keep_kernel(OUT, seed, threshold, batch_head, position, key, M: tl.constexpr, N: tl.constexpr):
    keep = keep_tile(seed, threshold.to(tl.uint32), batch_head, position, key, M, N)
    tl.store(OUT + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize(("seed", "p"), [(SEED, 0.1), (0, 0.5), (2**62 + 3, 0.999), (-1, 0.3)])
def test_dropout_masks_are_the_reference_s(seed: int, p: float) -> None:
    out = torch.empty(16, 32, dtype=torch.int8)
    mask = dropout_keep_mask(torch.tensor(seed), p, 6, 48, 96)  # query i has position 48 + i
    for batch_head, position, key in ((0, 48, 0), (5, 80, 64), (2, 57, 24)):
        keep_kernel[(1,)](out, seed, int(p * 2**16), batch_head, position, key, 16, 32)
        assert torch.equal(out.bool(), mask[batch_head, position - 48 : position - 32, key : key + 32])


@triton.jit
def philox_kernel(OUT, seed, COUNTER):
    i = tl.arange(0, 64)
    c = tl.load(COUNTER + i), tl.load(COUNTER + 64 + i), tl.load(COUNTER + 128 + i), tl.load(COUNTER + 192 + i)
    w0, w1, w2, w3 = tl.philox(seed, c[0], c[1], c[2], c[3], n_rounds=ROUNDS)
    tl.store(OUT + i, w0.to(tl.int64))
    tl.store(OUT + 64 + i, w1.to(tl.int64))
    tl.store(OUT + 128 + i, w2.to(tl.int64))
    tl.store(OUT + 192 + i, w3.to(tl.int64))


def test_triton_s_philox_is_ours() -> None:
    counter = torch.randint(2**31, (4, 64), generator=torch.Generator().manual_seed(1))
    out = torch.empty(4, 64, dtype=torch.int64)
    for seed in (0, 1, SEED, 2**63 - 1):
        philox_kernel[(1,)](out, seed, counter.int())
        key = torch.tensor(seed % 2**32), torch.tensor(seed // 2**32)
        assert torch.equal(out, torch.stack(philox_4x32(tuple(counter), key)))  # type: ignore[arg-type]


@triton.jit
def narrow_kernel(X, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, narrow(tl.load(X + at), OUT.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(2))
    x = bits.int().view(torch.float32)
    x = torch.where(x.abs() > torch.finfo(dtype).max / 2, torch.randn(4096), x)
    x[:5] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    x[5:7] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # bfloat16's ties, to either side
    out = torch.empty(4096, dtype=dtype)
    narrow_kernel[(1,)](x, out, 4096)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("V", [65, 9001], ids=["whole rows", "long rows"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_target_out_of_range_makes_its_row_nan(V: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, V)
    targets = torch.tensor([1, V + 5 if V < 200 else -7, 2]).to(dtype)
    if V > 200 and dtype == torch.uint8:
        pytest.skip("every uint8 is in range")
    losses, ours, _ = cross_entropy_of(logits, targets, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    assert ours.isnan().all(-1).tolist() == [False, True, False]
    assert ours.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("V", [5, 9001])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_not_hidden(V: int, value: float) -> None:
    logits = torch.zeros(3, V)
    logits[1, V - 1] = value
    losses, ours, _ = cross_entropy_of(logits, torch.zeros(3).long(), reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    assert ours.isnan().any(-1).tolist() == [False, True, False]


def test_huge_queries_and_keys_give_no_nan() -> None:
    for dtype, size in ((torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 1e4)):
        q, k, v = AttentionCase("huge", B=1, H=1, T=20).inputs(dtype)
        q, k, v = size * q.detach().sign(), size * k.detach().sign(), v.detach()
        out, lse = attention.causal_attention_forward(q, k, v, 0.3, 0.0, None, None, tiles=SMALL)
        assert out.isfinite().all()
        assert lse.isfinite().all()
        dqkv = attention.causal_attention_backward(out, None, q, k, v, out, lse, 0.3, 0.0, None, None)
        assert not any(x.isnan().any() for x in dqkv)


def test_a_scale_of_zero_and_strides_of_any_kind() -> None:
    wide = torch.randn(2, 9, 2, 16, 3)  # channels three apart, and q, k, v between each other
    q, k, v = (x.transpose(1, 2) for x in wide.unbind(-1))
    options = (0.0, 0.0, None, None)
    out, lse = attention.causal_attention_forward(q, k, v, *options, tiles=SMALL)
    torch.testing.assert_close(out, v.cumsum(2) / torch.arange(1, 10)[:, None])
    torch.testing.assert_close(lse, torch.arange(1.0, 10).log().expand(2, 2, 9))
    assert out.transpose(1, 2).is_contiguous()
    dout = torch.ones(()).expand(out.shape)
    dq, dk, dv = attention.causal_attention_backward(dout, None, q, k, v, out, lse, *options)
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, (1 / torch.arange(1.0, 10)).flip(0).cumsum(0).flip(0)[:, None].expand(dv.shape))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_are_written_where_they_are_asked_for(dropout_p: float) -> None:
    """Into the memory of one packed projection, with the same bits."""
    B, H, H_kv, T, D = 2, 4, 2, 21, 8
    generator = torch.Generator().manual_seed(1)
    qkv, packed = torch.randn(B, T, (H + 2 * H_kv) * D, generator=generator), torch.full((B, T, 8 * D), math.nan)
    q, k, v = split(qkv, H, H_kv)
    seed = torch.tensor(SEED) if dropout_p else None
    options = (0.3, dropout_p, None, seed)
    out, lse = attention.causal_attention_forward(q, k, v, *options)
    dout = torch.randn(out.shape, generator=generator)
    apart = attention.causal_attention_backward(dout, None, q, k, v, out, lse, *options)
    attention.causal_attention_backward_into(*split(packed, H, H_kv), dout, q, k, v, out, lse, *options)
    for got, expected in zip(split(packed, H, H_kv), apart, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale_in_place(factor: float) -> None:
    gradient = torch.randn(3, 1700)
    expected = gradient * factor
    cross_entropy.scale_(gradient, torch.tensor(factor))
    assert torch.equal(gradient, expected)


def test_nothing_stands_in_the_way_of_an_interpreted_run() -> None:
    assert problem() is None
