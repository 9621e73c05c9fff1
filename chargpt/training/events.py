"""What a trainer tells about itself, for whoever listens: a terminal, files, an experiment tracker.

The one idea to know: training knows no clock and no listener. Who wants the time of an event looks at a clock when it
comes, and nothing that a listener does reaches the state of the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Point:
    """One moment of the learning curve."""

    step: int
    metrics: dict[str, float]  # "train/loss", "val/loss" …


@dataclass(frozen=True)
class Started:
    """The first step, or the next one after a resume, comes now."""

    step: int  # steps done
    max_steps: int


@dataclass(frozen=True)
class Stepped:
    """A point of the training curve, every `log_interval` steps. The device has finished all steps up to it."""

    step: int
    tokens: int  # since the last of these events
    loss: float  # mean over these steps, in nats per token


@dataclass(frozen=True)
class Evaluated:
    step: int
    loss: float  # on the validation part, in nats per token
    best: tuple[int, float]  # step and loss of the lowest one so far
    overfits: bool  # noticed now, for the first time in the run


@dataclass(frozen=True)
class Saving:
    """A checkpoint is about to be written. What a listener writes now is on the disk before it."""

    step: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk, with this curve in it. What a listener writes now never runs ahead of it."""

    step: int
    history: Sequence[Point]  # all of it, by ascending step


@dataclass(frozen=True)
class Ended:
    step: int
    reason: Literal["steps", "patience", "interrupted"]
    best: tuple[int, float]


Event: TypeAlias = Started | Stepped | Evaluated | Saving | Saved | Ended
Subscriber: TypeAlias = Callable[[Event], None]
