"""What a training run shows on the terminal, and the signals it takes from there."""

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tqdm import tqdm

from chargpt.config import TrainConfig


class Progress:
    """A bar with loss, speed and time left on a terminal; elsewhere one line for each evaluation."""

    def __init__(self, config: TrainConfig, step: int, seconds: float) -> None:
        self.config = config
        self.loss, self.speed = math.nan, math.nan
        total, unit = (config.max_steps, "step") if config.max_steps else (config.max_seconds, "s")
        self.bar = tqdm(
            total=total, initial=self._position(step, seconds), unit=unit, disable=None, dynamic_ncols=True, leave=False
        )
        if config.max_seconds:
            self.bar.bar_format = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, step: int, seconds: float, loss: float, speed: float) -> None:
        self.loss, self.speed = loss, speed
        self.bar.set_postfix_str(f"step {step}, loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(self._position(step, seconds) - self.bar.n)

    def report(self, step: int, seconds: float, val_loss: float) -> None:
        line = f"step {step:>6}  val {val_loss:.4f}"
        if math.isfinite(self.loss):
            total = self.config.max_steps or self.config.max_seconds or 1
            left = seconds * (total / self._position(step, seconds) - 1)
            line += f"  train {self.loss:.4f}  {self.speed:,.0f} tokens/s  {duration(left)} left"
        say(line)

    def _position(self, step: int, seconds: float) -> float:
        return step if self.config.max_steps else seconds


class Interrupts:
    """SIGINT and SIGTERM while a run is alive: noted between steps, so that they can be saved; else KeyboardInterrupt.

    A second signal while the first one waits stops at once. Outside the main thread Python gives no signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: str | None = None
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
        say(f"{self.requested}: finishing this step and saving (again to stop at once)")


def say(line: str) -> None:
    """Print a line on stderr without tearing a progress bar."""
    tqdm.write(line, file=sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 3 min 05 s, 2 h 10 min; a budget that is overdrawn has 0 s left."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
