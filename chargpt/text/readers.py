"""The user's own text: a file, or a folder of files."""

import contextlib
import os
import sys
from pathlib import Path

from chargpt.errors import CorpusError


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """A text of the user's: a file, or a folder whose files, sorted by path, are joined by newlines.

    Of a folder, hidden, empty and binary (NUL bytes) files are left out. A byte order mark is removed, and CRLF and CR
    become LF; each of these is noted on stderr. Raises CorpusError for what is missing, empty, binary, unreadable or
    not in `encoding`.
    """
    _require_encoding(encoding)
    if not str(path):
        raise CorpusError("the path of the text is empty; name a text file or a folder")
    root = _expanded(Path(path))
    notices: dict[str, list[Path]] = {}
    if root.is_dir():
        parts = []
        for file in _files_below(root, notices):
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
        note(f"{notice}: {', '.join(map(str, files[:3]))}{more}")
    return text


def note(message: str, wanted: bool = True) -> None:
    if wanted:
        print(f"chargpt: note: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------- the user's own text


ENCODING_KNOB = "the encoding (corpus.encoding in params.yaml, --encoding on the command line)"


def _require_encoding(encoding: str) -> None:
    try:
        "A".encode(encoding)
    except (LookupError, ValueError):  # LookupError: also for codecs between bytes and bytes, such as hex
        raise CorpusError(
            f"no text encoding is called {encoding!r}; utf-8 is the usual one; set {ENCODING_KNOB}"
        ) from None


def _expanded(path: Path) -> Path:
    """~ and ~user as home folders, unless that is a file's name: ~draft.txt may be one."""
    if os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def _files_below(folder: Path, notices: dict[str, list[Path]]) -> list[Path]:
    """All files below a folder that are not hidden, sorted by path; through links too, each folder once."""
    files: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        where = Path(parent)
        if (real := os.path.realpath(parent)) in seen or _is_ours(where):
            if real not in seen:
                notices.setdefault("made by chargpt, left out", []).append(where)
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [where / name for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _is_ours(folder: Path) -> bool:
    """Whether chargpt made this folder: a run, a checkpoint or data, which name their format at the beginning."""
    for name in ("run.json", "checkpoint.json", "manifest.json"):
        with contextlib.suppress(OSError), (folder / name).open("rb") as file:
            if b'"chargpt-' in file.read(512):
                return True
    return False


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
