"""SIGINT and SIGTERM while something is at work that must not be torn."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Signals become KeyboardInterrupt, or are noted in `requested` inside `deferred`, where work can be finished.

    A second signal while the first one waits stops at once. Outside the main thread Python gives no signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, announce: Callable[[str], None]) -> None:
        """announce: called with the name of a signal that was noted"""
        self.requested: str | None = None
        self._announce = announce
        self._waiting = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self._waiting or self.requested:
            raise KeyboardInterrupt(name)
        self.requested = name
        self._announce(name)
