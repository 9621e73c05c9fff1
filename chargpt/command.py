"""What every command does around its work: streams that hold, signals, and errors as a sentence and an exit code.

The one idea to know: what a command prints never decides whether its work is done. A terminal that closed, a reader
that went away and a disk that is full take the messages, not the run.
"""

import contextlib
import errno
import os
import sys
import typing
from collections.abc import Iterator
from typing import Any, TextIO

from chargpt.errors import ChargptError
from chargpt.interrupts import Interrupts

EXIT_CODE = 2

# What a disk, or a path that the user chose, refuses, and what to do. Any other OSError is a bug of ours.
REFUSALS = (
    dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or choose another place")
    | dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions or choose another place")
    | dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "move what lies there or choose another place")
    | dict.fromkeys((errno.EIO, errno.EROFS, errno.ELOOP), "choose another place")
    | {errno.ENAMETOOLONG: "choose a shorter name"}
)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Run a command: an error for the user becomes one line on stderr and exit code 2, without a traceback.

    Wrap imports of heavy libraries too, so that Ctrl-C while they load ends as quietly as anywhere else.
    """
    _open_standard_streams()
    with contextlib.redirect_stderr(typing.cast(TextIO, Unbreakable(sys.stderr))), _lossless(sys.stdout):
        try:
            with Interrupts() as interrupts:
                try:
                    yield
                except ChargptError:
                    raise
                except Exception as error:
                    if interrupts.requested:  # and swallowed, by a library that is now half loaded
                        raise KeyboardInterrupt(interrupts.requested) from error
                    raise
            print(end="", flush=True)  # a closed pipe must show here, not while the interpreter shuts down
            return
        except ChargptError as error:
            message = str(error)
        except KeyboardInterrupt as interrupt:
            message = f"stopped by {str(interrupt) or 'Ctrl-C'}; nothing half-written was left behind"
        except MemoryError:
            message = "the memory ran out; close other programs, or ask for less"
        except BrokenPipeError:
            _point_away(sys.stdout)  # the reader (`head`, say) has gone: not an error
            return
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            if error.filename is None:
                _point_away(sys.stdout)
            place = error.filename or "the output"
            message = f"cannot use {place}: {error.strerror}; {REFUSALS[error.errno]}"
        print(f"chargpt: error: {message}", file=sys.stderr)
        sys.exit(EXIT_CODE)


class Unbreakable:
    """A text stream that loses what can no longer be written, and raises nothing for it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            _point_away(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _point_away(self._stream)


def _open_standard_streams() -> None:
    """Put the null device where a standard stream is closed: else the next file that is opened would be it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:  # `print` takes None for stdout
        sys.stderr = os.fdopen(2, "w", closefd=False)


@contextlib.contextmanager
def _lossless(stream: TextIO | None) -> Iterator[None]:
    """What the stream's encoding lacks, as a name that is not UTF-8 has it, is written with backslashes."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None or stream is None:
        yield
        return
    former = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        reconfigure(errors=former)


def _point_away(stream: TextIO) -> None:
    """What a stream would not take is not tried again while the interpreter shuts down."""
    with contextlib.suppress(OSError, AttributeError, ValueError):  # no file behind it
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
