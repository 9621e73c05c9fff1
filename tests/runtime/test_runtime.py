"""Device, precision, compilation and kernels: `auto` always finds something and says why, a name is kept or refused."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from chargpt.cli.info import as_text, collect
from chargpt.config import TrainConfig, override
from chargpt.errors import ConfigError
from chargpt.kernels import native
from chargpt.kernels.ops import OPERATIONS
from chargpt.kernels.registry import Choice
from chargpt.runtime import available_memory, device, device_name, memory, resolve_device, resolve_runtime

AUTO = TrainConfig()
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with one GPU, as far as torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    return monkeypatch


@without_cuda
def test_auto_on_a_cpu_gives_each_choice_its_reason() -> None:
    runtime = resolve_runtime(AUTO)
    assert (runtime.device, runtime.compile) == (torch.device("cpu"), False)
    assert runtime.backend in ("torch", "cpp", "cpp+torch", "torch+cpp")
    reasons = dict(line.split(": ", 1) for line in runtime.reasons)
    assert reasons["device cpu"] == "no CUDA GPU is here"
    assert reasons[f"precision {runtime.precision}"]
    assert reasons["compile off"]
    assert any(choice.startswith("backend ") for choice in reasons)


class NativeModule:
    """Stands in for the compiled one on a CPU that has, or lacks, bfloat16's dot product."""

    def __init__(self, bf16: bool) -> None:
        self.cpu_features = lambda: {"avx512_bf16": bf16}


@pytest.mark.parametrize(
    ("module", "options", "precision", "reason"),
    [
        (NativeModule(bf16=True), [], "bf16", "twice as fast"),
        (NativeModule(bf16=True), ["model.n_embd=32"], "fp32", "below 64 channels"),
        (NativeModule(bf16=True), ["model.kind=bigram"], "fp32", "below 64 channels"),
        (NativeModule(bf16=True), ["backend=torch"], "fp32", "without the C\\+\\+ kernels"),
        (NativeModule(bf16=False), [], "fp32", "no instructions for bf16"),
        (None, [], "fp32", "without the C\\+\\+ kernels"),
    ],
)
def test_precision_on_a_cpu(
    module: NativeModule | None, options: list[str], precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Native(module, None))  # type: ignore[arg-type]
    monkeypatch.setattr(device, "resolve", lambda *_: Choice("cpp", "for the test"))
    runtime = resolve_runtime(override(AUTO, ["device=cpu", *options]))
    assert runtime.precision == precision
    assert any(re.match(f"precision {precision}: .*{reason}", line) for line in runtime.reasons)


def test_auto_on_a_gpu_with_bf16_takes_it_and_compiles(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    runtime = resolve_runtime(AUTO)
    assert (runtime.device.type, runtime.precision, runtime.compile) == ("cuda", "bf16", True)


def test_auto_on_a_gpu_that_only_emulates_bf16_stays_with_fp32(gpu: pytest.MonkeyPatch) -> None:
    runtime = resolve_runtime(AUTO)
    assert (runtime.device.type, runtime.precision) == ("cuda", "fp32")
    assert "precision fp32: the GPU has no bf16 tensor cores" in runtime.reasons


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", ["always", "never"])
def test_what_is_asked_for_is_kept(precision: str, compiled: str) -> None:
    runtime = resolve_runtime(override(AUTO, ["device=cpu", f"precision={precision}", f"compile={compiled}"]))
    assert (runtime.precision, runtime.compile) == (precision, compiled == "always")
    assert sum(line.endswith(": asked for") for line in runtime.reasons) == 3
    with runtime.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_asked_for_where_none_is_is_an_error_that_says_why(name: str) -> None:
    for resolve in (resolve_device, lambda wanted: resolve_runtime(override(AUTO, [f"device={wanted}"]))):
        with pytest.raises(ConfigError, match=f"device {name} was asked for, but torch .* sees 0 CUDA GPUs; use auto"):
            resolve(name)


def test_the_second_gpu_of_a_machine_with_one_is_an_error(gpu: pytest.MonkeyPatch) -> None:
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="sees 1 CUDA GPUs"):
        resolve_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "", "tpu:0", "mps", "meta", "cuda:x", "cuda:-1", "CPU"])
