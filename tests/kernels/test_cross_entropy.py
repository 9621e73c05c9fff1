"""Softmax cross-entropy: every implementation that runs here, against a naive twin in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chargpt.kernels import available_implementations, softmax_cross_entropy

from .cases import (
    CROSS_ENTROPY_CASES,
    DRAWS,
    CrossEntropyCase,
    assert_as_right_as_torch,
    naive_cross_entropy,
    torch_cross_entropy,
)

IMPLEMENTATIONS = available_implementations()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
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
