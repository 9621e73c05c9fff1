"""The checks themselves, on the CPU: they pass for right kernels and name what is wrong with broken ones."""

import contextlib
import dataclasses
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from chargpt.kernels import registry
from chargpt.kernels.ops.add_norm import reference as reference_add_norm
from chargpt.kernels.ops.attention import reference as reference_attention
from chargpt.kernels.ops.cross_entropy import reference as reference_cross_entropy
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
        entries = {entry.name: entry for entry in registry.BACKENDS}
        right = entries["torch"]

        def only_in_low_precision(name: str, broken: Any) -> Any:
            def function(x: Tensor, *others: Any, **options: Any) -> Any:
                chosen = right.functions[name] if x.dtype == torch.float64 else broken
                return chosen(x, *others, **options)

            return function

        changed = {name: only_in_low_precision(name, broken) for name, broken in functions.items()}
        entries["torch"] = dataclasses.replace(right, functions={**right.functions, **changed})
        monkeypatch.setattr(registry, "BACKENDS", tuple(entries.values()))

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
        "layernorm_3x65_gains2_p0.2",
        "rmsnorm_700x128_gains2_p0.0",
    )
    chosen = [check for check in all_checks("cpu", [impl], small=True) if check.name in wanted]
    assert len(chosen) >= 2 * len(wanted) or impl not in {check.impl for check in all_checks("cpu", small=True)}
    assert {str(check): problems for check in chosen if (problems := check.problems())} == {}