def test_a_device_that_is_none_of_ours_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N"):
        resolve_device(name)


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernels_asked_for_that_cannot_run_are_an_error_that_says_why(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"backend={name} cannot run causal_attention: .*use backend=auto"):
        resolve_runtime(override(AUTO, ["device=cpu", f"backend={name}"]))


def test_the_reference_kernels_can_always_be_asked_for() -> None:
    assert resolve_runtime(override(AUTO, ["backend=torch"])).backend == "torch"


def test_the_cpu_has_a_name() -> None:
    name = device_name(torch.device("cpu"))
    assert name == name.strip() != ""
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        assert not models or name == models[0].strip()


def test_info_says_what_exists_and_why_the_rest_does_not() -> None:
    info = collect()
    assert info["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert info["cpu"]["cores"] >= 1
    assert info["cpu"]["torch_threads"] == torch.get_num_threads()
    assert set(info["backends"]) == {"cuda", "triton", "cpp", "torch"}
    for state in info["backends"].values():
        assert state.startswith(("available: ", "not available: "))
        assert len(state) > len("not available: ")
    chosen = info["chosen"]["cpu"]
    assert set(chosen) == {
        "causal_attention",
        "softmax_cross_entropy",
        *(name for name, one in OPERATIONS.items() if one.small),
    }
    assert "+".join(dict.fromkeys(chosen.values())) == resolve_runtime(override(runs.BIGRAM, ["backend=auto"])).backend
    text = as_text(info)
    for name in (*info["backends"], "torch ", "native module: ", "cuda module: ", "gpus: "):
        assert name in text


def test_info_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chargpt.cli.info.PACKAGES", ("torch", "no-such-package-anywhere"))
    info = collect()
    assert info["packages"]["no-such-package-anywhere"] is None
    assert "no-such-package-anywhere not installed" in as_text(info)


# -------------------------------------------------------------------------------------------------------------- memory


def test_free_memory_is_the_machines_or_what_its_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    stat = "anon 50000\ninactive_file 30000\nactive_file 10000\n"
    for name, content in (("limit", "300000"), ("used", "100000"), ("none", "max"), ("memory.stat", stat)):
        (tmp_path / name).write_text(content)
    groups = [(str(tmp_path), *names, "inactive_file") for names in (("limit", "used"), ("none", "used"), ("no", "no"))]
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups)
    assert available_memory(cpu) == 230_000  # the page cache is given back when memory is short
    (tmp_path / "memory.stat").unlink()
    assert available_memory(cpu) == 200_000
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups[1:])
    machine = available_memory(cpu)
    assert machine is None or machine > 10**7  # None: not Linux


def test_compiling_without_a_compiler_is_refused_when_asked_for_and_left_out_by_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compile always was asked for, but the C\+\+ compiler no-such"):
        resolve_runtime(override(AUTO, ["device=cpu", "compile=always"]))
    assert not resolve_runtime(override(AUTO, ["device=cpu", "compile=never"])).compile
    assert device._compile(AUTO, torch.device("cuda")) == (False, "the C++ compiler no-such-compiler is not installed")


def test_what_is_computed_again_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda _: "/usr/bin/g++")
    again = override(AUTO, ["recompute=true"])
    assert device._compile(AUTO, torch.device("cuda"))[0]
    assert device._compile(again, torch.device("cuda")) == (False, "blocks are computed again as they are")
    with pytest.raises(ConfigError, match="compile always was asked for, but a compiler decides itself"):
        device._compile(override(again, ["compile=always"]), torch.device("cuda"))
