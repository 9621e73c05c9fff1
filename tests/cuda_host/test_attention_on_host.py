"""The CUDA attention kernels, run on the CPU by the shim: the shared list of cases, at sizes that fibers can do."""

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import ATTENTION_CASES, AttentionCase, assert_as_right_as_torch, torch_attention
from tests.kernels.test_attention import drawn_seed, gradients, keep_mask

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


# The chip decides between K and V resident in shared memory and streaming: there must be a head for each of its
# multiprocessors, here 1 or 1000.
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
    options = Options(
        scale=case.options.get("scale", 1 / math.sqrt(case.D)),
        window=case.options.get("window", 0),
        dropout="dropout_p" in case.options,
        dropout_p=case.options.get("dropout_p", 0.0),
        seed=drawn_seed(),
    )
    out, lse = HostAttention.apply(kernels, options, *inputs)
    return out, lse


def assert_right(kernels: ctypes.CDLL, case: AttentionCase, dtype: torch.dtype, draws: int) -> None:
    keep = keep_mask(case)
    found = []
    for draw in range(draws):
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


SMALL = [case for case in ATTENTION_CASES if max(case.T, case.S or 0) <= 130 and case.D <= 128]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_less_right_than_torch(kernels: ctypes.CDLL, chip: int, case: AttentionCase, dtype: torch.dtype) -> None:
    assert_right(kernels, case, dtype, draws=3)
