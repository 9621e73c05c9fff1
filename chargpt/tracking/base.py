"""What a run is to a tracker, and what a tracker does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Dataset:
    """The data of a run."""

    name: str
    digest: str  # MLflow shows the first 36 characters
    train_tokens: int
    val_tokens: int


@dataclass(frozen=True)
class RunDescription:
    """What a run is. Variant, seed, git and DVC state are tagged by the tracker and need not be in `tags`."""

    variant: str
    seed: int
    params: dict[str, Any] = field(default_factory=dict)  # flat, dotted keys
    tags: dict[str, str] = field(default_factory=dict)  # hashes of corpus and splits, backend, torch, device …
    dataset: Dataset | None = None
    note: str = ""  # Markdown, which the run's page shows first


@dataclass(frozen=True)
class Point:
    """One moment of the learning curve."""

    step: int
    time: float  # seconds since the epoch
    metrics: dict[str, float]  # "train/loss", "val/loss", "perf/tokens_per_second" …


class Tracker(Protocol):
    @property
    def url(self) -> str | None:
        """Where to look at the run, if a server shows it."""

    def log(self, history: Sequence[Point]) -> None:
        """Store the points of `history`, the whole curve by ascending step, that the store does not have yet.

        Call it after a checkpoint is saved, with the history in that checkpoint: then a resumed run stores each step
        exactly once, wherever the process before it died.
        """

    def finish(
        self,
        status: RunStatus,
        summary: dict[str, float] | None = None,
        tags: dict[str, str] | None = None,
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        """End the run with final numbers and tags, files (folders keep their name) and the model's checkpoint."""


class NullTracker:
    """Tracks nothing."""

    url: str | None = None

    def log(self, history: Sequence[Point]) -> None:
        pass

    def finish(
        self,
        status: RunStatus,
        summary: dict[str, float] | None = None,
        tags: dict[str, str] | None = None,
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        pass
