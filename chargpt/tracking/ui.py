"""MLflow's pages for the store: the command that serves them, links, and the view they open with."""

import sys
from typing import Any, Literal

from chargpt.config import TrackingConfig
from chargpt.errors import ConfigError
from chargpt.tracking.store import ENVIRONMENT, is_server, sqlite_query, store_uri, without_login

# -------------------------------------------------------------------------------------------------------------- the UI

UI_ENVIRONMENT = ENVIRONMENT | {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes, 1.1 GB and half of the start
    "PYTHONWARNINGS": "ignore",
}


def ui_command(config: TrackingConfig, port: int = 5000) -> list[str]:
    """The command that serves MLflow's pages for the store on this machine only; run it under UI_ENVIRONMENT.

    Raises ConfigError if the store is a server, which has its pages already.
    """
    uri = store_uri(config)
    if is_server(uri):
        raise ConfigError(f"tracking.uri is a server; its pages are at {without_login(uri, uri)}")
    options = {
        "--backend-store-uri": uri,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    return [sys.executable, "-m", "mlflow", "ui", *(word for option in options.items() for word in option)]


def ui_url(config: TrackingConfig, view: Literal["runs", "charts"] = "runs", port: int = 5000) -> str:
    """The link to the table of runs or to their overlaid curves; MLflow's front page opens another view.

    For a SQLite store, where `ui_command` serves it. The front page if the experiment is not known yet.
    """
    uri = store_uri(config)
    base = without_login(uri, uri).rstrip("/") if is_server(uri) else f"http://127.0.0.1:{port}"
    found = sqlite_query(uri, "SELECT experiment_id FROM experiments WHERE name = ?", config.experiment)
    if found is None:
        return f"{base}/#/experiments"
    if view == "runs":
        return f"{base}/#/experiments/{found}?workflowType=machine_learning"
    # A store of an earlier version lacks the prepared view until its next run; MLflow refuses a key it does not know.
    query = "SELECT key FROM experiment_tags WHERE key = ? AND experiment_id = ?"
    prepared = f"&viewStateShareKey={_VIEW}" if sqlite_query(uri, query, VIEW_TAG, found) else ""
    return f"{base}/#/experiments/{found}/runs?compareRunsMode=CHART&workflowType=machine_learning{prepared}"


_VIEW = "chargpt"
VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"


def view() -> dict[str, Any]:
    """What MLflow's pages show under `viewStateShareKey`: runs grouped by variant, `val/loss` over seconds and tokens.

    The form is that of the button "Share view" in MLflow 3; another version at worst says that it cannot read it.
    """
    chart = {
        "type": "LINE",
        "runsCountToCompare": 100,
        "metricSectionId": _VIEW,
        "deleted": False,
        "isGenerated": False,
        "metricKey": "val/loss",
        "selectedMetricKeys": ["val/loss"],
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "metric",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
        "ignoreOutliers": False,
    }
    return {
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "variant"}]},
        "useGroupedValuesInCharts": True,
        "compareRunSections": [{"uuid": _VIEW, "name": "Validation loss", "display": True, "isReordered": False}],
        "compareRunCharts": [
            chart | {"uuid": f"{_VIEW}-{key}", "displayName": f"val/loss over {key}", "selectedXAxisMetricKey": key}
            for key in ("val/seconds", "val/tokens")
        ],
        "isAccordionReordered": True,  # ours first, not in the order of the alphabet
    }
