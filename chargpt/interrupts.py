"""SIGINT, SIGTERM and SIGHUP while something is at work that must not be torn."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Signals become KeyboardInterrupt, or are noted in `requested` inside `deferred`, where work can be finished.

    A second signal while the first one waits stops at once. What the parent wants ignored (`nohup`, a job that a script
    runs in the background) stays ignored. Outside the main thread Python gives no signals.

    What catches everything, as some libraries do while they load, swallows a KeyboardInterrupt too, and so does Python
    where a signal meets a callback of its own. So `requested` has the name of a signal in any case, and whoever enters
    another Interrupts below is stopped there.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, announce: Callable[[str], None] = lambda name: None) -> None:
        """announce: called with the name of a signal that was noted"""
        self.requested: str | None = None
        self._announce = announce
        self._waiting = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in self.SIGNALS}
            for handler in handlers.values():
                outer = getattr(handler, "__self__", None)
                if isinstance(outer, Interrupts) and outer.requested:
                    raise KeyboardInterrupt(outer.requested)
            for number, handler in handlers.items():
                if handler not in (signal.SIG_IGN, None):  # None: C code handles it
                    self._former[number] = signal.signal(number, self._handle)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._ignored
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._unraisable
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _ignored(self, error: Any) -> None:
        """Python is about to print what it cannot raise: not a word about a signal that is noted."""
        if not (self.requested and isinstance(error.exc_value, KeyboardInterrupt)):
            self._unraisable(error)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        first, self.requested = self.requested is None, name
        if not (self._waiting and first):
            raise KeyboardInterrupt(name)
        self._announce(name)
