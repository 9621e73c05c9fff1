"""What a training run shows on the terminal."""

import math
import sys
from typing import Any

from tqdm import tqdm

from chargpt.evaluation import bits_per_byte
from chargpt.tracking import Timing
from chargpt.training import Ended, Evaluated, Event, Started, Stepped

TOO_LONG = 1.5  # times the minutes that were asked for


class Console:
    """Listens to a trainer: a bar with loss, speed and time left on a terminal; a line for each evaluation anywhere."""

    def __init__(self, timing: Timing, bytes_per_token: float, patience: int | None, minutes: float | None) -> None:
        """timing: listens to the same trainer, before this does
        bytes_per_token: of the validation text, which turns nats per token into bits per byte
        minutes: of training that the user asked for; one line says when it will be far more
        """
        self.timing, self.bytes_per_token, self.patience, self.minutes = timing, bytes_per_token, patience, minutes
        self.loss = math.nan
        self.bar: Any = None  # tqdm's

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.max_steps = event.max_steps
                self.bar = tqdm(
                    total=event.max_steps,
                    initial=event.step,
                    unit="step",
                    disable=None,
                    dynamic_ncols=True,
                    leave=False,
                )
            case Stepped():
                self.loss = event.loss
                speed = f"{self.timing.tokens_per_second:,.0f} tokens/s"
                self.bar.set_postfix_str(f"loss {event.loss:.4f}, {speed}", refresh=False)
                self.bar.update(event.step - self.bar.n)
            case Evaluated():
                self._evaluated(event)
            case Ended(reason="patience"):
                say(
                    f"stopping at step {event.step}: no lower validation loss in {self.patience} evaluations; "
                    f"the model of step {event.best[0]} is the result"
                )

    def _evaluated(self, event: Evaluated) -> None:
        line = f"step {event.step:>6}  val {loss_text(event.loss, self.bytes_per_token)}"
        whole = self.timing.seconds / event.step * self.max_steps if event.step else 0.0  # seconds
        if math.isfinite(self.loss):
            left = duration(whole - self.timing.seconds)
            line += f"  train {self.loss:.4f}  {self.timing.tokens_per_second:,.0f} tokens/s  {left} left"
        say(line)
        warm = event.step >= self.max_steps / 20  # the first steps pay for memory and compiling
        if self.minutes is not None and warm and whole > TOO_LONG * 60 * self.minutes:
            say(
                f"the {self.max_steps:,} steps of this run will take about {duration(whole)} of training, not the "
                f"{self.minutes:g} min that were asked for: this machine is slower than when they were counted"
            )
            self.minutes = None  # once is enough
        if event.overfits:
            step, loss = event.best
            say(
                f"overfitting: since step {step} the validation loss rises from {loss:.4f} while the training loss "
                f"falls; what helps: more text, a higher model.dropout, a shorter run, or a smaller model"
            )


def loss_text(loss: float, bytes_per_token: float) -> str:
    """A loss in nats per token, with the bits per byte that it is for this text beside it."""
    return f"{loss:.4f} ({bits_per_byte(loss, bytes_per_token):.3f} bits/byte)"


def say(line: str) -> None:
    """Print a line on stderr without tearing a progress bar."""
    tqdm.write(line, file=sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
