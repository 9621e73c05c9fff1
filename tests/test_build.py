"""What setup.py decides about the native modules, and what it records. No compiler is called here."""

import importlib.util
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

from chargpt.kernels import native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in its folder, which builds nothing unless it is run."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a toolkit whose nvcc answers as that of a version of CUDA does, and the only one to be found."""

    def make(version: str, toolkit: str = "toolkit") -> Path:
        bin_folder = tmp_path / toolkit / "bin"
        bin_folder.mkdir(parents=True)
        script = bin_folder / "nvcc"
        script.write_text(
            '#!/bin/sh\n[ "$1" = --dryrun ] && echo "#\\$ _HERE_=$(dirname "$0")" >&2 && exit 0\n'
            f'echo "Cuda compilation tools, release {version}, V{version}.88"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / toolkit))
        return tmp_path / toolkit

    return make


def test_a_toolkit_that_fits_is_taken(setup_py: ModuleType, nvcc: Callable[..., Path]) -> None:
    home = nvcc("13.1")  # another minor version is good enough
    assert setup_py.require_toolkit("2.13.0", "13.0") == ("13.1", str(home))


def test_the_toolkit_is_where_nvcc_says_it_is(
    setup_py: ModuleType, nvcc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nvcc on the PATH is often a script, with no headers and libraries beside it."""
    home = nvcc("13.0")
    wrapper = tmp_path / "somewhere/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    assert setup_py.find_toolkit() == ("13.0", str(home))


def test_a_torch_without_cuda_gets_no_cuda_kernels(setup_py: ModuleType, nvcc: Callable[..., Path]) -> None:
    nvcc("13.0")
    with pytest.raises(setup_py.NotBuiltError, match=r"^torch 2\.13\.0\+cpu is a build without CUDA; install one with"):
        setup_py.require_toolkit("2.13.0+cpu", None)


def test_another_major_version_of_cuda_is_refused(setup_py: ModuleType, nvcc: Callable[..., Path]) -> None:
    nvcc("12.9")
    with pytest.raises(
        setup_py.NotBuiltError, match=r"nvcc is of CUDA 12\.9, but torch 2\.13\.0 was built with CUDA 13"
    ):
        setup_py.require_toolkit("2.13.0", "13.0")


@pytest.mark.parametrize("script", [None, "exit 1", "echo 'a compiler of another kind'"])
def test_without_an_nvcc_that_runs_there_are_no_cuda_kernels(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if script is not None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/nvcc").chmod(0o755)
    with pytest.raises(setup_py.NotBuiltError, match=r"no nvcc was found that runs; install the CUDA toolkit 13\.0"):
        setup_py.require_toolkit("2.13.0", "13.0")


@pytest.mark.parametrize(("cores", "gigabytes", "expected"), [(2, 24, 2), (64, 16, 5), (8, 1, 1), (1, 512, 1)])
def test_jobs_fit_the_cores_and_the_memory(setup_py: ModuleType, cores: int, gigabytes: int, expected: int) -> None:
    assert setup_py.jobs(cores, gigabytes << 30) == expected


@pytest.mark.parametrize("wanted", [None, "9.0a"])
def test_what_is_compiled_with_cuda(
    setup_py: ModuleType, nvcc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    """Without a GPU, torch's own default for the architectures is an IndexError."""
    home = nvcc("13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    compiled: list[Extension] = []
    monkeypatch.setattr(setup_py.BuildNative, "compile", lambda self, extension: compiled.append(extension))
    built = setup_py.BuildNative(Distribution()).compile_cuda()
    assert built == f"13.0 for {wanted or '8.0;9.0+PTX'}"
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == (wanted or "8.0;9.0+PTX")
    (extension,) = compiled
    assert extension.name == "chargpt._native_cuda"
    assert {"csrc/bindings/cuda.cpp", "csrc/cuda/cross_entropy.cu"} <= set(extension.sources)
    assert str(home / "include") in extension.include_dirs
    assert not any("fast" in flag for flag in extension.extra_compile_args["nvcc"])  # −∞ and NaN have meanings here


@pytest.mark.parametrize("cpp", [None, "compiling failed"])
@pytest.mark.parametrize("cuda", [None, "no nvcc"])
def test_what_was_not_built_is_recorded_and_what_was_stays(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpp: str | None, cuda: str | None
) -> None:
    """Neither module needs the other."""
    monkeypatch.setattr(setup_py.BuildNative, "compile_cpp", built(setup_py, None, cpp))
    monkeypatch.setattr(setup_py.BuildNative, "compile_cuda", built(setup_py, "13.0 for 8.0", cuda))
    record, modules = build_into(setup_py, tmp_path)
    assert (record["problem"], record["cuda_problem"]) == (cpp, cuda)
    assert record["cuda"] == (None if cuda else "13.0 for 8.0")
    assert record["torch"] == torch.__version__
    assert modules == [name for name, why in (("_native", cpp), ("_native_cuda", cuda)) if why is None]

    path = tmp_path / "chargpt" / "_native.json"
    assert native.check_record(path) == (f"the native module was not built: {cpp}" if cpp else None)
    assert native.check_cuda_record(path) == (f"the CUDA kernels were not built: {cuda}" if cuda else None)
    if cuda is None:
        assert native.cuda_build(path) == "CUDA 13.0 for 8.0"


@pytest.mark.parametrize("built_with", [{"torch": "2.0.0"}, {"python": "3.9.1"}], ids=str)
def test_the_cuda_kernels_of_another_torch_or_python_are_not_loaded(tmp_path: Path, built_with: dict[str, str]) -> None:
    """Also where the C++ module was not built, and says nothing of it."""
    made = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "problem": "no luck",
        "cuda": "13.0 for 8.0",
    }
    path = tmp_path / "_native.json"
    path.write_text(json.dumps(made))
    assert native.check_cuda_record(path) is None
    path.write_text(json.dumps(made | built_with))
    assert next(iter(built_with.values())) in str(native.check_cuda_record(path))


def test_without_torch_or_a_compiler_neither_is_tried(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "require_torch", built(setup_py, None, "no compiler"))
    record, modules = build_into(setup_py, tmp_path)
    assert (record["problem"], record["cuda_problem"], record["cuda"]) == ("no compiler", "no compiler", None)
    assert modules == []
    assert native.check_cuda_record(tmp_path / "chargpt/_native.json") == "the CUDA kernels were not built: no compiler"


def built(setup_py: ModuleType, result: str | None, problem: str | None) -> Callable[..., str | None]:
    """In place of a step of the build."""

    def compile_it(*_: object) -> str | None:
        if problem is not None:
            raise setup_py.NotBuiltError(problem)
        return result

    return compile_it


def build_into(setup_py: ModuleType, folder: Path) -> tuple[dict[str, str | None], list[str]]:
    """The record, and which of the modules of an earlier build are still there."""
    package = folder / "chargpt"
    package.mkdir()
    for name in ("_native", "_native_cuda"):
        (package / f"{name}.cpython.so").touch()
    command = setup_py.BuildNative(Distribution())
    command.build_lib, command.inplace = str(folder), 0
    command.run()
    record = json.loads((package / "_native.json").read_text())
    return record, sorted(path.name.split(".")[0] for path in package.glob("*.so"))


def test_a_record_of_an_older_build_means_no_cuda_kernels(tmp_path: Path) -> None:
    (tmp_path / "_native.json").write_text(json.dumps({"python": "3.11", "torch": "2.13.0", "problem": None}))
    assert "the CUDA kernels were not built: build it again with" in str(
        native.check_cuda_record(tmp_path / "_native.json")
    )
