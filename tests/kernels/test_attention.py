"""Causal attention: every implementation that runs here, against a naive twin in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from chargpt.kernels import causal_attention

from .cases import (
    ATTENTION_CASES,
    DRAWS,
    HUGE_ATTENTION,
    AttentionCase,
    assert_as_right_as_torch,
    implementations,
    naive_attention,
    naive_keep,
    torch_attention,
)

IMPLEMENTATIONS = implementations("causal_attention")
LOWER_PRECISION = implementations("causal_attention", torch.float32, torch.bfloat16, torch.float16)
SEED = 2024


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def drawn_seed() -> int:
    """The seed that causal_attention draws from `generator()`."""
    return int(torch.randint(2**63 - 1, (), generator=generator()))


def keep_mask(case: AttentionCase) -> Tensor | None:
    if "dropout_p" not in case.options:
        return None
    B, H, T, S = case.B, case.H, case.T, case.S or case.T
    rule = (naive_keep(drawn_seed(), case.options["dropout_p"], bh, S - T + i, s)
            for bh in range(B * H) for i in range(T) for s in range(S))  # fmt: skip
    return torch.tensor(list(rule)).reshape(B, H, T, S)


def gradients(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of fixed random linear functions of O and lse, so that both contribute."""
    weights = torch.Generator().manual_seed(7)
    upstream = [torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)


def run(case: AttentionCase, inputs: tuple[Tensor, Tensor, Tensor], impl: str) -> tuple[Tensor, Tensor]:
    return causal_attention(*inputs, generator=generator(), return_lse=True, impl=impl, **case.options)


