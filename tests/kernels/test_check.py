"""`chargpt info --check`: it finds a wrong kernel, and what passes enters "auto" here until the next build."""

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chargpt.cli import info
from chargpt.config import TransformerConfig
from chargpt.errors import ChargptError
from chargpt.generation import check as decoding
from chargpt.generation.generator import choose_engine
from chargpt.kernels import check, native, proven, registry, resolve
from chargpt.models import build_model

from .cases import implementations

OPERATIONS = {
    "causal_attention",
    "softmax_cross_entropy",
    "linear_cross_entropy",
    "add_norm",
    "qkv_heads",
    "activation",
}
needs_cpp = pytest.mark.skipif("cpp" not in implementations("causal_attention"), reason="no native module")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the build's record."""
    path = tmp_path / "_native.json"
    built = json.loads(native.RECORD.read_text()) if native.RECORD.exists() else {}
    built = {"python": platform.python_version(), "torch": torch.__version__, "problem": None} | built
    built.pop("checked", None)
    path.write_text(json.dumps(built))
    monkeypatch.setattr(native, "RECORD", path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the cases that take seconds."""
    cases = check._cases

    def few(device: str) -> dict[str, list[check.Case]]:
        return {
            name: [case for case in listed if max(max(x.shape, default=1) for x in case.inputs(torch.float32)) < 1000]
            for name, listed in cases(device).items()
        }

    monkeypatch.setattr(check, "_cases", few)
    monkeypatch.setattr(check, "ROUNDS", 2)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which nobody measured."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def broken(operation: str, change: Callable[[Any], Any]) -> tuple[registry.Backend, ...]:
    """The backends, with a fault in one operation of cpp."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        made = registered(*arguments, **options)
        return change(made) if isinstance(made, torch.Tensor) else (change(made[0]), *made[1:])

    entries = {entry.name: entry for entry in registry.BACKENDS}
    registered = entries["cpp"].functions[operation]
    entries["cpp"] = replace(entries["cpp"], functions={**entries["cpp"].functions, operation: wrong})
    return tuple(entries.values())


@needs_cpp
def test_the_kernels_here_pass(small: None) -> None:
    found = check.check("cpp", "cpu")
    assert found.keys() == OPERATIONS
    assert [one.problems for one in found.values()] == [[]] * len(OPERATIONS)
    assert all(one.speed > 0 and one.checks >= 2 for one in found.values())


def test_every_case_has_something_to_compute() -> None:
    cases = check._cases("cpu")
    assert cases.keys() == OPERATIONS
    for operation in OPERATIONS - {"causal_attention", "softmax_cross_entropy"}:  # whose odd cases are shared
        assert all(x.numel() for case in cases[operation] for x in case.inputs(torch.float32))
    for case in cases["linear_cross_entropy"]:
        ignored = case.options["targets"] == -100
        assert ignored.any()
        assert not ignored.all()
        assert case.options["targets"].max() > 0


def test_the_ratio_of_speeds_is_that_of_the_least_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, took = [0.0], {"slow": iter([9.0, 6.0, 7.0]), "fast": iter([2.0, 3.0, 2.5])}

    def work(name: str) -> None:
        clock[0] += next(took[name])

    monkeypatch.setattr(check.time, "perf_counter", lambda: clock[0])
    assert check.ratio(partial(work, "slow"), partial(work, "fast"), 3) == 3.0


@needs_cpp
@pytest.mark.parametrize("operation", sorted(OPERATIONS - {"linear_cross_entropy"}))
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1.001 if x.dtype == torch.float32 else x,
        lambda x: x * 1.25 if x.dtype == torch.bfloat16 else x,
        lambda x: x.double(),
        lambda x: x * torch.nan,
        lambda x: x + 0 * x.detach() + (x - x.detach()),  # the value is right, and the gradient twice what it is
    ],
    ids=["float32 off by a thousandth", "bfloat16 off by a quarter", "another dtype", "NaN", "another gradient"],
)
def test_a_wrong_kernel_is_found(
    operation: str, change: Callable[[Any], Any], small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BACKENDS", broken(operation, change))
    cases = check._cases("cpu")[operation]
    monkeypatch.setattr(check, "_cases", lambda device: {operation: cases})
    if operation == "softmax_cross_entropy" and "bfloat16" in str(change.__code__.co_names):
        pytest.skip("the loss is float32")
    problems = {name: one.problems for name, one in check.check("cpp", "cpu").items()}
    assert any(problem.startswith(f"{operation} ") for problem in problems[operation])


@needs_cpp
def test_a_kernel_that_fails_is_a_finding(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(registry, "BACKENDS", broken("activation", fail))
    found = check.check("cpp", "cpu")["activation"]
    assert "RuntimeError: no kernel image" in found.problems[0]
    assert found.speed == 0


@needs_cpp
def test_a_wrong_decoder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (decoding.check().problems, decoding.check().checks) == ([], 6)
    monkeypatch.setattr(decoding, "ALLOWED", dict.fromkeys(decoding.ALLOWED, 1e-9))
    assert len(decoding.check().problems) == 6
    assert "int8" in decoding.check().problems[2]


@needs_cpp
def test_auto_takes_what_passed_here_with_this_torch(
    record: Path, foreign: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(TransformerConfig(), 5, seed=1)
    assert native.cpu_kind().startswith("aarch64 ")
    before = resolve("causal_attention", "cpu", torch.float32)
    assert before.name == "torch"
    assert "`chargpt info --check`" in before.reason
    assert choose_engine(model).engine == "torch"
    native.record_check("cpp", native.cpu_kind(), True, checks=3)
    assert json.loads(record.read_text())["checked"] == {
        f"cpp {native.cpu_kind()}": {"passed": True, "checks": 3} | native._code()
    }
    assert resolve("causal_attention", "cpu", torch.float32).name == "cpp"
    assert choose_engine(model).engine == "int8"
    with monkeypatch.context() as context:
        context.setattr(torch, "__version__", "1.0")
        assert native.unmeasured()
    native.record_check("cpp", native.cpu_kind(), False)  # it failed later
    assert native.unmeasured() == native.FAILED


@needs_cpp
def test_auto_leaves_alone_what_failed_here(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert native.unmeasured() is None
    native.record_check("cpp", native.cpu_kind(), False)
    assert resolve("add_norm", "cpu", torch.float32).name == "torch"
    native.record_check("cpp", native.cpu_kind(), True)
    assert native.unmeasured() is None


@pytest.mark.parametrize("checked", [3, [], {"cpp x": 1}, {"cpp x": {}}, None])
def test_a_damaged_record_is_no_pass(record: Path, checked: Any) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | {"checked": checked}))
    assert not native.checked("cpp", "x")
    native.record_check("cpp", "x", True)  # and is mended by the next check
    assert native.checked("cpp", "x")


@pytest.mark.parametrize("content", ['{"python": 3, "torch": "2", "problem": null}', "[" * 100_000, "{}", "\x00"])
def test_a_damaged_record_of_the_build_is_one_sentence(record: Path, content: str) -> None:
    record.write_text(content)
    assert "is damaged" in str(native.check_record(record))
    assert native.checked("cpp", "x") is None
    with pytest.raises(ChargptError, match="is damaged"):
        native.require_record()


def test_where_nothing_was_built_nothing_is_recorded(record: Path) -> None:
    record.unlink()
    assert native.checked("triton", "8.9") is None
    with pytest.raises(ChargptError, match="was not built"):
        native.record_check("triton", "8.9", True)
    assert not record.exists()


def test_nothing_is_checked_that_cannot_be_remembered(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check", lambda *_: pytest.fail("it was checked"))
    monkeypatch.setattr(native.os, "access", lambda *_: False)
    with pytest.raises(ChargptError, match="cannot be written"):
        info.check()


def test_a_gpu_that_passed_here_needs_no_record_of_the_package(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 9))
    assert "`chargpt info --check`" in str(proven.why_not("triton"))
    native.record_check("triton", "8.9", True)
    assert proven.why_not("triton") is None
    assert proven.why_not("cuda") is not None
    native.record_check("triton", "8.9", False)
    assert proven.why_not("triton") == native.FAILED


def found(speed: float, *problems: str) -> check.Finding:
    return check.Finding(2, list(problems), speed)


@needs_cpp
@pytest.mark.parametrize(
    ("speeds", "problem", "passes"), [((0.5, 2, 3), (), True), ((0.5, 1, 3), (), False), ((2, 2, 2), ("bad",), False)]
)
def test_the_command_records_what_is_right_and_faster(
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    speeds: tuple[float, ...],
    problem: tuple[str, ...],
    passes: bool,
) -> None:
    asked = []

    def kernels(backend: str, device: str) -> dict[str, check.Finding]:
        asked.append((backend, device))
        return {"causal_attention": found(speeds[0]), "add_norm": found(speeds[1], *problem)}

    monkeypatch.setattr(check, "check", kernels)
    monkeypatch.setattr(decoding, "check", lambda: found(speeds[2]))
    if problem:
        with pytest.raises(ChargptError, match=r"^cpp computed wrong results, so auto leaves them alone; "):
            info.check()
    else:
        info.check()
    assert asked == [("cpp", "cpu")]
    assert native.checked("cpp", native.cpu_kind()) is passes
    out, err = capsys.readouterr()
    assert out == ""
    assert f"  causal_attention         2 checks, right, {speeds[0]:.1f} times as fast as PyTorch" in err
    assert ("1.00 times as fast as PyTorch, so auto leaves them alone" in err) == (speeds[1] == 1)
    assert ("  add_norm                 2 checks, WRONG" in err) == bool(problem)
    assert ("  WRONG: bad" in err) == bool(problem)
    if passes:
        entry = json.loads(record.read_text())["checked"][f"cpp {native.cpu_kind()}"]
        assert (entry["checks"], entry["speed"]) == (6, 2)
