"""The errors that users see, and the one place that turns them into an exit code.

A `ChargptError` is a sentence for the user: what was wrong, where, what to do. Everything else that escapes is a
bug of ours and keeps its traceback.
"""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator

EXIT_CODE = 2


# What a disk, or a path that the user chose, refuses. Any other OSError is a bug of ours.
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


class ChargptError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do."""


class ConfigError(ChargptError, ValueError):
    """A knob with an unknown name, a wrong type, or a value out of range."""


class CorpusError(ChargptError):
    """A text that is missing, unreadable, too small, or not what its checksum says."""


class TokenizerError(ChargptError, ValueError):
    """Text that the vocabulary does not cover, or ids and tokenizers that do not belong together."""


class CheckpointError(ChargptError):
    """A checkpoint that is missing, damaged, of another format, or of another run."""


class TrainingError(ChargptError):
    """A run that cannot start or go on: a folder in use, a loss that is not finite, a machine without the device."""


class RunInterruptedError(ChargptError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error: the nearest known name, or all of them."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Run a command: an error for the user becomes one line on stderr and exit code 2, without a traceback.

    Wrap imports of heavy libraries too, so that Ctrl-C while they load ends as quietly as anywhere else.
    """
    try:
        yield
        print(end="", flush=True)  # a closed pipe must show here, not while the interpreter shuts down
    except ChargptError as error:
        message = str(error)
    except KeyboardInterrupt as interrupt:
        message = f"stopped by {str(interrupt) or 'Ctrl-C'}; nothing half-written was left behind"
    except BrokenPipeError:
        _point_stdout_away()  # the reader (`head`, say) has gone: not an error
        return
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        if error.filename is None:
            _point_stdout_away()
        place = error.filename or "the output"
        message = f"cannot use {place}: {error.strerror}; free space or choose another place"
    else:
        return
    print(f"chargpt: error: {message}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def _point_stdout_away() -> None:
    """What stdout would not take is not tried again while the interpreter shuts down."""
    with contextlib.suppress(OSError, AttributeError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
