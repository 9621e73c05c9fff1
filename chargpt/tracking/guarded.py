"""The tracker that a run gets: one that raises nothing.

The store never decides over the training: the first failure prints one warning, and tracking stays off for the rest of
the run.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from chargpt.config import TrackingConfig
from chargpt.files import replaced_file, sweep
from chargpt.tracking.base import NullTracker, Point, RunDescription, RunStatus, Tracker
from chargpt.tracking.mlflow import MlflowTracker
from chargpt.tracking.store import warn_off
from chargpt.tracking.timing import Timing
from chargpt.training import Event, Saved, Subscriber

RUN_ID = "mlflow.json"  # in a run's folder: the id of its run in the store


def open_tracker(config: TrackingConfig, run: RunDescription, folder: Path, resumed: bool) -> Tracker:
    """Start a run, or go on with the one that RUN_ID in the folder of a resumed run names.

    Never raises for a store that fails. A run that the store no longer has starts anew, and its first `log` stores the
    whole history.
    """
    if not config.enabled:
        return NullTracker()
    try:
        with warnings.catch_warnings(action="ignore"):
            sweep(folder / RUN_ID)
            tracker = MlflowTracker(config, run, _known_run_id(folder / RUN_ID) if resumed else None)
            with replaced_file(folder / RUN_ID) as file:
                file.write(json.dumps({"run_id": tracker.run_id}).encode() + b"\n")
            return Guarded(tracker)
    except Exception as error:  # whatever a broken store, network or installation raises
        warn_off("cannot start the run", config, error)
        return NullTracker()


def listening(tracker: Tracker, timing: Timing) -> Subscriber:
    """What gives `tracker` the curve after each checkpoint of a trainer, with the times that `timing` knows."""

    def listen(event: Event) -> None:
        if isinstance(event, Saved):
            tracker.log(timing.stamped(event.history))

    return listen


def _known_run_id(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_bytes())["run_id"])
    return None


class Guarded:
    """A tracker that, at the first failure of the one inside, warns once and does nothing from then on."""

    def __init__(self, inner: "MlflowTracker") -> None:
        self._inner: MlflowTracker | None = inner
        self._config = inner.config
        self.run_id, self.url = inner.run_id, inner.url

    def log(self, history: Sequence[Point]) -> None:
        self._attempt("cannot log metrics", lambda inner: inner.log(history))

    def finish(
        self,
        status: RunStatus,
        summary: dict[str, float] | None = None,
        tags: dict[str, str] | None = None,
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        self._attempt(
            "cannot finish the run", lambda inner: inner.finish(status, summary or {}, tags or {}, artifacts, model)
        )

    def _attempt(self, failure: str, action: Callable[["MlflowTracker"], None]) -> None:
        if self._inner is None:
            return
        try:
            with warnings.catch_warnings(action="ignore"):
                action(self._inner)
        except Exception as error:  # whatever a broken store or network raises
            self._inner = None
            warn_off(failure, self._config, error)
