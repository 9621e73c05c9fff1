"""Tensors that are not plain memory: each kind that torch has, on each operation, is torch's result or a clear error.

The truth is the reference, which is made of torch's own operations. A kind that the reference cannot take either must
be an exception, and never a number.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from chargpt.kernels import (
    activation,
    add_norm,
    causal_attention,
    linear_cross_entropy,
    qkv_heads,
    registry,
    softmax_cross_entropy,
)
from chargpt.kernels.ops import linear_cross_entropy as heads
from gpu.checks import poisoned_memory

IMPLS = ["cpp", "auto"]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dropped(x: Tensor, impl: str) -> Tensor:
    """Of a seed that nobody draws, so that every kind drops the same."""
    assert x.dtype.is_floating_point
    options = {"norm": "none", "dropout_p": 0.25, "seed": torch.tensor(7), "dtype": x.dtype}
    return registry.function("add_norm", x.device.type, x.dtype, impl)(x, x, None, None, **options)[0]  # type: ignore


TARGETS = torch.tensor([[1, 0, 3], [2, 2, 4]])
# One tensor in, one tensor out, so that every kind goes through the same list.
OPERATIONS: dict[str, tuple[Tensor, Callable[..., Tensor]]] = {
    "activation": (seeded(2, 3, 8), lambda x, **o: activation(x, "gelu", **o)),
    "swiglu": (seeded(2, 3, 8), lambda x, **o: activation(x, "swiglu", **o)),
    "norm": (seeded(2, 3, 8), lambda x, **o: add_norm(x, norm="rmsnorm", **o)[1]),
    "layernorm": (
        seeded(2, 3, 8),
        lambda x, **o: torch.cat(add_norm(x, x.flip(0), x[0, 0], x[1, 1], norm="layernorm", **o)),
    ),
    "dropout": (seeded(2, 3, 8), dropped),
    "qkv_heads": (
        seeded(2, 3, 16),
        lambda x, **o: torch.cat(qkv_heads(x, None, None, None, n_head=2, n_kv_head=1, qk_norm=True, **o), dim=1),
    ),
    "attention": (seeded(1, 2, 5, 4), lambda x, **o: causal_attention(x, x[:, :1], x[:, 1:], **o)),
    "cross_entropy": (seeded(2, 3, 5), lambda x, **o: softmax_cross_entropy(x, TARGETS, reduction="none", **o)),
    "mean": (seeded(2, 3, 5), lambda x, **o: softmax_cross_entropy(x, TARGETS, **o)[None]),
    "head": (seeded(2, 3, 5), lambda x, **o: linear_cross_entropy(x, x.flatten(0, 1)[1:], TARGETS, **o)[None]),
}


@pytest.fixture(autouse=True)
def few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_rows", lambda *_: 4)


class Plain(Tensor):
    """A subclass that changes nothing."""


class Logging(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A wrapper that knows dispatch alone: its own memory is nothing."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        strides = inner.stride() if inner.layout is torch.strided and not inner.is_nested else None
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, out)


def negative(x: Tensor) -> Tensor:
    made = torch._neg_view(-x)
    assert made.is_neg()
    return made


def imaginary(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate: a negative view of another tensor's memory."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "reversed in time": lambda x: x.flip(1).transpose(0, -1).contiguous().transpose(0, -1),
    "parameter": lambda x: torch.nn.Parameter(x),
    "buffer": lambda x: torch.nn.Buffer(x),
    "negative": negative,
    "imaginary": imaginary,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "subclass": lambda x: x.as_subclass(Plain),
    "wrapped": Wrapped,
    "inference": lambda x: torch.inference_mode()(lambda: x.clone())(),
    "functional": lambda x: torch._to_functional_tensor(x.clone()),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "meta": lambda x: x.to("meta"),
    "lazy": lambda x: x.to("lazy"),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: x.long(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "half": lambda x: x.half(),
    "no elements": lambda x: x[:0],
    "a number": lambda x: x.flatten()[0],
    "shares memory": lambda x: torch.as_strided(x, x.shape, (0,) * x.dim()),
}


def value(x: Any) -> Tensor:
    """What a tensor of any kind says, as plain memory."""
    if torch._is_functional_tensor(x):
        torch._sync(x)
        return value(torch._from_functional_tensor(x))
    if isinstance(x, Wrapped):
        return value(x.inner)
    if isinstance(x, torch.masked.MaskedTensor):
        return value(x.to_tensor(0.0))
    if x.is_nested:
        return value(torch.cat([part.flatten() for part in x.unbind()]))
    if x.layout is not torch.strided:
        return value(x.to_dense())
    x = x.dequantize() if x.is_quantized else x.as_subclass(Tensor)
    return x.float() if x.dtype == torch.float8_e4m3fn else x


def attempt(f: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return f()
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kind_is_the_references_result_or_an_error(operation: str, kind: str, impl: str) -> None:
    x, f = OPERATIONS[operation]
    made = attempt(lambda: KINDS[kind](x))
    if isinstance(made, Exception):
        pytest.skip(f"torch cannot make it here: {made!s:.80}")
    got, wanted = (attempt(lambda impl=impl: f(made, impl=impl)) for impl in (impl, "torch"))
    if isinstance(wanted, Exception):
        assert isinstance(got, Exception), (kind, wanted)
        return
    if isinstance(got, Exception):
        if kind in ("half", "float8"):
            assert "not torch.float" in str(got)  # asked for by name, the C++ kernels say what they take
            return
        assert str(got), kind
        assert kind in ("sparse", "sparse rows", "mkldnn", "quantised", "nested", "jagged", "lazy", "masked"), repr(got)
        return
    assert (got.dtype, got.device) == (wanted.dtype, wanted.device)
    if kind != "nested":  # which has no shape
        assert got.shape == wanted.shape
    assert type(got) is type(wanted)
    if not got.is_meta:
        torch.testing.assert_close(value(got), value(wanted), rtol=2e-5, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------------------------- what happens around the operation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operation", OPERATIONS)
class TestAround:
    def test_a_trace_computes_with_what_it_is_given(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        traced = torch.jit.trace(lambda x: f(x, impl=impl), x, check_trace=False)
        torch.testing.assert_close(traced(x + 1), f(x + 1, impl="torch"))

    def test_forward_mode_keeps_its_tangents(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        with forward_ad.dual_level():
            outs = [
                forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)), impl=name))
                for name in (impl, "torch")
            ]
        assert outs[0].tangent is not None
        torch.testing.assert_close(outs[0].tangent, outs[1].tangent)

    def test_a_tangent_of_the_gradient_alone_is_kept_or_refused(self, operation: str, impl: str) -> None:
        """Never lost: where forward-mode AD begins behind the operation, the backward is the first to see it."""
        x, f = OPERATIONS[operation]

        def tangent(name: str) -> Tensor | None:
            leaf = x.clone().requires_grad_()
            out = f(leaf, impl=name)
            upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(torch.ones_like(out), upstream)
                return forward_ad.unpack_dual(torch.autograd.grad(out, leaf, dual)[0]).tangent  # type: ignore[no-any-return]

        try:
            wanted = tangent("torch")
        except NotImplementedError as error:
            pytest.skip(f"torch has none either: {error}")
        assert wanted is not None
        try:
            got = tangent(impl)
        except NotImplementedError as error:
            refusal = str(error)
        else:
            assert got is not None
            torch.testing.assert_close(got, wanted)
            return
        assert "has no forward-mode AD; take backend=torch" in refusal

    def test_batched_gradients(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        found = []
        for name in (impl, "torch"):
            leaf = x.clone().requires_grad_()
            out = f(leaf, impl=name)
            upstream = torch.stack([torch.full_like(out, n) for n in (1.0, 2.0, -1.0)])
            found.append(torch.autograd.grad(out, leaf, upstream, is_grads_batched=True)[0])
        torch.testing.assert_close(*found)

    def test_compiled_autograd(self, operation: str, impl: str) -> None:
        """It captures a backward, so it must be able to hash and to hand over all that a node kept."""
        x, f = OPERATIONS[operation]
        found = []
        for name in (impl, "torch"):
            leaf = x.clone().requires_grad_()
            out = f(leaf, impl=name)
            with (
                compiled_autograd._enable(torch.compile(backend="eager")) if name == impl else contextlib.nullcontext()
            ):
                (out * out).sum().backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.parametrize("kind", ["zero", "negative", "subclass", "expanded"])
    def test_gradients_of_any_kind(self, kind: str, create_graph: bool, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        found = []
        for name in (impl, "torch"):
            leaf = x.clone().requires_grad_()
            out = f(leaf, impl=name)
            upstream = KINDS[kind](seeded(*out.shape, seed=3))
            found.append(torch.autograd.grad(out, leaf, upstream, create_graph=create_graph)[0])
        torch.testing.assert_close(*(value(x) for x in found), rtol=2e-5, atol=1e-5)

    def test_functional_transforms(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        for transform in (
            lambda g: torch.func.vmap(g)(torch.stack([x, x + 1])),
            lambda g: torch.func.jacrev(g)(x),
            lambda g: torch.func.jvp(g, (x,), (torch.ones_like(x),))[1],
            lambda g: torch.func.grad(lambda x: g(x).sum())(x),
            lambda g: torch.func.functionalize(g)(x),
        ):
            got, wanted = (transform(lambda x, name=name: f(x, impl=name)) for name in (impl, "torch"))
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-5)

    def test_modes_see_it_and_change_nothing(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        with Logging() as log:
            got = f(x, impl=impl)
        assert log.seen
        torch.testing.assert_close(got, f(x, impl="torch"))

    def test_fake_tensors_are_never_read(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            with pytest.MonkeyPatch.context() as patch:
                for name in ("TARGETS",):
                    patch.setitem(globals(), name, mode.from_tensor(globals()[name]))
                got = f(fake, impl=impl)
        assert isinstance(got, FakeTensor)
        assert (got.shape, got.dtype) == (f(x, impl="torch").shape, f(x, impl="torch").dtype)

    def test_a_graph_of_it_computes_the_same(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        graph = make_fx(lambda x: f(x, impl=impl))(x)
        torch.testing.assert_close(graph(x + 1), f(x + 1, impl="torch"), rtol=2e-5, atol=1e-5)

    def test_saved_tensors_may_be_packed(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        found = []
        for name in (impl, "torch"):
            leaf = x.clone().requires_grad_()
            with torch.autograd.graph.save_on_cpu():
                out = f(leaf, impl=name)
            found.append(torch.autograd.grad(out.sum(), leaf)[0])
        torch.testing.assert_close(*found)

    def test_a_saved_tensor_that_was_changed_is_an_error(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        leaf = x.clone().requires_grad_()
        inside = leaf * 1
        out = f(inside, impl=impl)
        inside.detach().zero_()
        with torch.no_grad():
            inside.add_(1)
        with contextlib.suppress(RuntimeError):  # or what it computes is right, because it kept no such tensor
            torch.autograd.grad(out.sum(), leaf)

    def test_inference_and_autocast(self, operation: str, impl: str) -> None:
        x, f = OPERATIONS[operation]
        with torch.inference_mode():
            torch.testing.assert_close(f(x, impl=impl), f(x, impl="torch"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, wanted = f(x, impl=impl), f(x, impl="torch")
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)


# ----------------------------------------------------------------------------------------------------- no uninitialised


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("q", "kv"), [((2, 0, 3, 4), (2, 1, 3, 4)), ((2, 4, 0, 4), (2, 2, 5, 4)), ((0, 2, 3, 4), (0, 2, 3, 4))], ids=str
)
def test_keys_that_no_query_reads_have_zero_gradients(q: tuple[int, ...], kv: tuple[int, ...], impl: str) -> None:
    Q, K, V = seeded(*q).requires_grad_(), seeded(*kv).requires_grad_(), seeded(*kv).requires_grad_()
    with poisoned_memory():
        out = causal_attention(Q, K, V, impl=impl)
        gradients = torch.autograd.grad(out.sum(), (Q, K, V), allow_unused=True, materialize_grads=True)
    assert all((g == 0).all() for g in gradients)


def test_an_instruction_set_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from chargpt.errors import ConfigError
    from chargpt.kernels import native

    monkeypatch.setenv("CHARGPT_CPU_ISA", "typo")
    native.load.cache_clear()
    with pytest.raises(ConfigError, match=r"CHARGPT_CPU_ISA must be one of plain, .*got 'typo'"):
        native.load()
    native.load.cache_clear()


@pytest.mark.parametrize("option", [{"z_loss": float("nan")}, {"z_loss": float("inf")}, {"softcap": float("nan")}])
@pytest.mark.parametrize("impl", [*IMPLS, "torch"])
def test_numbers_that_are_none_are_an_error(option: dict[str, float], impl: str) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        softmax_cross_entropy(seeded(2, 3, 5), TARGETS, impl=impl, **option)  # type: ignore[arg-type]