def test_a_wrong_gradient_is_named(break_torch: Callable[..., None]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return reference_attention(q, k.detach(), v, **options)

    break_torch(causal_attention=attend)
    problems = attention_problems("torch", torch.bfloat16, PACKED, "cpu")
    assert any(problem.startswith("dK") for problem in problems)
    assert not any(problem.startswith(("O", "lse", "dQ")) for problem in problems)


@pytest.mark.parametrize("name", ["dx", "dweight", "dbias"])
def test_a_wrong_gradient_of_a_norm_is_named(break_torch: Callable[..., None], name: str) -> None:
    def add(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
        given = {"dx": x, "dweight": weight, "dbias": bias}
        given[name] = given[name] + 0.01 * (given[name] - given[name].detach())  # the same value
        return reference_add_norm(given["dx"], y, given["dweight"], given["dbias"], **options)

    break_torch(add_norm=add)
    case = next(case for case in checks.NORM_CASES if case.dropout_p and case.gains)
    problems = checks.norm_problems("torch", torch.float32, case, "cpu")
    assert [problem.split()[0].rstrip(":") for problem in problems] == [name]


def test_a_value_that_was_never_written_is_found(break_torch: Callable[..., None]) -> None:
    def lose(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        loss = reference_cross_entropy(logits, targets, **options)
        return loss + 0 * torch.empty_like(loss)

    break_torch(softmax_cross_entropy=lose)
    assert any("loss" in problem for problem in cross_entropy_problems("torch", torch.float32, IGNORED, "cpu"))


def test_a_result_that_changes_from_call_to_call_is_found(break_torch: Callable[..., None]) -> None:
    calls = itertools.count()

    def lose(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return reference_cross_entropy(logits, targets, **options) + 1e-6 * next(calls)

    break_torch(softmax_cross_entropy=lose)
    problems = cross_entropy_problems("torch", torch.float32, IGNORED, "cpu")
    assert "a second call gives other bits" in problems


@pytest.mark.parametrize("mask", checks.MASKS, ids=str)
def test_another_dropout_mask_is_found(break_torch: Callable[..., None], mask: checks.Mask) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, seed: Tensor, **options: Any) -> Any:
        return reference_attention(q, k, v, seed=seed % 2**32, **options)  # the upper half of the seed is lost

    break_torch(causal_attention=attend)
    forward, backward = mask_problems("torch", torch.float32, mask, "cpu")
    assert "forward" in forward
    assert "backward" in backward


def test_other_results_under_torch_compile_are_found(break_torch: Callable[..., None]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return reference_attention(2 * q if torch.compiler.is_compiling() else q, k, v, **options)

    break_torch(causal_attention=attend)
    assert any("compiled O" in problem for problem in checks.compile_problems("torch", torch.float32, "cpu"))


@pytest.mark.slow
def test_a_model_that_trains_differently_is_found(break_torch: Callable[..., None]) -> None:
    """In float32, so it is the losses of the reference that break here, and those of the kernels that stay."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return reference_attention(q, k, 0.9 * v, **options)

    impl = "cpp"
    if impl not in {check.impl for check in all_checks("cpu", small=True)}:
        pytest.skip("the C++ kernels are not built")
    assert checks.training_problems(impl, torch.bfloat16, "cpu") == []
    break_torch(causal_attention=attend)
    assert "losses differ by" in checks.training_problems(impl, torch.bfloat16, "cpu")[0]


@pytest.mark.slow
def test_a_compiled_step_is_compared_with_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, break_torch: Callable[..., None]
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="aot_eager"))  # inductor would compile C++
    assert checks.compiled_step_problems("torch", torch.bfloat16, "cpu") == []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return reference_attention(2 * q if torch.compiler.is_compiling() else q, k, v, **options)

    break_torch(causal_attention=attend)
    assert any("compiled loss" in problem for problem in checks.compiled_step_problems("torch", torch.bfloat16, "cpu"))


# ------------------------------------------------------------------------------------ what needs a GPU, on a stand-in


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda where streams do nothing, and a captured graph runs at once and is never replayed."""

    class Stream:
        def wait_stream(self, _: object) -> None: ...
        def synchronize(self) -> None: ...

    class Graph:
        def replay(self) -> None: ...

    stand_in = types.SimpleNamespace(
        Stream=Stream,
        CUDAGraph=Graph,
        current_stream=Stream,
        stream=lambda _: contextlib.nullcontext(),
        graph=lambda _, stream=None: contextlib.nullcontext(),
        synchronize=lambda: None,
        _sleep=lambda _: None,
        mem_get_info=lambda: (1e9, 80e9),
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    small = [{"T": 16, "V": 65}, {"T": 8, "V": 33}]
    work = checks._work
    monkeypatch.setattr(
        checks, "_work", lambda impl, dtype, device, **sizes: work(impl, dtype, device, **{**sizes, **small[0]})
    )
    monkeypatch.setattr(checks, "_two_works", lambda *given: [work(*given, **sizes) for sizes in small])
    return stand_in


def test_every_check_of_a_gpu_walks_through(no_gpu: Any) -> None:
    assert checks.stream_problems("torch", torch.bfloat16, "cpu") == []
    assert checks.thread_problems("torch", torch.bfloat16, "cpu", times=2) == []
    assert checks.capture_problems("torch", torch.bfloat16, "cpu") == ["the replayed graph gives other results"]
    for far in (checks.far_attention_problems, checks.far_cross_entropy_problems):
        with pytest.raises(checks.SkippedError, match=r"GB of the GPU's memory, 1\.0 GB are free"):
            far("torch", torch.bfloat16, "cpu")


def test_host_threads_that_disturb_each_other_are_found(no_gpu: Any, break_torch: Callable[..., None]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        alone = threading.current_thread() is threading.main_thread()
        return reference_attention(q if alone else 1.1 * q, k, v, **options)

    break_torch(causal_attention=attend)
    problems = checks.thread_problems("torch", torch.bfloat16, "cpu", times=2)
    assert problems == [f"host thread {number} gets other results than alone" for number in (0, 1)]


def test_dropout_that_lets_itself_be_captured_is_found(no_gpu: Any) -> None:
    problems = checks.dropout_capture_problems("torch", torch.bfloat16, "cpu")
    captured = [f"the {name} pass was captured with a seed on the CPU" for name in ("forward", "backward")]
    assert problems == ["every replay drops the same weights", *captured]
    real = checks.causal_attention

    def refuse(*inputs: Tensor, **options: Any) -> Any:
        if no_gpu.capturing and "generator" in options:
            raise RuntimeError("something else")
        return real(*inputs, **options)

    @contextlib.contextmanager
    def capture(_: object, stream: object = None) -> Iterator[None]:
        no_gpu.capturing = True
        try:
            yield
        finally:
            no_gpu.capturing = False

    no_gpu.capturing, no_gpu.graph = False, capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "causal_attention", refuse)
        forward = checks.dropout_capture_problems("torch", torch.bfloat16, "cpu")[1]
    assert forward == "the forward pass refused without a reason: something else"


def test_on_a_gpu_the_reference_is_not_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of all checks, and those beyond 2^31 elements would need more memory than any card has."""
    found = [(name, dtype) for name in ("cuda", "triton", "torch") for dtype in checks.DTYPES]
    monkeypatch.setattr(checks, "implementations", lambda *_, **__: found)
    listed = all_checks("cuda")
    assert {check.impl for check in listed} == {"cuda", "triton"}
    assert {check.name for check in listed if check.alone} == {
        "attention_beyond_2^31_elements",
        "cross_entropy_beyond_2^31_elements",
    }
    assert {check.impl for check in checks.smoke_checks("cuda")} == {"cuda", "triton"}
    assert len({str(check) for check in checks.smoke_checks("cuda")}) == 16
