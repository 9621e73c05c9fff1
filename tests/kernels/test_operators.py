"""What `chargpt/kernels/ops/` makes of any backend's kernels, on kernels in PyTorch that run everywhere.

So the part that the CUDA and Triton kernels share is tested where there is no GPU. The C++ kernels go through the same
operators, in test_attention.py and test_cross_entropy.py.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.autograd import forward_ad

from chargpt.kernels.backends import cuda
from chargpt.kernels.backends.triton import backend as triton
from chargpt.kernels.ops import OPERATIONS
from chargpt.kernels.ops.attention import reference as reference_attention
from chargpt.kernels.ops.common import OperatorLibrary
from chargpt.kernels.ops.cross_entropy import reference as reference_cross_entropy
from chargpt.kernels.philox import dropout_keep_mask

from .cases import ATTENTION_CASES, CROSS_ENTROPY_CASES, AttentionCase, CrossEntropyCase

calls: Counter[str] = Counter()


class Kernels:
    """The forward is the reference's, and the backward is written out, since kernels run below autograd."""

    @staticmethod
    def causal_attention_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        calls["attend"] += 1
        out, lse = attend(q, k, v, *options)
        return by_time(out), lse

    @staticmethod
    def causal_attention_backward(
        dO: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        scale: float, dropout_p: float, window: int | None, seed: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls["attend backward"] += 1
        (B, H, T), (H_kv, S) = q.shape[:3], k.shape[1:3]
        dO, dlse = out.new_zeros(out.shape) if dO is None else dO, 0 if dlse is None else dlse[..., None]
        K, V = (x.repeat_interleave(H // H_kv, 1) for x in (k, v))
        distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
        hidden = (distance < 0) | (distance >= (window or S))
        P = (scale * (q @ K.mT) - lse[..., None]).exp().masked_fill(hidden, 0)
        drop = torch.ones_like(P)
        if seed is not None:
            drop = dropout_keep_mask(seed, dropout_p, B * H, T, S).view_as(P).to(P) / (1 - dropout_p)
        dP = (dO @ V.mT) * drop
        dS = P * (dP - (dO * out).sum(-1, keepdim=True) + dlse)
        dK, dV = (x.unflatten(1, (H_kv, H // H_kv)).sum(2) for x in (scale * dS.mT @ q, (P * drop).mT @ dO))
        return by_time(scale * dS @ K), by_time(dK), by_time(dV)

    @staticmethod
    def softmax_cross_entropy_forward(logits: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        *options, with_gradient = arguments
        calls["loss and gradient" if with_gradient else "loss"] += 1
        loss = cross_entropy(logits, targets, *options)
        x = capped(logits, options[3])
        m = x.amax(-1)
        normalisers = torch.stack([m, (x - m[:, None]).exp().sum(-1)])
        one = torch.ones_like(loss)
        return loss, normalisers, dlogits(one, logits, targets, normalisers, *options) if with_gradient else None

    @staticmethod
    def softmax_cross_entropy_backward(*arguments: Any) -> Tensor:
        calls["gradient"] += 1
        return dlogits(*arguments)

    @staticmethod
    def scale_(gradient: Tensor, factor: Tensor) -> None:
        calls["scale"] += 1
        gradient.mul_(factor)


def by_time(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).reshape(-1, logits.shape[-1])
    return x if softcap is None else softcap * torch.tanh(x / softcap)  # (N, V)


def dlogits(
    dloss: Tensor, logits: Tensor, targets: Tensor, normalisers: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
) -> Tensor:  # fmt: skip
    x, y, (m, total) = capped(logits, softcap), targets.long().reshape(-1, 1), normalisers[..., None]
    counted = y != ignore_index
    wanted = torch.full_like(x, label_smoothing / x.shape[1])
    wanted.scatter_add_(1, y * counted, torch.full_like(x[:, :1], 1 - label_smoothing))
    p = (x - m).exp() / total
    dx = p * (1 + 2 * z_loss * (m + total.log())) - wanted
    dx = dx if softcap is None else dx * (1 - (x / softcap) ** 2)
    dx = dx * (dloss.reshape(-1, 1) if reduction == "none" else dloss) * counted
    return (dx / counted.sum().clamp(min=1) if reduction == "mean" else dx).to(logits.dtype).reshape(logits.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, window: Any, seed: Any) -> Any:
    return reference_attention(q, k, v, scale=scale, dropout_p=dropout_p, window=window, seed=seed, return_lse=True)


def cross_entropy(logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
    return reference_cross_entropy(logits, targets, **dict(zip(names, options, strict=True)))


FUSED = (OPERATIONS["causal_attention"], OPERATIONS["softmax_cross_entropy"])
OPERATORS = OperatorLibrary("chargpt_test", "CPU", Kernels, FUSED, gradient_in_forward=True)
OPS = torch.ops.chargpt_test
# A GPU's operators, whose kernels get the CPU's tensors.
GPU_OPERATORS = OperatorLibrary("chargpt_test_gpu", "CUDA", Kernels, FUSED, gradient_in_forward=True)
GPU_OPS = torch.ops.chargpt_test_gpu
GPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
redirected = torch.library.Library("chargpt_test_gpu", "IMPL")
for name in ("causal_attention", "causal_attention_backward"):
    redirected.impl(name, partial(getattr(GPU_OPS, name).default.redispatch, GPU_KEY), "CPU")


@pytest.fixture(autouse=True)
def counted() -> None:
    calls.clear()


def attention(case: AttentionCase, *qkv: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale": 0.4, "dropout_p": 0.0, "window": None} | case.options | changes
    seed = torch.tensor(5) if options["dropout_p"] else None
    return OPERATORS["causal_attention"](*qkv, **options, seed=seed, return_lse=True)  # type: ignore[return-value]


def loss_of(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "reduction": "mean"}
    return OPERATORS["softmax_cross_entropy"](logits, targets, **defaults | options)


@pytest.mark.parametrize("case", ATTENTION_CASES[::3], ids=lambda case: case.name)
def test_attention_and_its_gradients_are_the_kernels(case: AttentionCase) -> None:
    inputs = case.inputs()
    got = attention(case, *inputs)
    by_kernels = all(x.numel() for x in inputs)  # what has no elements is the reference's
    assert calls == ({"attend": 1} if by_kernels else {})
    options: dict[str, Any] = {"scale": 0.4, "dropout_p": 0.0, "window": None} | case.options
    expected = attend(*inputs, **options, seed=torch.tensor(5) if options["dropout_p"] else None)
    upstream = [torch.randn_like(x) for x in got]
    gradients = torch.autograd.grad(got, inputs, upstream)
    assert calls == ({"attend": 1, "attend backward": 1} if by_kernels else {})
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream))


def test_one_gradient_may_be_missing_and_leaves_may_be_fixed() -> None:
    case = AttentionCase("partial")
    q, k, v = case.inputs()
    out, lse = attention(case, q, k.detach(), v)
    expected = attend(q, k.detach(), v, 0.4, 0.0, None, None)
    for ours, theirs in ((out.sum(), expected[0].sum()), (lse.sum(), expected[1].sum())):
        got = torch.autograd.grad(ours, (q, v), retain_graph=True, allow_unused=True, materialize_grads=True)
        right = torch.autograd.grad(theirs, (q, v), retain_graph=True, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"window": 2}], ids=str)
def test_the_gradient_of_attentions_gradient(options: dict[str, Any]) -> None:
    case = AttentionCase("twice", B=1, H=2, H_kv=1, T=2, S=3, D=2)
    assert torch.autograd.gradgradcheck(lambda *qkv: attention(case, *qkv, **options), case.inputs(), fast_mode=True)


def test_heads_that_no_kernel_takes_are_the_references() -> None:
    case = AttentionCase("wide", B=1, T=3, D=257)
    inputs = case.inputs(torch.float32)
    assert torch.equal(attention(case, *inputs)[0], attend(*inputs, 0.4, 0.0, None, None)[0])
    assert not calls


@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES[::3], ids=lambda case: case.name)
def test_the_loss_and_its_gradient_are_the_kernels(case: CrossEntropyCase) -> None:
    logits, targets = case.inputs(torch.float32)
    reduction = case.options.get("reduction", "mean")
    loss = loss_of(logits, targets, **case.options)
    by_kernels = logits.numel() > 0
    assert calls == ({} if not by_kernels else {"loss": 1} if reduction == "none" else {"loss and gradient": 1})
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    both = {"loss": 1, "gradient": 1} if reduction == "none" else {"loss and gradient": 1, "scale": 1}
    assert calls == (both if by_kernels else {})
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "reduction": "mean"}
    expected = reference_cross_entropy(logits, targets, **defaults | case.options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits, upstream)[0])


@pytest.mark.parametrize("wanted", ["no gradient", "no grad mode", "inference mode", "float16", "compiled"])
def test_the_gradient_is_not_computed_in_the_forward(wanted: str) -> None:
    dtype = torch.float16 if wanted == "float16" else torch.float32  # where the gradient of a mean underflows
    logits, targets = CrossEntropyCase("plain").inputs(dtype)
    if wanted == "no gradient":
        loss_of(logits.detach(), targets)
    elif wanted == "no grad mode":
        with torch.no_grad():
            loss_of(logits, targets)
    elif wanted == "inference mode":
        with torch.inference_mode():
            loss_of(logits, targets)
    elif wanted == "float16":
        torch.autograd.grad(loss_of(logits, targets), logits)
        assert calls.pop("gradient") == 1
    else:
        compiled = torch.compile(lambda x: loss_of(x, targets), fullgraph=True, backend="aot_eager")(logits)
        torch.testing.assert_close(compiled, cross_entropy(logits, targets, -100, 0.0, 0.0, None, "mean"))
    assert calls == {"loss": 1}


def test_the_second_walk_through_a_graph_computes_the_gradient_again() -> None:
    """The first gives the gradient away; what its receiver does with it must not show in the second."""
    logits, targets = CrossEntropyCase("retain", shape=(20,)).inputs(torch.float32)
    loss = loss_of(logits, targets)
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(1.0), retain_graph=True)
    expected = 3 * first
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(3.0))
    assert calls == {"loss and gradient": 1, "scale": 1, "gradient": 1}
    torch.testing.assert_close(second, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_logits_that_were_overwritten_are_noticed_where_they_are_read_again() -> None:
    leaf, targets = CrossEntropyCase("overwritten").inputs(torch.float32)
    logits = 1 * leaf
    kept = loss_of(logits, targets)
    again = loss_of(logits, targets, reduction="none")
    expected = torch.autograd.grad(kept, leaf, retain_graph=True)[0]
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(again.sum(), leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kept, leaf)
    assert expected.any()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_gradient_of_the_losss_gradient(reduction: str) -> None:
    logits, targets = CrossEntropyCase("twice", shape=(3,), V=4, ignored=0.3).inputs()
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 4.0, "reduction": reduction}
    assert torch.autograd.gradgradcheck(lambda x: loss_of(x, targets, **options), (logits,), fast_mode=True)


