"""The checks themselves, on the CPU: they pass for right kernels and name what is wrong with broken ones."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from chargpt.kernels import reference, registry
from kernels.cases import ATTENTION_CASES, CROSS_ENTROPY_CASES

from . import checks
from .checks import all_checks, attention_problems, cross_entropy_problems, mask_problems

PACKED = next(case for case in ATTENTION_CASES if case.name == "packed_dropout")
IGNORED = next(case for case in CROSS_ENTROPY_CASES if case.name == "some_ignored")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For work as small as this, waiting for a second one costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def break_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put broken functions in the place of what `impl="torch"` runs; the truth in float64 stays right."""

    def put(**functions: Any) -> None:
        entries = {entry.name: entry for entry in registry.IMPLEMENTATIONS}
        right = entries["torch"]

        def only_in_low_precision(name: str, broken: Any) -> Any:
            def function(x: Tensor, *others: Any, **options: Any) -> Any:
                chosen = getattr(right, name) if x.dtype == torch.float64 else broken
                return chosen(x, *others, **options)

            return function

        changed = {name: only_in_low_precision(name, broken) for name, broken in functions.items()}
        entries["torch"] = dataclasses.replace(right, **changed)
        monkeypatch.setattr(registry, "IMPLEMENTATIONS", tuple(entries.values()))

    return put


def test_every_shared_case_is_checked_in_every_dtype() -> None:
    found = {str(check) for check in all_checks("cpu", small=True)}
    for dtype in ("float32", "float16", "bfloat16"):
        assert {f"causal_attention torch {dtype} {case.name}" for case in ATTENTION_CASES} <= found
        assert {f"softmax_cross_entropy torch {dtype} {case.name}" for case in CROSS_ENTROPY_CASES} <= found
    assert len(found) == len(all_checks("cpu", small=True))  # the names are what results are kept under


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_right_kernels_have_no_problems(impl: str) -> None:
    wanted = (
        "packed_dropout",
        "grouped_heads",
        "T513_D32",
        "some_ignored",
        "sliced",
        "dropout_mask_T37_S101_D128_p0.9",
    )
    chosen = [check for check in all_checks("cpu", [impl], small=True) if check.name in wanted]
    assert len(chosen) >= 2 * len(wanted) or impl not in {check.impl for check in all_checks("cpu", small=True)}
    assert {str(check): problems for check in chosen if (problems := check.problems())} == {}


def test_a_wrong_gradient_is_named(break_torch: Callable[..., None]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return reference.causal_attention(q, k.detach(), v, **options)

    break_torch(causal_attention=attend)
    problems = attention_problems("torch", torch.bfloat16, PACKED, "cpu")
    assert any(problem.startswith("dK") for problem in problems)
    assert not any(problem.startswith(("O", "lse", "dQ")) for problem in problems)


def test_a_value_that_was_never_written_is_found(break_torch: Callable[..., None]) -> None:
    def lose(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        loss = reference.softmax_cross_entropy(logits, targets, **options)
        return loss + 0 * torch.empty_like(loss)

    break_torch(softmax_cross_entropy=lose)
    assert any("loss" in problem for problem in cross_entropy_problems("torch", torch.float32, IGNORED, "cpu"))


def test_a_result_that_changes_from_call_to_call_is_found(break_torch: Callable[..., None]) -> None:
    calls = itertools.count()

    def lose(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return reference.softmax_cross_entropy(logits, targets, **options) + 1e-6 * next(calls)

    break_torch(softmax_cross_entropy=lose)
    problems = cross_entropy_problems("torch", torch.float32, IGNORED, "cpu")
    assert "a second call gives other bits" in problems


@pytest.mark.parametrize("mask", checks.MASKS, ids=str)
def test_another_dropout_mask_is_found(break_torch: Callable[..., None], mask: checks.Mask) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, seed: Tensor, **options: Any) -> Any:
        return reference.causal_attention(q, k, v, seed=seed % 2**32, **options)  # the upper half of the seed is lost

    break_torch(causal_attention=attend)
    forward, backward = mask_problems("torch", torch.float32, mask, "cpu")
    assert "forward" in forward
    assert "backward" in backward


def test_other_results_under_torch_compile_are_found(break_torch: Callable[..., None]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return reference.causal_attention(2 * q if torch.compiler.is_compiling() else q, k, v, **options)

    break_torch(causal_attention=attend)
    assert any("compiled O" in problem for problem in checks.compile_problems("torch", torch.float32, "cpu"))
