"""Which implementation a call gets: data in one table, and a sentence for every refusal."""

import platform
import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.config import TransformerConfig
from chargpt.errors import ConfigError
from chargpt.generation import choose_engine
from chargpt.kernels import (
    available_backends,
    causal_attention,
    describe_backends,
    native,
    proven,
    registry,
    resolve,
    softmax_cross_entropy,
)
from chargpt.kernels.backends import cuda
from chargpt.kernels.compiling import assume_constant_result
from chargpt.kernels.ops import OPERATIONS
from chargpt.kernels.registry import Backend, Choice
from chargpt.models import build_model


def test_the_reference_is_always_available_and_the_rest_say_why_not() -> None:
    described = describe_backends()
    assert set(described) == {"torch", "cpp", "cuda", "triton"}
    assert "torch" in available_backends()
    for name, sentence in described.items():
        if name in available_backends():
            assert sentence.startswith("available: ")
        else:
            assert sentence.startswith("not available: ")
            assert len(sentence) > len("not available: ") + 10


@given(
    st.sampled_from([*OPERATIONS]),
    st.sampled_from(["cpu", "cuda", "cuda:1", "mps", "meta"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None)  # the first call loads modules
def test_auto_never_fails(operation: str, device: str, dtype: torch.dtype) -> None:
    choice = resolve(operation, device, dtype)
    assert choice.name in available_backends()
    assert choice.reason


def test_a_name_that_cannot_run_is_an_error_with_the_reason() -> None:
    q = torch.zeros(1, 1, 1, 1)
    for name in {"cpp", "cuda", "triton"} - set(available_backends()):
        reason = describe_backends()[name].removeprefix("not available: ")
        with pytest.raises(ConfigError, match=f"backend={name} cannot run causal_attention") as error:
            causal_attention(q, q, q, impl=name)
        assert reason in str(error.value)
        with pytest.raises(ConfigError, match=f"backend={name} cannot run softmax_cross_entropy"):
            softmax_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), impl=name)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of auto, cuda, triton, cpp, torch; got 'numpy'"):
        resolve("causal_attention", "cpu", torch.float32, "numpy")


def test_auto_takes_the_first_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def f() -> None: ...

    both = {"causal_attention": f, "softmax_cross_entropy": f}
    table = (
        Backend("broken", "broken", both, problem=lambda: "no compiler"),
        Backend("gpu", "gpu", both, devices=("cuda",)),
        Backend("half", "half", {"causal_attention": f}, dtypes=(torch.bfloat16,)),
        registry.BACKENDS[-1],
    )
    monkeypatch.setattr(registry, "BACKENDS", table)
    assert available_backends() == ("gpu", "half", "torch")
    assert resolve("causal_attention", "cuda:0", torch.float32).name == "gpu"
    assert resolve("causal_attention", "cpu", torch.bfloat16).name == "half"
    assert resolve("softmax_cross_entropy", "cpu", torch.bfloat16).name == "torch"
    choice = resolve("causal_attention", "cpu", torch.float32)
    assert choice.name == "torch"
    assert choice.reason == (
        "not broken, because no compiler; not half, because it takes torch.bfloat16, not torch.float32"
    )
    with pytest.raises(ConfigError, match="it has no softmax_cross_entropy"):
        resolve("softmax_cross_entropy", "cpu", torch.bfloat16, "half")


def with_problems(monkeypatch: pytest.MonkeyPatch, unproven: str | None = None, **problems: str | None) -> None:
    """The real table, on a machine where the named implementations have these problems, or none.

    unproven: what "auto" has against each of them
    """
    table = [
        replace(entry, problem=lambda problem=problems[entry.name]: problem, unproven=lambda: unproven)
        if entry.name in problems
        else entry
        for entry in registry.BACKENDS
    ]
    monkeypatch.setattr(registry, "BACKENDS", tuple(table))