def test_create_graph_after_a_gradient_in_the_forward() -> None:
    logits, targets = CrossEntropyCase("create").inputs()
    loss = loss_of(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    theirs = cross_entropy(logits, targets, -100, 0.0, 0.0, None, "mean")
    (expected,) = torch.autograd.grad(theirs, logits, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), logits)[0])


def test_torch_func_gets_the_reference() -> None:
    logits, targets = CrossEntropyCase("func", shape=(4, 3), V=7).inputs()
    each = torch.func.vmap(torch.func.grad(loss_of))(logits.detach(), targets)
    assert each.shape == (4, 3, 7)
    q, k, v = (x.detach() for x in AttentionCase("func").inputs())
    torch.func.grad(lambda q: attention(AttentionCase("func"), q, k, v)[0].sum())(q)
    assert not calls


class Heads:
    @staticmethod
    def qkv_heads_forward(qkv: Tensor, *_: Any) -> list[Tensor]:
        return [x.clone() for x in qkv.unflatten(-1, (3, 4)).transpose(1, 2).split(1, 1)]  # type: ignore[no-untyped-call]


HEADS = OperatorLibrary("chargpt_test_heads", "CPU", Heads, (OPERATIONS["qkv_heads"],))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_projection_is_kept_for_the_norm_alone(qk_norm: bool) -> None:
    """Of heads that are only split the backward needs no values."""
    kept: list[torch.Size] = []
    qkv = torch.randn(2, 5, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        HEADS.ops.qkv_heads(qkv, None, None, None, 1, 1, qk_norm)
    assert kept == [qkv.shape] * qk_norm


def test_a_tangent_that_comes_with_the_gradient_is_refused() -> None:
    q, k, v = AttentionCase("tangent").inputs()
    out = attention(AttentionCase("tangent"), q, k, v)[0]
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="has no forward-mode AD; take backend=torch"):
            torch.autograd.grad(out, q, upstream)


