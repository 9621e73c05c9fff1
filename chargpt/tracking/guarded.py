"""The tracker that a run gets: one that raises nothing.

The store never decides over the training: the first failure prints one warning, and tracking stays off for the rest of
the run.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from chargpt.config import TrackingConfig
from chargpt.tracking.base import NullTracker, Point, RunDescription, RunStatus, Tracker
from chargpt.tracking.mlflow import MlflowTracker
from chargpt.tracking.store import warn_off


def open_tracker(config: TrackingConfig, run: RunDescription, run_id: str | None = None) -> Tracker:
    """Start a run, or go on with the run `run_id` of a checkpoint. Never raises for a store that fails.

    A run that the store no longer has starts anew, and its first `log` stores the whole history.
    """
    if not config.enabled:
        return NullTracker(run_id)
    try:
        with warnings.catch_warnings(action="ignore"):
            return Guarded(MlflowTracker(config, run, run_id))
    except Exception as error:  # whatever a broken store, network or installation raises
        warn_off("cannot start the run", config, error)
        return NullTracker(run_id)


class Guarded:
    """A tracker that, at the first failure of the one inside, warns once and does nothing from then on."""

    def __init__(self, inner: "MlflowTracker") -> None:
        self._inner: MlflowTracker | None = inner
        self._config = inner.config
        self.run_id: str | None = inner.run_id
        self.url = inner.url

    def log(self, history: Sequence[Point]) -> None:
        self._attempt("cannot log metrics", lambda inner: inner.log(history))

    def finish(
        self,
        status: RunStatus,
        summary: dict[str, float] | None = None,
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        self._attempt("cannot finish the run", lambda inner: inner.finish(status, summary or {}, artifacts, model))

    def _attempt(self, failure: str, action: Callable[["MlflowTracker"], None]) -> None:
        if self._inner is None:
            return
        try:
            with warnings.catch_warnings(action="ignore"):
                action(self._inner)
        except Exception as error:  # whatever a broken store or network raises
            self._inner = None
            warn_off(failure, self._config, error)
