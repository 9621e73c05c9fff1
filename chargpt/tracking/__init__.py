"""Experiment tracking: what a run is, its learning curve and its model go to MLflow, or nowhere.

base.py           what a tracker is, and one that tracks nothing
guarded.py        a tracker that raises nothing: what a run gets
mlflow.py         a run in an MLflow store
champion.py       the best run, as a registered model
provenance.py     git and DVC
store.py          the store's address, file and failures
ui.py             MLflow's pages
logged_model.py   the code that MLflow keeps beside a model
"""

from chargpt.tracking.base import Dataset, NullTracker, Point, RunDescription, RunStatus, Tracker
from chargpt.tracking.champion import register_champion
from chargpt.tracking.guarded import open_tracker
from chargpt.tracking.provenance import GitState, git_state
from chargpt.tracking.store import store_uri
from chargpt.tracking.ui import UI_ENVIRONMENT, ui_command, ui_url

__all__ = [
    "UI_ENVIRONMENT",
    "Dataset",
    "GitState",
    "NullTracker",
    "Point",
    "RunDescription",
    "RunStatus",
    "Tracker",
    "git_state",
    "open_tracker",
    "register_champion",
    "store_uri",
    "ui_command",
    "ui_url",
]
