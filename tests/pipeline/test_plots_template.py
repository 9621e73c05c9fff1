"""The page for `dvc plots show` with its scripts inside; npm is a small program of this test, DVC is the real one."""

import base64
import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from chargpt.errors import ChargptError
from pipelines.tools import plots_template

SCRIPT = "var vega = '{}'"


def archive_of(package: plots_template.Package) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        content = f"{SCRIPT} // {package.name}".encode()
        member = tarfile.TarInfo(package.script)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with DVC, and a npm that packs three small packages and counts how often it ran."""
    archives = tmp_path / "archives"
    archives.mkdir()
    packages = []
    for package in plots_template.PACKAGES:
        data = archive_of(package)
        (archives / package.archive).write_bytes(data)
        packages.append(dataclasses.replace(package, sha512=base64.b64encode(hashlib.sha512(data).digest()).decode()))
    monkeypatch.setattr(plots_template, "PACKAGES", tuple(packages))
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\necho run >>"{tmp_path}/npm.log"\n[ "$1" = pack ] && cp "{archives}"/* .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dvc_draws_with_the_scripts_in_its_page(project: Path) -> None:
    plots_template.main()
    plots_template.main()
    assert (project / "npm.log").read_text() == "run\n"  # once
    (project / "losses.csv").write_text("step,loss\n0,4.2\n1,2.5\n")
    command = [sys.executable, "-m", "dvc", "plots", "show", "losses.csv"]
    subprocess.run(command, check=True, capture_output=True)
    page = (project / "dvc_plots" / "index.html").read_text()
    assert [page.count(f"// {package.name}<") for package in plots_template.PACKAGES] == [1, 1, 1]
    assert "<script src" not in page
    assert "4.2" in page


def test_another_version_is_fetched_anew(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots_template.main()
    former = plots_template.TEMPLATE.read_text()
    plots_template.TEMPLATE.write_text(former.replace(f"vega@{plots_template.PACKAGES[0].version}", "vega@5.0.0"))
    plots_template.main()
    assert plots_template.TEMPLATE.read_text() == former


def test_an_altered_archive_is_refused(project: Path) -> None:
    with (project / "archives" / plots_template.PACKAGES[1].archive).open("ab") as file:
        file.write(b"!")
    with pytest.raises(ChargptError, match=r"vega-lite-.*SHA-512"):
        plots_template.main()
    assert not plots_template.TEMPLATE.exists()


@pytest.mark.parametrize(
    ("npm", "says"),
    [
        (None, "is not installed"),
        ("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n", "npm error code ENOTFOUND"),
        ("#!/bin/sh\nexit 1\n", "npm failed"),
    ],
)
def test_without_npm_or_network_dvc_keeps_its_own_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, npm: str | None, says: str
) -> None:
    if npm is None:
        monkeypatch.setenv("PATH", "")
    else:
        (project / "bin" / "npm").write_text(npm)
    with pytest.raises(ChargptError, match=says) as caught:
        plots_template.main()
    assert "`make plots`" in str(caught.value)
    assert not (project / ".dvc" / "config.local").exists()
