"""Softmax cross-entropy: every implementation that runs here, against a naive twin in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chargpt.kernels import softmax_cross_entropy

from .cases import (
    CROSS_ENTROPY_CASES,
    DRAWS,
    CrossEntropyCase,
    assert_as_right_as_torch,
    implementations,
    naive_cross_entropy,
    torch_cross_entropy,
)

IMPLEMENTATIONS = implementations("softmax_cross_entropy")
LOWER_PRECISION = implementations("softmax_cross_entropy", torch.float32, torch.bfloat16, torch.float16)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, logits, upstream)[0]


@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float64_is_the_naive_twins(case: CrossEntropyCase, impl: str) -> None:
    logits, targets = case.inputs()
    got = softmax_cross_entropy(logits, targets, impl=impl, **case.options)
    truth = naive_cross_entropy(logits, targets, **case.options)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(got, logits), gradient(truth, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("impl", "dtype"), LOWER_PRECISION, ids=str)
def test_lower_precision_loses_no_more_than_torch(case: CrossEntropyCase, impl: str, dtype: torch.dtype) -> None:
    losses, gradients = [], []
    for draw in DRAWS:
        logits, targets = case.inputs(dtype, draw)
        exact = logits.detach().double().requires_grad_()
        got = softmax_cross_entropy(logits, targets, impl=impl, **case.options)
        truth = naive_cross_entropy(exact, targets, **case.options)
        plain = torch_cross_entropy(logits, targets, **case.options)
        assert got.dtype == torch.float32
        losses.append((got, truth, plain))
        gradients.append((gradient(got, logits), gradient(truth, exact), gradient(plain, logits)))
    assert_as_right_as_torch("loss", losses)
    assert_as_right_as_torch("gradient", gradients)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_agrees_with_torchs_cross_entropy(impl: str, label_smoothing: float, reduction: str) -> None:
    logits, targets = CrossEntropyCase("torch", shape=(50,), ignored=0.2).inputs(torch.float32)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    got = softmax_cross_entropy(logits, targets, impl=impl, **options)  # type: ignore[arg-type]
    torchs = F.cross_entropy(logits, targets, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, torchs)
    torch.testing.assert_close(gradient(got, logits), gradient(torchs, logits))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl: str) -> None:
    logits, targets = CrossEntropyCase("gradcheck", V=5, ignored=0.3).inputs()

    def loss(logits: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, targets, label_smoothing=0.2, z_loss=0.1, softcap=4.0, impl=impl)

    assert torch.autograd.gradcheck(loss, (logits,))


@given(st.data())
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_small_shape(impl: str, data: st.DataObject) -> None:
    case = CrossEntropyCase(
        "any",
        shape=tuple(data.draw(st.lists(st.integers(0, 5), max_size=3), "shape")),
        V=data.draw(st.integers(1, 70), "V"),
        spread=data.draw(st.sampled_from([1e-3, 1.0, 100.0]), "spread"),
        ignored=data.draw(st.sampled_from([0.0, 0.5, 1.0]), "ignored"),
        options={
            "label_smoothing": data.draw(st.floats(0, 1), "label_smoothing"),
            "z_loss": data.draw(st.sampled_from([0.0, 1e-4, 1.0]), "z_loss"),
            "softcap": data.draw(st.none() | st.floats(0.5, 50), "softcap"),
            "reduction": data.draw(st.sampled_from(["none", "mean", "sum"]), "reduction"),
        },
    )
    logits, targets = case.inputs()
    got = softmax_cross_entropy(logits, targets, impl=impl, **case.options)
    truth = naive_cross_entropy(logits, targets, **case.options)
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient(got, logits), gradient(truth, logits), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_mean_over_no_row_is_zero_with_zero_gradient(impl: str) -> None:
    logits = torch.randn(4, 65, requires_grad=True)
    loss = softmax_cross_entropy(logits, torch.full((4,), -100), z_loss=0.1, label_smoothing=0.1, impl=impl)
    assert loss.item() == 0
    assert torch.equal(gradient(loss, logits), torch.zeros(4, 65))


@pytest.mark.parametrize("target", [65, -1, 10**9])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_target_out_of_range_is_an_error_that_says_which_and_where(impl: str, target: int) -> None:
    targets = torch.zeros(3, 4, dtype=torch.int64)
    targets[0, 1] = -100
    targets[1, 2] = target
    with pytest.raises(IndexError, match=rf"\[0, 65\).*ignore_index=-100.*got {target} at position \(1, 2\)"):
        softmax_cross_entropy(torch.zeros(3, 4, 65), targets, impl=impl)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_targets_may_have_any_integer_dtype(impl: str, dtype: torch.dtype) -> None:
    logits, targets = CrossEntropyCase("integers").inputs()
    expected = softmax_cross_entropy(logits, targets, impl=impl)
    assert torch.equal(softmax_cross_entropy(logits, targets.to(dtype), impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leaves_the_logits_alone(impl: str) -> None:
    logits, targets = CrossEntropyCase("untouched", ignored=0.3).inputs(torch.float32)
    before, version = logits.detach().clone(), logits._version
    gradient(softmax_cross_entropy(logits, targets, softcap=3.0, impl=impl), logits)
    assert torch.equal(logits, before)
    assert logits._version == version


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing(impl: str) -> None:
    logits, targets = CrossEntropyCase("autocast").inputs(torch.float32)
    alone = softmax_cross_entropy(logits, targets, z_loss=0.1, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(softmax_cross_entropy(logits, targets, z_loss=0.1, impl=impl), alone)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_into_one_graph(impl: str) -> None:
    logits, targets = CrossEntropyCase("compile", ignored=0.3).inputs(torch.float32)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.1, softcap=9.0, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, targets)
    eager = loss(logits, targets)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradient(compiled, logits), gradient(eager, logits))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_gradient_of_the_gradient(impl: str, reduction: str) -> None:
    logits, targets = CrossEntropyCase("twice", shape=(3,), V=4, ignored=0.3).inputs()

    def loss(logits: Tensor) -> Tensor:
        options = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 4.0}
        return softmax_cross_entropy(logits, targets, reduction=reduction, impl=impl, **options)  # type: ignore

    assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_graph_may_be_walked_twice(impl: str, reduction: str) -> None:
    """The first backward gives the gradient away; what its receiver does with it must not show in the second."""
    logits, targets = CrossEntropyCase("retain", shape=(20,)).inputs(torch.float32)
    loss = softmax_cross_entropy(logits, targets, reduction=reduction, impl=impl).sum()
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(1.0), retain_graph=True)
    expected = 3 * first
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(3.0))
    torch.testing.assert_close(second, expected)
    assert not first.any()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_of_many_megabytes_do_not_share_memory(impl: str) -> None:
    """The C++ kernels use the memory of a large gradient again, but only once it is free."""
    logits, targets = CrossEntropyCase("large", shape=(170,), V=50257).inputs(torch.float32)  # 34 MB
    a = gradient(softmax_cross_entropy(logits, targets, impl=impl), logits)
    before = a[:, ::1000].clone()
    b = gradient(softmax_cross_entropy(logits, targets.flip(0), impl=impl), logits)
    assert torch.equal(a[:, ::1000], before)
    assert a.data_ptr() != b.data_ptr()
    expected = gradient(F.cross_entropy(logits, targets.flip(0)), logits)
    torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("N", "V"), [(1000, 65), (100, 1000), (5, 50257)])
@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "torch"])
def test_threads_change_no_bit(impl: str, N: int, V: int, dtype: torch.dtype) -> None:
    logits, targets = CrossEntropyCase("threads", shape=(N,), V=V, ignored=0.1).inputs(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = softmax_cross_entropy(logits, targets, impl=impl)
            rows = softmax_cross_entropy(logits, targets, reduction="none", impl=impl)
            results.append((loss, gradient(loss, logits), rows, gradient(rows, logits)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_infinity_are_not_hidden(impl: str) -> None:
    for V in (5, 65, 1000):
        for value in (torch.nan, torch.inf):
            logits = torch.zeros(3, V)
            logits[1, V - 1] = value
            losses = softmax_cross_entropy(logits.requires_grad_(), torch.zeros(3).long(), reduction="none", impl=impl)
            assert losses.isnan().tolist() == [False, True, False]
            assert gradient(losses, logits).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_torch_func(impl: str) -> None:
    logits, targets = CrossEntropyCase("func", shape=(4, 3), V=7, ignored=0.2).inputs()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, targets, z_loss=0.1, impl=impl)

    by_func = torch.func.grad(loss)(logits.detach(), targets)
    torch.testing.assert_close(by_func, gradient(loss(logits, targets), logits) / 0.5)
    each = torch.func.vmap(torch.func.grad(loss))(logits.detach(), targets)
    alone = torch.stack([torch.func.grad(loss)(x, y) for x, y in zip(logits.detach(), targets, strict=True)])
    torch.testing.assert_close(each, alone)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no native module")
class TestOperators:
    """What torch.library asks of the C++ kernels' operators."""

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(4, 5), (0,), ()], ids=str)
    def test_opcheck(self, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
        logits, targets = CrossEntropyCase("opcheck", shape=shape, V=7).inputs(dtype)
        options = (-100, 0.1, 0.01, 5.0, reduction)
        forward = torch.ops.chargpt.softmax_cross_entropy.default
        torch.library.opcheck(forward, (logits, targets, *options))
        loss, normalisers = forward(logits.detach(), targets, *options)
        upstream = torch.ones_like(loss)
        backward = torch.ops.chargpt.softmax_cross_entropy_backward.default
        torch.library.opcheck(backward, (upstream, logits.detach(), targets, normalisers, *options))

    def test_agree_with_the_eager_path(self) -> None:
        for case in CROSS_ENTROPY_CASES:
            logits, targets = case.inputs(torch.float32)
            defaults = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None}
            options = {**defaults, "reduction": "mean", **case.options}
            by_operator, _ = torch.ops.chargpt.softmax_cross_entropy(logits, targets, *options.values())
            eager = softmax_cross_entropy(logits, targets, impl="cpp", **case.options)
            assert torch.equal(by_operator, eager), case.name
            torch.testing.assert_close(
                gradient(by_operator, logits), gradient(eager, logits), rtol=1e-5, atol=1e-9, msg=case.name
            )


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(4, 5), torch.zeros(3).long(), {}, r"\(\.\.\., V\).*\(4, 5\) and \(3,\)"),
        (torch.zeros(()), torch.zeros(()).long(), {}, r"\(\.\.\., V\)"),
        (torch.zeros(4, 0), torch.zeros(4).long(), {}, "V at least 1"),
        (torch.zeros(4, 5).int(), torch.zeros(4).long(), {}, "logits must have a floating dtype.*int32"),
        (torch.zeros(4, 5), torch.zeros(4), {}, "targets must have an integer dtype.*float32"),
        (torch.zeros(4, 5), torch.zeros(4).long(), {"label_smoothing": 1.5}, "label_smoothing.*1.5"),
        (torch.zeros(4, 5), torch.zeros(4).long(), {"z_loss": -1.0}, "z_loss.*-1"),
        (torch.zeros(4, 5), torch.zeros(4).long(), {"softcap": 0.0}, "softcap.*0"),
        (torch.zeros(4, 5), torch.zeros(4).long(), {"reduction": "median"}, "reduction.*'median'"),
    ],
)
def test_wrong_arguments_are_named(logits: Tensor, targets: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_cross_entropy(logits, targets, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_cap_below_1_bounds_logits_of_any_size(impl: str) -> None:
    logits = 1e4 * torch.randn(7, 65, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(7)
    truth = naive_cross_entropy(logits.double(), targets, softcap=0.5)
    torch.testing.assert_close(softmax_cross_entropy(logits, targets, softcap=0.5, impl=impl), truth.float())
