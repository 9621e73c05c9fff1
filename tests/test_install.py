"""Installing: the native module is built or the reason is recorded, and a module that does not fit is never loaded."""

import json
import os
import platform
import subprocess
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from chargpt.kernels import native
from chargpt.kernels.sources import digest

ROOT = Path(__file__).parents[1]
GOOD = {"python": platform.python_version(), "torch": torch.__version__, "problem": None}


def record(folder: Path, **changes: object) -> Path:
    path = folder / "_native.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_a_fitting_record_is_accepted(tmp_path: Path) -> None:
    assert native.check_record(record(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"torch": "2.12.1+cpu"},
            f"was built against torch 2.12.1+cpu, this is {torch.__version__}; build it again with",
        ),
        ({"torch": torch.__version__ + "x"}, "was built against torch"),  # another build of the same version
        ({"python": "3.9.1"}, "was built for Python 3.9.1, this is"),
        ({"problem": "no compiler; install one"}, "was not built: no compiler; install one"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], sentence: str
) -> None:
    monkeypatch.setattr(native, "RECORD", record(tmp_path, **changes))
    loaded = native.load.__wrapped__()
    assert loaded.module is None
    assert loaded.problem is not None
    assert sentence in loaded.problem
    assert "\n" not in loaded.problem


def test_a_module_of_other_sources_is_refused(tmp_path: Path) -> None:
    """As after `git pull`: it may lack a function, or compute what the code of today does not expect."""
    csrc, package = tmp_path / "csrc", tmp_path / "chargpt"
    for folder in (csrc / "cpu", csrc / "tests", package):
        folder.mkdir(parents=True)
    (csrc / "cpu" / "kernel.cpp").write_text("int x;")
    path = record(package, sources=digest(csrc))
    assert native.check_record(path) is None
    for ignored in ("notes.md", "tests/kernel_test.cpp"):
        (csrc / ignored).write_text("…")
    assert native.check_record(path) is None
    for name, text in (("kernel.cpp", "int y;"), ("other.h", "int x;")):
        before = digest(csrc)
        (csrc / "cpu" / name).write_text(text)
        assert "was built from other sources than those in" in str(native.check_record(path))
        assert digest(csrc) != before
    assert "was built from other sources" in str(native.check_record(record(package)))  # which did not record them


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"python": 3}', "\udcff"])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "_native.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    problem = native.check_record(path)
    assert problem is not None
    assert "damaged" in problem
    assert str(path) in problem


def test_no_record_means_not_built(tmp_path: Path) -> None:
    assert "was not built; build it again" in str(native.check_record(tmp_path / "_native.json"))


def test_a_module_that_fails_to_load_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    """A package whose module is no shared library: what a half-copied file or a missing symbol looks like."""
    package = tmp_path / "chargpt"
    package.mkdir()
    for source in (ROOT / "chargpt").iterdir():
        if source.suffix == ".py" or source.name == "kernels":
            (package / source.name).symlink_to(source)
    (package / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    (package / "_native.json").write_text(json.dumps(GOOD))
    script = (
        "import pathlib; from chargpt.kernels import native, resolve; import torch;"
        f"native.RECORD = pathlib.Path({str(package / '_native.json')!r});"
        "print(native.load().problem); print(resolve('causal_attention', 'cpu', torch.float32).name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown[0].startswith("the native module failed to load (")
    assert shown[-1] in ("torch", "cpp")


def build(folder: Path, **environment: str) -> tuple[dict[str, object], str]:
    """Run setup.py's build into `folder`; its record, and what it printed."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "lib/chargpt/_native.json").read_text()), done.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CHARGPT_NO_NATIVE": "1"}, "CHARGPT_NO_NATIVE was set"),
        ({"CXX": "/bin/false", "CHARGPT_NO_NATIVE": ""}, "the C++ compiler '/bin/false' does not run"),
        ({"CXX": "no-such-compiler", "CHARGPT_NO_NATIVE": "0"}, "the C++ compiler 'no-such-compiler' does not run"),
    ],
)
def test_without_a_compiler_the_build_succeeds_and_says_why_there_is_no_module(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    stale = tmp_path / "lib/chargpt/_native.old.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    written, printed = build(tmp_path, **environment)
    assert reason in str(written["problem"])
    assert f"chargpt: the native modules were not built: {written['problem']}" in printed.splitlines()
    assert not stale.exists()


def test_a_failing_compiler_does_not_fail_the_build(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 1\n')
    compiler.chmod(0o755)
    written, _ = build(tmp_path, CXX=str(compiler), CC=str(compiler), CHARGPT_NO_NATIVE="")
    assert "compiling failed" in str(written["problem"])
    assert "pip install -v" in str(written["problem"])


def test_the_module_of_this_environment_was_built_here_or_says_why_not() -> None:
    loaded = native.load()
    assert (loaded.module is None) != (loaded.problem is None)
    if loaded.module is None:
        pytest.skip(str(loaded.problem))
    info = loaded.module.build_info()
    assert info["torch"] == torch.__version__
    assert info["cpp_standard"] >= 201703
    cpuinfo = Path("/proc/cpuinfo").read_text().split()
    for name, present in loaded.module.cpu_features().items():
        assert present == (name in cpuinfo), name


def test_the_build_takes_a_torch_that_the_package_allows() -> None:
    """Otherwise every isolated build would make a module that is refused at run time."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built_with = next(r for r in map(Requirement, project["build-system"]["requires"]) if r.name == "torch")
    runs_with = next(r for r in map(Requirement, project["project"]["dependencies"]) if r.name == "torch")
    (pin,) = built_with.specifier
    assert pin.operator == "=="
    assert Version(pin.version) in runs_with.specifier
    constraints = (ROOT / "constraints.txt").read_text().split()
    assert f"torch=={pin.version}" in constraints