def test_attention_compiles_into_one_graph() -> None:
    case = AttentionCase("compile", H=4, H_kv=2, T=9)
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(lambda *qkv: attention(case, *qkv), fullgraph=True, backend="aot_eager")(*inputs)
    eager = attention(case, *inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled[0].sum(), inputs), torch.autograd.grad(eager[0].sum(), inputs)
    )


def test_fake_tensors_pass_through_without_a_kernel() -> None:
    logits, targets = CrossEntropyCase("fake").inputs(torch.bfloat16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(logits.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(fake, mode.from_tensor(targets)), fake)
        assert (gradient.shape, gradient.dtype) == (logits.shape, torch.bfloat16)
    assert not calls


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction: str) -> None:
    q, k, v = AttentionCase("opcheck", T=5, S=9, H=4, H_kv=2).inputs(torch.float32)
    options: tuple[Any, ...] = (0.5, 0.3, 3, torch.tensor(7))
    torch.library.opcheck(OPS.causal_attention.default, (q, k, v, *options))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = OPS.causal_attention(q, k, v, *options)
    given = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *options)
    torch.library.opcheck(OPS.causal_attention_backward.default, given)

    logits, targets = CrossEntropyCase("opcheck", shape=(4, 5), V=7).inputs(torch.float32)
    options = (-100, 0.1, 0.01, 5.0, reduction)
    torch.library.opcheck(OPS.softmax_cross_entropy.default, (logits, targets, *options))
    logits = logits.detach()
    loss, normalisers = OPS.softmax_cross_entropy(logits, targets, *options)
    given = (torch.ones_like(loss), logits, targets, normalisers, *options)
    torch.library.opcheck(OPS.softmax_cross_entropy_backward.default, given)
    torch.library.opcheck(OPS.softmax_cross_entropy_with_gradient.default, (logits, targets, *options))
    torch.library.opcheck(OPS.scale_.default, (logits, torch.tensor(2.0)))


