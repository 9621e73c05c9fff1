"""Attention of a packed projection, against the two operations that it stands for.

On a CPU these two compute it; what a GPU gets is tested on kernels in PyTorch, and those of Triton in the interpreter.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from chargpt.config import TransformerConfig
from chargpt.kernels import causal_attention, packed_causal_attention, qkv_heads, registry
from chargpt.kernels.backends import cuda
from chargpt.kernels.ops import packed_attention
from chargpt.kernels.ops.common import OperatorLibrary
from chargpt.models import Transformer

from .cases import implementations
from .test_operators import GPU_KEY, Kernels, calls

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 3, 5, 4), (2, 4, 2, 7, 3), (1, 6, 1, 9, 8)]  # B, H, H_kv, T, D


class Into(Kernels):
    """Kernels that write gradients to given memory."""

    @staticmethod
    def causal_attention_backward_into(dq: Tensor, dk: Tensor, dv: Tensor, dO: Tensor, *arguments: Any) -> None:
        for to, x in zip((dq, dk, dv), Kernels.causal_attention_backward(dO, None, *arguments), strict=True):
            to.copy_(x)


OPERATORS = OperatorLibrary("chargpt_test_packed", "CPU", Into, (packed_attention.OPERATION,))
OPS = torch.ops.chargpt_test_packed


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's place is taken by a backend that has the operator."""
    functions = {**registry.BACKENDS[-1].functions, packed_attention.NAME: OPERATORS[packed_attention.NAME]}
    backend = dataclasses.replace(registry.BACKENDS[-1], functions=functions)
    monkeypatch.setattr(registry, "BACKENDS", (*registry.BACKENDS[:-1], backend))
    calls.clear()