@pytest.mark.parametrize("case", [*ATTENTION_CASES, HUGE_ATTENTION], ids=lambda case: case.name)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float64_is_the_naive_twins(case: AttentionCase, impl: str) -> None:
    inputs = case.inputs()
    got = run(case, inputs, impl)
    truth = naive_attention(*inputs, seed=drawn_seed() if "dropout_p" in case.options else None, **case.options)
    for x, y in zip((*got, *gradients(got, inputs)), (*truth, *gradients(truth, inputs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [*ATTENTION_CASES, HUGE_ATTENTION], ids=lambda case: case.name)
@pytest.mark.parametrize(("impl", "dtype"), LOWER_PRECISION, ids=str)
def test_lower_precision_loses_no_more_than_torch(case: AttentionCase, impl: str, dtype: torch.dtype) -> None:
    keep = keep_mask(case)
    draws = []
    for draw in DRAWS:
        inputs = case.inputs(dtype, draw)
        exact = tuple(x.detach().double().requires_grad_() for x in inputs)
        got = run(case, inputs, impl)
        truth = torch_attention(
            *exact, keep=keep, **case.options
        )  # in float64, where it is the loops' equal: see below
        plain = torch_attention(*inputs, keep=keep, **case.options)[0]
        plain_lse = torch_attention(*(x.float() for x in inputs), **case.options)[1]
        outputs = zip(got, truth, (plain, plain_lse), strict=True)
        grads = gradients(got, inputs), gradients(truth, exact), gradients((plain, plain_lse), inputs)
        draws.append([*outputs, *zip(*grads, strict=True)])
    for name, triples in zip(("O", "lse", "dQ", "dK", "dV"), zip(*draws, strict=True), strict=True):
        assert_as_right_as_torch(name, list(triples))


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_the_two_truths_agree(case: AttentionCase) -> None:
    inputs = case.inputs()
    seed = drawn_seed() if "dropout_p" in case.options else None
    loops = naive_attention(*inputs, seed=seed, **case.options)
    matrices = torch_attention(*inputs, keep=keep_mask(case), **case.options)
    torch.testing.assert_close(matrices, loops, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_agrees_with_scaled_dot_product_attention(impl: str) -> None:
    q, k, v = AttentionCase("sdpa", B=3, H=4, T=64, D=32).inputs(torch.float32)
    got = causal_attention(q, k, v, impl=impl)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, torchs)
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad(got, (q, k, v), upstream)
    for x, y in zip(ours, torch.autograd.grad(torchs, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"window": 2, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl: str, options: dict[str, float]) -> None:
    inputs = AttentionCase("gradcheck", B=1, H=4, H_kv=2, T=3, S=5, D=3).inputs()

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return causal_attention(*qkv, generator=generator(), return_lse=True, impl=impl, **options)  # type: ignore

    assert torch.autograd.gradcheck(attend, inputs)


@given(st.data())
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_small_shape(impl: str, data: st.DataObject) -> None:
    H_kv, T = data.draw(st.integers(1, 3), "H_kv"), data.draw(st.integers(1, 20), "T")
    case = AttentionCase(
        "any",
        B=data.draw(st.integers(1, 2), "B"),
        H=H_kv * data.draw(st.integers(1, 3), "group"),
        H_kv=H_kv,
        T=T,
        S=T + data.draw(st.integers(0, 20), "S - T"),
        D=data.draw(st.integers(1, 20), "D"),
        options={
            "window": data.draw(st.none() | st.integers(1, 30), "window"),
            "dropout_p": data.draw(st.just(0.0) | st.floats(0.01, 0.9), "dropout_p"),
        },
    )
    inputs = case.inputs()
    got = run(case, inputs, impl)
    seed = drawn_seed() if case.options["dropout_p"] > 0 else None
    truth = naive_attention(*inputs, seed=seed, **case.options)
    for x, y in zip((*got, *gradients(got, inputs)), (*truth, *gradients(truth, inputs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_last_queries_alone_give_the_last_rows(impl: str) -> None:
    """Decoding with cached keys is the same function, dropout included: positions are absolute."""
    q, k, v = AttentionCase("cached", T=21).inputs()
    options = {"dropout_p": 0.3, "window": 6, "impl": impl}
    whole = causal_attention(q, k, v, generator=generator(), **options)  # type: ignore[call-overload]
    tail = causal_attention(q[:, :, -4:], k, v, generator=generator(), **options)  # type: ignore[call-overload]
    torch.testing.assert_close(tail, whole[:, :, -4:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_query_sees_the_future(impl: str) -> None:
    q, k, v = AttentionCase("future", T=12).inputs()
    (dk,) = torch.autograd.grad(causal_attention(q, k, v, impl=impl)[:, :, :5].sum(), k)
    assert dk[:, :, :5].abs().sum() > 0
    assert not dk[:, :, 5:].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_draws_from_the_generator_and_only_when_on(impl: str) -> None:
    inputs = AttentionCase("draws", T=16).inputs()
    rng = generator()
    before = rng.get_state()
    causal_attention(*inputs, generator=rng, impl=impl)
    assert torch.equal(rng.get_state(), before)
    first = causal_attention(*inputs, dropout_p=0.5, generator=rng, impl=impl)
    second = causal_attention(*inputs, dropout_p=0.5, generator=rng, impl=impl)
    assert not torch.equal(first, second)
    rng.set_state(before)
    assert torch.equal(causal_attention(*inputs, dropout_p=0.5, generator=rng, impl=impl), first)

    torch.manual_seed(3)
    default = causal_attention(*inputs, dropout_p=0.5, impl=impl)
    rng.manual_seed(3)
    assert torch.equal(causal_attention(*inputs, dropout_p=0.5, generator=rng, impl=impl), default)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing_but_joins_mixed_dtypes(impl: str) -> None:
    q, k, v = AttentionCase("autocast", T=33, D=32).inputs(torch.float32)
    alone = causal_attention(q, k, v, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(causal_attention(q, k, v, impl=impl), alone)
        mixed = causal_attention(q, k.bfloat16(), v.bfloat16(), impl=impl)
    assert torch.equal(mixed, causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_into_one_graph(impl: str) -> None:
    q, k, v = AttentionCase("compile", H=4, H_kv=2, T=9).inputs(torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return causal_attention(q, k, v, window=4, return_lse=True, impl=impl)

    # aot_eager traces forward and backward as inductor does, without its minute of C++ compiling
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, eager = compiled(q, k, v), attend(q, k, v)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(gradients(got, (q, k, v)), gradients(eager, (q, k, v)))
    dropped = torch.compile(
        lambda q, k, v: causal_attention(q, k, v, dropout_p=0.5, impl=impl), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(dropped(q, k, v), dropped(q, k, v))


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        ((x(2, 3, 4), x(2, 3, 4), x(2, 3, 4)), {}, r"q must be \(B, H, T, D\).*\(2, 3, 4\)"),
        ((x(1, 2, 3, 4), x(1, 2, 3, 4), x(1, 2, 3, 5)), {}, r"k and v must have one shape.*\(1, 2, 3, 5\)"),
        ((x(1, 2, 3, 4), x(1, 2, 3, 5), x(1, 2, 3, 5)), {}, "agree in B and D"),
        ((x(1, 3, 3, 4), x(1, 2, 3, 4), x(1, 2, 3, 4)), {}, "multiple.*got 3 and 2"),
        ((x(1, 2, 4, 4), x(1, 2, 3, 4), x(1, 2, 3, 4)), {}, "S=3 and T=4"),
        ((x(1, 2, 3, 0), x(1, 2, 3, 0), x(1, 2, 3, 0)), {}, "D be at least 1"),
        ((x(1, 1, 1, 1, dtype=torch.int64),) * 3, {}, "floating dtype.*int64"),
        ((x(1, 1, 1, 1), x(1, 1, 1, 1, dtype=torch.float64), x(1, 1, 1, 1)), {}, "one floating dtype.*float64"),
        ((x(1, 1, 1, 1),) * 3, {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((x(1, 1, 1, 1),) * 3, {"dropout_p": math.nan}, "dropout_p"),
        ((x(1, 1, 1, 1),) * 3, {"window": 0}, "window must be at least 1 or None, got 0"),
    ],
)
def test_wrong_arguments_are_named(qkv: tuple[Tensor, ...], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_attention(*qkv, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 40], ids="{} heads".format)  # the work is shared by queries, or by heads
@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "torch"])
def test_threads_change_no_bit(impl: str, heads: int, dtype: torch.dtype) -> None:
    q, k, v = AttentionCase("threads", B=1, H=heads, T=130, D=32).inputs(dtype)
    seed = torch.Generator()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = causal_attention(
                q, k, v, dropout_p=0.2, generator=seed.manual_seed(1), return_lse=True, impl=impl
            )
            results.append((out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="the native module is not here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case", [AttentionCase("opcheck", T=5, S=9, H=4, H_kv=2), AttentionCase("empty", B=0)], ids=str
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_operators_pass_opcheck(case: AttentionCase, dtype: torch.dtype, dropout_p: float) -> None:
    q, k, v = case.inputs(dtype)
    options = (0.5, dropout_p, 3, torch.tensor(7))
    forward = torch.ops.chargpt.causal_attention.default
    torch.library.opcheck(forward, (q, k, v, *options))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = forward(q, k, v, *options)
    gradients = (torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(
        torch.ops.chargpt.causal_attention_backward.default, (*gradients, q, k, v, out, lse, *options)
    )


@pytest.mark.parametrize("impl", sorted({*IMPLEMENTATIONS} - {"torch"}))
def test_torchs_counter_counts_attention(impl: str) -> None:
    """As its own kernels: two products of (T, D) and (D, S) forward, five backward, and what is hidden too."""
    q, k, v = (torch.randn(2, heads, T, 8, requires_grad=True) for heads, T in ((4, 6), (2, 10), (2, 10)))
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            causal_attention(q, k, v, impl=impl).sum().backward()
        assert counter.get_total_flops() == 7 * 2 * 2 * 4 * 6 * 10 * 8


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loud", [0, 300])
def test_one_key_far_above_the_others_wherever_it_stands(loud: int, impl: str) -> None:
    """Keys come in parts, and the maximum so far is kept: exp of its distance to a later, lower one is infinite."""
    q, k, v = torch.ones(1, 1, 600, 4), torch.zeros(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    k[:, :, loud] = 200.0
    out, lse = causal_attention(q, k, v, scale=1.0, return_lse=True, impl=impl)
    torch.testing.assert_close(out[0, 0, loud:], v[0, 0, loud].expand(600 - loud, -1))
    torch.testing.assert_close(lse[0, 0, loud:], torch.full((600 - loud,), 800.0))


def test_a_generator_of_another_device_is_refused() -> None:
    """Kernels read the seed where it lies: on another GPU that would be no address of theirs."""
    elsewhere = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match="the generator must be of the CPU or of cpu, got one of cuda:1"):
        causal_attention(*(torch.zeros(1, 1, 1, 1),) * 3, dropout_p=0.5, generator=elsewhere)  # type: ignore[call-overload]