# --------------------------------------------------------------------------------------------------------- CUDA graphs


def test_inductor_may_keep_all_operators_in_its_graphs() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("chargpt")]
    operators = [getattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]).default for name in names]
    assert not {op.name() for op in operators if torch.Tag.cudagraph_unsafe in op.tags}
    found, compiler = [], graphs_of(lambda graph: found.append(get_first_incompatible_cudagraph_node(graph)))
    options: dict[str, Any] = {"scale": 0.4, "dropout_p": 0.25, "window": None, "return_lse": False}

    def attend(*qkv: Tensor) -> Any:
        return OPERATORS["causal_attention"](*qkv, **options, seed=torch.tensor(5))

    torch.compile(attend, fullgraph=True, backend=compiler)(*AttentionCase("graph").inputs()).sum().backward()
    torch.compile(loss_of, fullgraph=True, backend=compiler)(*CrossEntropyCase("graph").inputs()).backward()
    assert found == [None] * 4


def graphs_of(look: Callable[[torch.fx.GraphModule], object]) -> Any:
    """A backend that shows the graphs of both passes, as inductor gets them, and runs them as they are."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        look(graph)
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(captured=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.captured)
    return state


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_capture_refuses_a_seed_on_the_cpu_in_both_passes_and_nothing_else(
    stream: SimpleNamespace, compiled: bool
) -> None:
    """A replay would repeat the mask of the capture."""

    def call(dropout_p: float, *qkv: Tensor) -> Any:
        seed = torch.tensor(5) if dropout_p else None
        options: dict[str, Any] = {"scale": 0.4, "dropout_p": dropout_p, "window": None, "seed": seed}
        return GPU_OPERATORS["causal_attention"](*qkv, **options, return_lse=False)

    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = AttentionCase("capture").inputs()
    refusal = r"dropout cannot be captured in a CUDA graph while its seed lies on the CPU, .*; let a generator"
    stream.captured = False
    out = call(0.3, *inputs)
    torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    stream.captured = True
    with pytest.raises(RuntimeError, match=refusal):
        call(0.3, *inputs)
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(out.sum(), inputs)
    assert calls == {"attend": 1, "attend backward": 1}
    torch.autograd.grad(call(0.0, *inputs).sum(), inputs)
    assert calls == {"attend": 2, "attend backward": 2}


@pytest.mark.parametrize("operators", [cuda.LIBRARY, triton.LIBRARY], ids=["cuda", "triton"])
def test_the_kernels_of_both_implementations_refuse_it(
    stream: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, operators: OperatorLibrary
) -> None:
    monkeypatch.setattr(operators, "kernels", lambda: Kernels)
    q, k, v = (x.detach() for x in AttentionCase("capture").inputs())
    out, lse = attend(q, k, v, 0.4, 0.0, None, None)
    forward, backward = (
        partial(getattr(operators.ops, name).default.redispatch, GPU_KEY, *tensors)
        for name, tensors in (
            ("causal_attention", (q, k, v)),
            ("causal_attention_backward", (out, None, q, k, v, out, lse)),
        )
    )
    stream.captured = True
    for kernel in (forward, backward):
        kernel(0.4, 0.0, None, None)
        with pytest.raises(RuntimeError, match="dropout cannot be captured"):
            kernel(0.4, 0.3, None, torch.tensor(5))
    stream.captured = False
    for kernel in (forward, backward):
        kernel(0.4, 0.3, None, torch.tensor(5))
    assert calls == {"attend": 2, "attend backward": 2}


def test_the_reference_refuses_it_on_a_gpu_only(stream: SimpleNamespace) -> None:
    stream.captured = True
    with pytest.raises(RuntimeError, match="dropout cannot be captured"):
        dropout_keep_mask(torch.tensor(5), 0.3, 2, 3, 4, "cuda:0")
    dropout_keep_mask(torch.tensor(5), 0.3, 2, 3, 4)
    case = AttentionCase("capture")
    attention(case, *case.inputs(), dropout_p=0.3)


def test_compiled_the_reference_copies_the_seed_to_the_device_before_it_computes_with_it() -> None:
    """That copy torch refuses to capture. A seed on the CPU would be read on the host, at each launch, and frozen."""
    on_cpu = []

    def look(graph: torch.fx.GraphModule) -> None:
        tensors = [node for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        on_cpu.extend(node.op for node in tensors if node.meta["val"].device.type == "cpu")

    mask = torch.compile(lambda seed: dropout_keep_mask(seed, 0.3, 2, 3, 4, "meta"), backend=graphs_of(look))
    mask(torch.tensor(5))
    assert on_cpu == ["placeholder"]
