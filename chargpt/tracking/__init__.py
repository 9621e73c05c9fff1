"""Experiment tracking: what a run is, its learning curve and its model go to MLflow, or nowhere.

base.py           what a tracker is, and one that tracks nothing
guarded.py        a tracker that raises nothing: what a run gets
timing.py         when each step was done
curve.py          the learning curve as a file
mlflow.py         a run in an MLflow store
champion.py       the best run, as a registered model
provenance.py     git and DVC
store.py          the store's address, file and failures
ui.py             MLflow's pages
logged_model.py   the code that MLflow keeps beside a model
"""

from chargpt.tracking.base import Dataset, NullTracker, Point, RunDescription, RunStatus, Tracker
from chargpt.tracking.champion import register_champion
from chargpt.tracking.curve import CURVE, CurveFile
from chargpt.tracking.guarded import listening, open_tracker
from chargpt.tracking.provenance import GitState, code_state
from chargpt.tracking.store import store_uri
from chargpt.tracking.timing import TIMING, Moment, Timing, read_timing
from chargpt.tracking.ui import UI_ENVIRONMENT, ui_command, ui_url

__all__ = [
    "CURVE",
    "TIMING",
    "UI_ENVIRONMENT",
    "CurveFile",
    "Dataset",
    "GitState",
    "Moment",
    "NullTracker",
    "Point",
    "RunDescription",
    "RunStatus",
    "Timing",
    "Tracker",
    "code_state",
    "listening",
    "open_tracker",
    "read_timing",
    "register_champion",
    "store_uri",
    "ui_command",
    "ui_url",
]