def projection(B: int, H: int, H_kv: int, T: int, D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(B + 10 * H + 100 * T)
    return torch.randn(B, T, (H + 2 * H_kv) * D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def apart(qkv: Tensor, H: int, H_kv: int, dropout_p: float = 0.0, impl: str = "torch") -> Tensor:
    q, k, v = qkv_heads(qkv, n_head=H, n_kv_head=H_kv, qk_norm=False, impl=impl)
    out = causal_attention(q, k, v, dropout_p=dropout_p, generator=torch.Generator().manual_seed(3), impl=impl)
    return out.transpose(1, 2).flatten(2)


def together(qkv: Tensor, H: int, H_kv: int, dropout_p: float = 0.0, impl: str = "torch") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return packed_causal_attention(qkv, n_head=H, n_kv_head=H_kv, dropout_p=dropout_p, generator=generator, impl=impl)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("packed")
def test_a_kernel_s_result_and_gradient_are_those_of_the_heads(
    shape: tuple[int, int, int, int, int], dropout_p: float
) -> None:
    B, H, H_kv, T, D = shape
    qkv = projection(*shape)
    got, expected = together(qkv, H, H_kv, dropout_p), apart(qkv, H, H_kv, dropout_p)
    assert got.shape == (B, T, H * D)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(x, qkv, upstream)[0] for x in (got, expected))
    assert calls == {"attend": 1, "attend backward": 1}
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("packed")
def test_any_strides_and_no_gradient_wanted() -> None:
    base = projection(2, 4, 2, 7, 3)
    for qkv in (base.detach().transpose(0, 1).contiguous().transpose(0, 1), base.detach()[:, ::2]):
        torch.testing.assert_close(together(qkv, 4, 2), apart(qkv, 4, 2))
    assert calls == {"attend": 2}


@pytest.mark.usefixtures("packed")
def test_second_derivatives() -> None:
    qkv = projection(1, 2, 1, 3, 2)
    assert torch.autograd.gradgradcheck(lambda x: together(x, 2, 1, 0.3), (qkv,), fast_mode=True)


def test_opcheck_and_one_graph() -> None:
    qkv, options = projection(2, 4, 2, 5, 3, torch.float32), (4, 2, 0.5, 0.3, torch.tensor(7))
    torch.library.opcheck(OPS.packed_causal_attention.default, (qkv, *options))
    qkv = qkv.detach()
    out, lse = OPS.packed_causal_attention(qkv, *options)
    torch.library.opcheck(OPS.packed_causal_attention_backward.default, (torch.ones_like(out), qkv, out, lse, *options))


@pytest.mark.usefixtures("packed")
def test_what_only_the_reference_can_do_it_does() -> None:
    wide = projection(1, 1, 1, 2, 257)
    torch.testing.assert_close(together(wide, 1, 1), apart(wide, 1, 1))
    qkv = projection(2, 3, 3, 5, 4).detach()
    func = torch.func.grad(lambda x: packed_causal_attention(x, n_head=3, n_kv_head=3, impl="torch").sum())(qkv)
    qkv.requires_grad_()
    torch.testing.assert_close(func, torch.autograd.grad(apart(qkv, 3, 3).sum(), qkv)[0])
    assert not calls
    assert together(projection(0, 3, 3, 5, 4), 3, 3).shape == (0, 5, 12)


@pytest.mark.usefixtures("packed")
def test_flops_are_those_of_attention() -> None:
    B, H, H_kv, T, D = 2, 4, 2, 7, 3
    qkv = projection(B, H, H_kv, T, D)
    with FlopCounterMode(display=False) as counter:
        together(qkv, H, H_kv).sum().backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == 7 * 2 * B * H * T * T * D


@pytest.mark.parametrize("impl", implementations("causal_attention"))
def test_where_no_kernel_is_packed_the_bits_are_those_of_the_heads(impl: str) -> None:
    qkv = projection(2, 4, 2, 70, 8, torch.float32)
    got, expected = (f(qkv, 4, 2, 0.2, impl) for f in (together, apart))
    assert torch.equal(got, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (got, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 0}, "n_head and n_kv_head must be at least 1"),
        ({"n_head": 4}, r"qkv must be \(B, T, 10 D\)"),
        ({"n_head": 5, "n_kv_head": 2}, "the heads of q must be a multiple"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"qkv": torch.zeros(2, 9)}, r"qkv must be \(B, T, 9 D\)"),
        ({"qkv": torch.zeros(2, 3, 9, dtype=torch.int64)}, "floating dtype"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_wrong_arguments_are_named(
    fused: bool, changes: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    if fused:
        request.getfixturevalue("packed")
    arguments: dict[str, Any] = {"qkv": torch.zeros(2, 3, 9), "n_head": 3, "n_kv_head": 3, "impl": "torch"} | changes
    with pytest.raises(ValueError, match=message):
        packed_causal_attention(**arguments)


def test_float32_heads_too_wide_for_the_gpu_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_has_room_for_wide_heads", lambda device: False)
    monkeypatch.setitem(cuda.LIBRARY.functions, packed_attention.NAME, lambda qkv, **_: qkv + 7)
    options: dict[str, Any] = {"n_head": 1, "n_kv_head": 1, "scale": 0.1, "dropout_p": 0.0, "seed": None}
    wide, narrow = torch.randn(1, 2, 3 * 129), torch.randn(1, 2, 3 * 128)
    assert torch.equal(cuda.packed_causal_attention(wide, **options), packed_attention.reference(wide, **options))
    assert torch.equal(cuda.packed_causal_attention(narrow, **options), narrow + 7)
    half = wide.bfloat16()
    assert torch.equal(cuda.packed_causal_attention(half, **options), half + 7)


def test_a_capture_refuses_a_seed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda.LIBRARY, "kernels", lambda: Into)
    qkv = projection(1, 2, 2, 3, 4).detach()
    kernel = cuda.LIBRARY.ops.packed_causal_attention.default.redispatch
    out, lse = kernel(GPU_KEY, qkv, 2, 2, 0.5, 0.0, None)
    with pytest.raises(RuntimeError, match="dropout cannot be captured"):
        kernel(GPU_KEY, qkv, 2, 2, 0.5, 0.3, torch.tensor(5))
    backward = cuda.LIBRARY.ops.packed_causal_attention_backward.default.redispatch
    with pytest.raises(RuntimeError, match="dropout cannot be captured"):
        backward(GPU_KEY, torch.ones_like(out), qkv, out, lse, 2, 2, 0.5, 0.3, torch.tensor(5))


@pytest.mark.parametrize(
    ("parts", "packs"),
    [({}, True), ({"n_kv_head": 1}, True), ({"position": "rotary"}, False), ({"qk_norm": True}, False),
     ({"value_embeddings": True}, False)],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("packed")
def test_models_whose_heads_are_only_split_take_it(parts: dict[str, Any], packs: bool) -> None:
    config = TransformerConfig(**{"block_size": 7, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.1} | parts)
    torch.manual_seed(1)
    model = Transformer(config, 11, "torch")
    idx = torch.randint(11, (2, 7))
    model(idx, idx).backward()
    assert calls == ({"attend": 2, "attend backward": 2} if packs else {})
