"""Writing a file or a folder so that a reader never sees half of it, and reading one that may be anything.

The one idea to know: the bytes go to a hidden neighbour, which takes the name only when all of them are written.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TOKEN_BYTES = 4  # of the random end of a hidden name


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file, open to write and read, that takes the place of `path` when the block ends.

    When the block fails in any way, Ctrl-C included, the file vanishes and `path` stays as it was. Makes the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path)
    file = temporary.open("x+b")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # so that a full disk is not blamed on the output
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends, and vanishes when it fails.

    The former folder moves aside first and is deleted last, so that an interruption loses one of the two at most.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = _neighbour(folder), _neighbour(folder)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(former)
        temporary.rename(folder)
    except BaseException:
        if former.exists() and not folder.exists():
            former.rename(folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file that should be there and have at most so many of them.

    Raises ValueError when it is no regular file, as a FIFO or an endless device, or is longer, without reading it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # O_NONBLOCK: a FIFO has no writer
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is no regular file")
        if status.st_size > most:
            raise ValueError(f"{path.name} has {status.st_size:,} bytes, where at most {most:,} can be")
        return file.read(most)


def sweep(path: Path) -> None:
    """Delete what killed processes left half-written on the way to `path`, in a folder that no other process uses."""
    if path.parent.is_dir():
        for leftover in path.parent.iterdir():
            name, _, token = leftover.name.rpartition(".")
            if name == f".{path.name}" and re.fullmatch(f"[0-9a-f]{{{2 * TOKEN_BYTES}}}", token):
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def _neighbour(path: Path) -> Path:
    """A hidden name in the same folder, hence on the same disk, that nothing has yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(TOKEN_BYTES)}")
