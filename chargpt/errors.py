"""The errors that users see.

A `ChargptError` is a sentence for the user: what was wrong, where, what to do. Everything else that escapes is a
bug of ours and keeps its traceback. chargpt/command.py turns them into a line and an exit code.
"""

import difflib
import reprlib
from collections.abc import Iterable


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


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint for an error: the nearest known name, or all of them, each behind `prefix`."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{match[0]}?" if match else f"; known: {', '.join(prefix + one for one in known)}"


class _Bounded(reprlib.Repr):
    """`repr` that stays short, whatever somebody wrote into a file: lists of lists of lists, numbers of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple, self.maxset = 3, 4, 4, 4, 4
        self.maxstring, self.maxother = 80, 80

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # and Python refuses to write more than some thousand digits
            return f"a number of {round(x.bit_length() * 0.30103):,} digits"
        return repr(x)


def shown(value: object) -> str:
    """A value as Python writes it, for an error, in bounded time and length."""
    return _Bounded().repr(value)
