"""What a queued experiment's workspace, a fresh checkout, borrows from the project."""

from pathlib import Path

import pytest

from pipelines.workspace import borrow_native_module

MODULE = "_native.cpython-311-x86_64-linux-gnu.so"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a native module, and this process in a checkout of it."""
    for root in (tmp_path, tmp_path / "workspace"):
        (root / "chargpt").mkdir(parents=True)
        (root / "csrc" / "cpu").mkdir(parents=True)
        (root / "csrc" / "cpu" / "attention.cpp").write_text("int main;")
    (tmp_path / "chargpt" / "_native.json").write_text("{}")
    (tmp_path / "chargpt" / MODULE).write_text("code")
    monkeypatch.chdir(tmp_path / "workspace")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_the_native_module_of_the_project_is_borrowed(project: Path) -> None:
    for _ in range(2):  # the second stage in the same workspace finds it there
        borrow_native_module()
        assert Path("chargpt", "_native.json").read_text() == "{}"
        assert Path("chargpt", MODULE).read_text() == "code"


@pytest.mark.parametrize("change", ["edited", "added", "gone"])
def test_other_kernel_sources_do_not_borrow_and_say_so(
    project: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    source = Path("csrc/cpu/attention.cpp")
    if change == "edited":
        source.write_text("int other;")
    elif change == "added":
        source.with_name("new.h").write_text("")
    else:
        source.unlink()
    borrow_native_module()
    assert not list(Path("chargpt").iterdir())
    [line] = capsys.readouterr().err.splitlines()
    assert "another csrc/" in line


def test_a_module_of_its_own_stays(project: Path) -> None:
    Path("chargpt/_native.json").write_text("own")
    borrow_native_module()
    assert Path("chargpt/_native.json").read_text() == "own"
    assert not Path("chargpt", MODULE).exists()


def test_without_dvc_or_without_a_module_nothing_happens(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "chargpt" / "_native.json").unlink()
    borrow_native_module()
    monkeypatch.delenv("DVC_ROOT")
    borrow_native_module()
    assert not list(Path("chargpt").iterdir())
    assert capsys.readouterr().err == ""
