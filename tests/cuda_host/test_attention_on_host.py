"""csrc/cuda/attention*.cu, run on the CPU: the shared cases, against the truth in float64."""

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cases import (
    ATTENTION_CASES,
    DRAWS,
    AttentionCase,
    assert_as_right_as_torch,
    kept_share,
    torch_attention,
)
from kernels.test_attention import drawn_seed, gradients, keep_mask

from .build import library, run_watched

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("B", "H", "H_kv", "T", "S", "D")]


class Options(ctypes.Structure):
    _fields_ = [
        ("scale", ctypes.c_double),
        ("window", ctypes.c_int64),
        ("dropout", ctypes.c_bool),
        ("dropout_p", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("device_seed", ctypes.c_void_p),
    ]


class Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]

    @classmethod
    def of(cls, x: Tensor) -> "Strided":
        assert x.stride(3) == 1 or x.shape[3] == 1
        return cls(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return library("attention")


# The chip decides between K and V resident in shared memory (for up to 512 keys and 64 channels) and streaming: there
# must be a head for each of its multiprocessors, here 1 or 1000.
@pytest.fixture(params=[1, 1000], ids=["resident", "streaming"])
def chip(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> Iterator[int]:
    kernels.attention_set_chip(request.param, 232448)
    yield request.param
    kernels.attention_set_chip(2, 232448)


def by_time(x: Tensor) -> Tensor:
    """As x (B, H, T, D), over (B, T, H, D) memory that is NaN."""
    return torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), math.nan, dtype=x.dtype).transpose(1, 2)


class HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ctypes.CDLL, options: Options, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv
        shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
        out, lse = by_time(q), torch.full(q.shape[:3], math.nan)
        tensors = (Strided * 4)(*map(Strided.of, (*qkv, out)))
        code = kernels.attention_run_forward(
            DTYPES[q.dtype], ctypes.byref(shape), ctypes.byref(options), tensors, ctypes.c_void_p(lse.data_ptr())
        )
        assert code == 0
        ctx.call = kernels, shape, options
        ctx.save_for_backward(*qkv, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        kernels, shape, options = ctx.call
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = by_time(q), by_time(k), by_time(v)
        dlse = dlse.contiguous()
        tensors = (Strided * 8)(*map(Strided.of, (dout, q, k, v, out, dq, dk, dv)))
        code = kernels.attention_run_backward(
            DTYPES[q.dtype],
            ctypes.byref(shape),
            ctypes.byref(options),
            tensors,
            ctypes.c_void_p(lse.data_ptr()),
            ctypes.c_void_p(dlse.data_ptr()),
        )
        assert code == 0
        return None, None, dq, dk, dv


def run(kernels: ctypes.CDLL, case: AttentionCase, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    seed = torch.tensor(drawn_seed())
    on_device = case.packed  # some read the seed as they would on a GPU, others get it with the launch
    options = Options(
        scale=case.options.get("scale", 1 / math.sqrt(case.D)),
        window=case.options.get("window", 0),
        dropout="dropout_p" in case.options,
        dropout_p=1 - kept_share(case.options.get("dropout_p", 0.0)),
        seed=0 if on_device else seed.item(),
        device_seed=seed.data_ptr() if on_device else None,
    )
    options.keeps_alive = seed
    out, lse = HostAttention.apply(kernels, options, *inputs)
    return out, lse


def assert_right(kernels: ctypes.CDLL, case: AttentionCase, dtype: torch.dtype, draws: range = DRAWS) -> None:
    keep = keep_mask(case)
    found = []
    for draw in draws:
        inputs = case.inputs(dtype, draw)
        exact = tuple(x.detach().double().requires_grad_() for x in inputs)
        got = run(kernels, case, inputs)
        truth = torch_attention(*exact, keep=keep, **case.options)
        plain = torch_attention(*inputs, keep=keep, **case.options)[0]
        plain_lse = torch_attention(*(x.float() for x in inputs), **case.options)[1]
        outputs = zip(got, truth, (plain, plain_lse), strict=True)
        grads = gradients(got, inputs), gradients(truth, exact), gradients((plain, plain_lse), inputs)
        found.append([*outputs, *zip(*grads, strict=True)])
    for name, triples in zip(("O", "lse", "dQ", "dK", "dV"), zip(*found, strict=True), strict=True):
        assert_as_right_as_torch(name, list(triples))


def large(case: AttentionCase) -> bool:
    return max(case.T, case.S or 0) > 130 or case.D > 128


@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if not large(case)], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_less_right_than_torch(kernels: ctypes.CDLL, chip: int, case: AttentionCase, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and chip > 1:
        pytest.skip("float32 has one kernel for all chips")
    assert_right(kernels, case, dtype)


@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if large(case)], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_cases(kernels: ctypes.CDLL, case: AttentionCase, dtype: torch.dtype) -> None:
    assert_right(kernels, case, dtype, draws=DRAWS[:2])


# Strips that a resident block shares out in two rounds, fully and not, and more keys than queries. Windows that end
# inside a tile, and hide whole tiles. Several tiles with dropout, for each head size.
LONGER = [
    AttentionCase("odd_number_of_strips", B=1, H=1, T=290, D=16),
    AttentionCase("eight_warps", B=1, H=1, T=512, D=16),
    AttentionCase("more_keys", B=1, H=2, T=110, S=200, D=32),
    AttentionCase("narrow_window", B=1, H=2, T=200, D=16, options={"window": 40}),
    *(AttentionCase(f"dropout_D{D}", B=1, T=80, S=150, D=D, options={"dropout_p": 0.3, "window": 90})
      for D in (16, 32, 64, 96, 128)),
]  # fmt: skip


@pytest.mark.parametrize("case", LONGER, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles(kernels: ctypes.CDLL, chip: int, case: AttentionCase, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and chip > 1:
        pytest.skip("float32 has one kernel for all chips")
    assert_right(kernels, case, dtype, draws=DRAWS[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dropout_mask_is_the_references(kernels: ctypes.CDLL, chip: int, dtype: torch.dtype) -> None:
    """With equal scores and V one-hot in the key, O shows which weights survive, and dV those of the backward pass."""
    case = AttentionCase("mask", B=2, H=2, T=40, S=64, D=64, options={"dropout_p": 0.4})
    q, k, _ = (torch.zeros_like(x) for x in case.inputs(dtype))
    v = torch.eye(64, dtype=dtype).expand(2, 2, 64, 64).clone().requires_grad_()  # (B, H, S, D)
    out, _ = run(kernels, case, (q, k, v))
    keep = keep_mask(case)
    assert keep is not None
    visible = torch.ones(40, 64, dtype=torch.bool).tril(64 - 40)
    assert torch.equal(out != 0, keep & visible)
    dout = torch.eye(40, 64, dtype=dtype).expand(2, 2, 40, 64)  # one-hot in the query, and with strides of 0
    (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.equal(dv[..., :40].mT != 0, keep & visible)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
def test_huge_inputs_give_finite_outputs(kernels: ctypes.CDLL, chip: int, dtype: torch.dtype, scale: float) -> None:
    case = AttentionCase("huge", B=1, T=70, D=32, options={"scale": scale})
    q, k, v = (x.detach() for x in case.inputs(dtype))
    q, k = 1e4 * q.sign(), 1e4 * k.sign()  # scores up to 3.2e9
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    outputs = run(kernels, case, inputs)
    truth = torch_attention(*(x.detach().double() for x in inputs), scale=scale)
    torch.testing.assert_close(outputs[0].double(), truth[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(outputs[1].double(), truth[1], rtol=1e-6, atol=1e-5)
    dq, dk, dv = gradients(outputs, inputs)
    assert dv.isfinite().all()
    if dtype != torch.float16:  # whose largest number is 65504
        assert dq.isfinite().all()
        assert dk.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_alignment(kernels: ctypes.CDLL, chip: int, dtype: torch.dtype) -> None:
    """Rows that start at any element give the same bits as rows at multiples of 16 bytes."""
    case = AttentionCase("alignment", B=1, T=70, D=32)
    aligned = case.inputs(dtype)
    wide = [torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=dtype) for x in aligned]
    for x, y in zip(wide, aligned, strict=True):
        x[..., 1:-2] = y.detach()
    odd = tuple(x[..., 1:-2].requires_grad_() for x in wide)
    wanted, got = run(kernels, case, aligned), run(kernels, case, odd)
    for x, y in zip((*got, *gradients(got, odd)), (*wanted, *gradients(wanted, aligned)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_order_of_blocks(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """A head alone, where no other block runs beside it, gives the bits that it gives in a batch."""
    case = AttentionCase("order", B=2, H=4, H_kv=2, T=100, D=16)
    inputs = case.inputs(dtype)
    outputs = run(kernels, case, inputs)
    together = (*outputs, *gradients(outputs, inputs))
    again = run(kernels, case, inputs)
    assert all(torch.equal(x, y) for x, y in zip(together, (*again, *gradients(again, inputs)), strict=True))
    alone = run(kernels, case, tuple(x[1:, -n:] for x, n in zip(inputs, (2, 1, 1), strict=True)))
    assert torch.equal(alone[0], outputs[0][1:, -2:])
    assert torch.equal(alone[1], outputs[1][1:, -2:])


def test_a_chip_with_little_shared_memory_streams(kernels: ctypes.CDLL) -> None:
    """99 KiB for a block, as on sm_86 and sm_89: too little for 512 keys of 64 channels."""
    kernels.attention_set_chip(1, 99 << 10)
    case = AttentionCase("little_memory", B=1, H=1, T=256, S=512, D=64)
    assert_right(kernels, case, torch.bfloat16, draws=DRAWS[:1])
    kernels.attention_set_chip(2, 232448)


def test_sizes_beyond_32_bits_are_errors(kernels: ctypes.CDLL) -> None:
    shape, options = Shape(1, 1, 1, 1, 2**31, 16), Options(scale=1.0)
    tensors = (Strided * 4)()
    assert kernels.attention_run_forward(0, ctypes.byref(shape), ctypes.byref(options), tensors, None) == 1


# Out of bounds, and races: what is compared with what is in attention_test.cpp.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers_are_silent(kind: str) -> None:
    done = run_watched("attention", kind)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[-5000:]
    assert "0 failures" in done.stdout