@pytest.mark.parametrize("operation", ["causal_attention", "softmax_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("problems", "chosen"),
    [
        ({"cuda": None, "triton": None}, "cuda"),
        ({"cuda": "not built", "triton": None}, "triton"),
        ({"cuda": None, "triton": "not installed"}, "cuda"),
        ({"cuda": "not built", "triton": "not installed"}, "torch"),
    ],
    ids=str,
)
def test_auto_on_a_gpu_takes_cuda_then_triton(
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    dtype: torch.dtype,
    problems: dict[str, str | None],
    chosen: str,
) -> None:
    with_problems(monkeypatch, **problems)
    choice = resolve(operation, "cuda:0", dtype)
    assert choice.name == chosen
    before = list(problems)[: list(problems).index(chosen)] if chosen in problems else problems
    assert all(f"not {name}, because {problems[name]}" in choice.reason for name in before)
    assert resolve(operation, "cpu", dtype).name in ("cpp", "torch")


UNPROVEN = "no pass of `make gpu` is recorded for compute capability 9.0"


@pytest.mark.parametrize("operation", ["causal_attention", "softmax_cross_entropy"])
def test_auto_leaves_alone_what_is_unproven_here_and_a_name_does_not(
    monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with_problems(monkeypatch, UNPROVEN, cuda=None, triton=None)
    choice = resolve(operation, "cuda", torch.bfloat16)
    assert choice.name == "torch"
    assert choice.reason == (f"not cuda, because {UNPROVEN}; not triton, because {UNPROVEN}")
    for name in ("cuda", "triton"):
        assert resolve(operation, "cuda", torch.bfloat16, name) == Choice(name, "asked for by name")
    assert {"cuda", "triton"} < set(available_backends())
    with_problems(monkeypatch, cuda="not built", triton=None)
    assert resolve(operation, "cuda", torch.bfloat16).name == "triton"


def test_what_auto_leaves_alone_is_described_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    with_problems(monkeypatch, UNPROVEN, cuda=None, triton="not installed")
    described = describe_backends()
    assert described["cuda"] == f"available: CUDA kernels; auto leaves them alone: {UNPROVEN}"
    assert described["triton"] == "not available: not installed"
    with_problems(monkeypatch, cuda=None)
    assert describe_backends()["cuda"] == "available: CUDA kernels"


def test_the_gpus_kernels_and_no_others_must_be_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "why_not", lambda name: f"{name} is unproven")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = {entry.name: entry.unproven() for entry in registry.BACKENDS}
    assert found == {"cuda": "cuda is unproven", "triton": "triton is unproven", "cpp": None, "torch": None}


def test_auto_is_torch_on_a_cpu_on_which_nobody_measured_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    registry._choose.cache_clear()
    try:
        choice = resolve("softmax_cross_entropy", "cpu", torch.float32)
        assert choice.name == "torch"
        assert "on arm64 the C++ kernels pass their tests" in choice.reason
        model = build_model(TransformerConfig(n_embd=8, n_head=2, n_layer=1), 5, seed=1)
        assert choose_engine(model).engine == "torch"
    finally:
        registry._choose.cache_clear()


@pytest.mark.parametrize("operation", [name for name, one in OPERATIONS.items() if one.small])
def test_the_small_operations_on_a_gpu_are_the_references_whatever_name_a_model_gives(
    monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with_problems(monkeypatch, cuda=None, triton="not installed")
    assert resolve(operation, "cuda", torch.float32).name == "torch"
    assert resolve(operation, "cuda", torch.float32, "cuda") == Choice("torch", "cuda leaves it to the reference")
    with pytest.raises(ConfigError, match=f"backend=triton cannot run {operation}: not installed"):
        resolve(operation, "cuda", torch.float32, "triton")
    with pytest.raises(ConfigError, match=f"backend=cuda cannot run {operation}: it runs on cuda, not on cpu"):
        resolve(operation, "cpu", torch.float32, "cuda")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_gpus_kernels_leave_float64_and_the_cpu_to_others(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_problems(monkeypatch, cuda=None, triton=None)
    assert resolve("causal_attention", "cuda", torch.float64).name == "torch"
    with pytest.raises(
        ConfigError, match=r"it takes torch\.float32, torch\.bfloat16, torch\.float16, not torch\.float64"
    ):
        resolve("causal_attention", "cuda", torch.float64, name)
    with pytest.raises(ConfigError, match=f"backend={name} cannot run .*: it runs on cuda, not on cpu"):
        resolve("softmax_cross_entropy", "cpu", torch.float32, name)


@pytest.mark.parametrize(
    ("built", "gpus", "reason"),
    [
        (native.Native(None, "nobody built them"), [(9, 0)], "nobody built them"),
        (native.Native(ModuleType("kernels"), None), [], "torch sees no CUDA GPU"),
        (native.Native(ModuleType("kernels"), None), [(9, 0), (7, 5)], "the GPU has compute capability 7.5, .* 8.0"),
        (native.Native(ModuleType("kernels"), None), [(8, 0), (12, 0)], None),
    ],
)
def test_why_the_cuda_kernels_cannot_run(
    monkeypatch: pytest.MonkeyPatch, built: native.Native, gpus: list[tuple[int, int]], reason: str | None
) -> None:
    monkeypatch.setattr(native, "load_cuda", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: gpus[index])
    problem = cuda.problem()
    assert problem is None if reason is None else re.search(reason, str(problem))


def test_the_last_entry_serves_everything() -> None:
    last = registry.BACKENDS[-1]
    assert (last.devices, last.dtypes, last.problem()) == (None, None, None)
    assert all(last.functions[name] is one.reference for name, one in OPERATIONS.items())


def test_importing_the_kernels_and_choosing_for_a_cpu_imports_no_compiler_and_nothing_of_a_gpu() -> None:
    """Each of these costs more than a second, or a GPU's memory."""
    program = """if True:
        import sys
        import torch
        from chargpt.kernels import resolve, softmax_cross_entropy
        import chargpt.generation, chargpt.checkpoint, chargpt.training
        resolve("causal_attention", "cpu", torch.float32)
        softmax_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
        heavy = ("torch._dynamo", "torch._inductor", "triton", "chargpt._native_cuda", "mlflow", "dvc", "matplotlib")
        assert not {*heavy} & {*sys.modules}, {*heavy} & {*sys.modules}
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_mark_for_torch_compile_is_the_one_that_it_sets_itself() -> None:
    def ours() -> None: ...
    def theirs() -> None: ...

    assert vars(assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_torch_compile_takes_the_choice_as_a_constant_and_does_not_trace_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def search(*asked: object) -> int:
        torch._dynamo.graph_break()  # raises where it is traced
        return len(registry.BACKENDS) - 1

    monkeypatch.setattr(registry, "_choose", search)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + registry.choose("causal_attention", "cpu", torch.float32, "auto")

    assert compiled(torch.zeros(1)).item() == len(registry.BACKENDS) - 1
