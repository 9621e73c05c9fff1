"""Experiment tracking: what a run is, its learning curve and its model go to MLflow, or nowhere.

The store never decides over the training: a tracker that `open_tracker` returns raises nothing. The first failure
prints one warning and tracking stays off for the rest of the run. `mlflow` is imported only when a run starts.
"""

import contextlib
import fcntl
import json
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from chargpt.config import TrackingConfig
from chargpt.errors import ConfigError

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# The files that decide what a run computes; `git.dirty` speaks of these.
RESULT_FILES = ("chargpt", "csrc", "pipelines", "params.yaml", "dvc.yaml", "pyproject.toml", "setup.py")


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
    tags: dict[str, str] = field(default_factory=dict)  # hashes of corpus and splits, kernels, torch, device …
    dataset: Dataset | None = None


@dataclass(frozen=True)
class Point:
    """One moment of the learning curve."""

    step: int
    time: float  # seconds since the epoch
    metrics: dict[str, float]  # "train/loss", "val/loss", "perf/tokens_per_second" …


class Tracker(Protocol):
    @property
    def run_id(self) -> str | None:
        """The id to keep in checkpoints and give back to `open_tracker`."""

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
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        """End the run with final numbers, files (folders keep their name) and the model's checkpoint folder."""


def open_tracker(config: TrackingConfig, run: RunDescription, run_id: str | None = None) -> Tracker:
    """Start a run, or go on with the run `run_id` of a checkpoint. Never raises for a store that fails.

    A run that the store no longer has starts anew, and its first `log` stores the whole history.
    """
    if not config.enabled:
        return NullTracker(run_id)
    try:
        with warnings.catch_warnings(action="ignore"):
            return _Forgiving(_MlflowTracker(config, run, run_id))
    except Exception as error:  # whatever a broken store, network or installation raises
        _warn_off("cannot start the run", config, error)
        return NullTracker(run_id)


class NullTracker:
    """Tracks nothing, but keeps the run id, so that a later resume with tracking on finds its run."""

    url: str | None = None

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, history: Sequence[Point]) -> None:
        pass

    def finish(
        self,
        status: RunStatus,
        summary: dict[str, float] | None = None,
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        pass


class _Forgiving:
    """A tracker that, at the first failure of the one inside, warns once and does nothing from then on."""

    def __init__(self, inner: "_MlflowTracker") -> None:
        self._inner: _MlflowTracker | None = inner
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

    def _attempt(self, failure: str, action: Callable[["_MlflowTracker"], None]) -> None:
        if self._inner is None:
            return
        try:
            with warnings.catch_warnings(action="ignore"):
                action(self._inner)
        except Exception as error:  # whatever a broken store or network raises
            self._inner = None
            _warn_off(failure, self._config, error)


class _MlflowTracker:
    """A run in an MLflow store. Raises whatever MLflow raises.

    Only the client is used, never MLflow's fluent functions: these keep a current run in global state and end it as
    FINISHED at exit, also when the process failed.
    """

    def __init__(self, config: TrackingConfig, run: RunDescription, run_id: str | None) -> None:
        self.config = config
        self._store = store_uri(config)
        _quiet_mlflow()
        with _initialisation_lock(self._store):
            from mlflow import MlflowClient

            self._client = MlflowClient(self._store)
            self._experiment_id = _experiment_id(self._client, config.experiment, self._store)
            self._client.set_experiment_tag(self._experiment_id, _VIEW_TAG, json.dumps(_view()))
        resumed = None if run_id is None else _resumable_run(self._client, run_id)
        tags = _all_tags(run)
        if resumed is None:
            created = self._client.create_run(self._experiment_id, run_name=_run_name(run, tags), tags=tags)
            self.run_id: str = created.info.run_id
            known_params: dict[str, str] = {}
            self._last_step: dict[str, int] = {}
        else:
            self.run_id = resumed.info.run_id
            self._experiment_id = resumed.info.experiment_id
            self._client.update_run(self.run_id, status="RUNNING")
            known_params = resumed.data.params
            changed = {key: value for key, value in tags.items() if resumed.data.tags.get(key) != value}
            self._log_tags({f"resumed.{key}": value for key, value in changed.items()})
            self._last_step = self._stored_steps(list(resumed.data.metrics))
        self._log_params({key: value for key, value in run.params.items() if key not in known_params})
        if run.dataset is not None:
            self._log_dataset(run.dataset)
        self.url = _page(self._store, f"experiments/{self._experiment_id}/runs/{self.run_id}")
        self._monitor = self._start_monitor(resumed is not None) if config.system_metrics else None

    def log(self, history: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        _check_sqlite(self._store)
        new = [
            Metric(key, float(value), int(point.time * 1000), point.step)
            for point in history
            for key, value in point.metrics.items()
            if point.step > self._last_step.get(key, -1)
        ]
        for batch in _batches(new, 1000):  # the most that the store takes in one call, which is one transaction
            self._client.log_batch(self.run_id, metrics=batch)
            self._last_step |= {metric.key: metric.step for metric in batch}

    def finish(
        self, status: RunStatus, summary: dict[str, float], artifacts: Sequence[Path], model: Path | None
    ) -> None:
        _check_sqlite(self._store)
        if self._monitor is not None:
            self._monitor.finish()
        last_step = max(self._last_step.values(), default=0)
        try:
            self.log([Point(last_step, time.time(), summary)])
            for path in artifacts:
                if path.is_dir():
                    self._client.log_artifacts(self.run_id, str(path), path.name)
                else:
                    self._client.log_artifact(self.run_id, str(path))
            if model is not None:
                self._log_model(model, last_step)
        finally:
            self._client.set_terminated(self.run_id, status)

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        # MLflow refuses or cuts values over 6000 characters, by its settings; cut here, it shows that there was more.
        texts = {key: text if len(text := str(value)) <= 6000 else text[:5999] + "…" for key, value in params.items()}
        for batch in _batches([Param(key, text) for key, text in texts.items()], 100):
            self._client.log_batch(self.run_id, params=batch)

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(key, value) for key, value in tags.items()], 100):
            self._client.log_batch(self.run_id, tags=batch)

    def _log_dataset(self, dataset: Dataset) -> None:
        from mlflow import entities

        entity = entities.Dataset(
            name=dataset.name,
            digest=dataset.digest[:36],
            source_type="local",
            source=json.dumps({"uri": dataset.name}),
            profile=json.dumps({"train_tokens": dataset.train_tokens, "val_tokens": dataset.val_tokens}),
        )
        context = entities.InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.run_id, [entities.DatasetInput(entity, [context])])

    def _stored_steps(self, keys: list[str]) -> dict[str, int]:
        """The last stored step of every metric that this class logs."""
        own = [key for key in keys if not key.startswith("system/")]
        return {key: max(metric.step for metric in self._client.get_metric_history(self.run_id, key)) for key in own}

    def _start_monitor(self, resumed: bool) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        new_monitor: Any = SystemMetricsMonitor  # untyped
        monitor = new_monitor(self.run_id, resume_logging=resumed, tracking_uri=self._store)
        monitor.start()
        return monitor

    def _log_model(self, folder: Path, step: int) -> None:
        """Log the checkpoint `folder` as the run's model: `mlflow.pyfunc.load_model(f"runs:/{run_id}/model")`.

        A model from code: MLflow stores the source of `logged_model.py` and a copy of the folder, no pickle. The
        signature and the requirements are given, because MLflow would infer them by loading the model.
        """
        from mlflow import pyfunc
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        signature = ModelSignature(
            inputs=Schema([ColSpec("string")]),
            outputs=Schema([ColSpec("string")]),
            params=ParamSchema([ParamSpec(key, kind, default) for key, kind, default in _SAMPLING_PARAMS]),
        )
        logged = self._client.create_logged_model(self._experiment_id, name="model", source_run_id=self.run_id)
        with tempfile.TemporaryDirectory() as scratch:
            path = str(Path(scratch) / "model")
            pyfunc.save_model(
                path,
                python_model=str(Path(__file__).with_name("logged_model.py")),
                artifacts={"checkpoint": str(folder.resolve())},
                signature=signature,
                pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", *_REQUIREMENTS)],
                mlflow_model=Model(
                    artifact_path=logged.artifact_location, run_id=self.run_id, model_id=logged.model_id
                ),
            )
            self._client.log_model_artifacts(logged.model_id, path)
        self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step)])
        self._client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


_REQUIREMENTS = ("torch", "numpy", "safetensors")

# Parameters of the logged model's `predict`: name, MLflow type, default. SampleConfig says what they mean; MLflow has
# no null, so top_k 0 and top_p 1 switch the cut off.
_SAMPLING_PARAMS = (
    ("max_new_tokens", "long", 500),
    ("temperature", "double", 0.8),
    ("top_k", "long", 0),
    ("top_p", "double", 1.0),
    ("seed", "long", 1337),
)


# -------------------------------------------------------------------------------------------------------- the champion

REGISTERED_MODEL, CHAMPION = "chargpt", "champion"  # mlflow.pyfunc.load_model("models:/chargpt@champion")


def register_champion(config: TrackingConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Register the model of the best of `rows` that the store has, unless the champion is as good; a line that says so.

    `rows`: the metrics of finished runs, as `training.train` returns them. A champion with a `val_full` at most as high
    on the same split stays, so that a comparison of worse experiments does not replace it. Never raises: a store that
    fails costs one warning. None where nothing changed, tracking is off, or there is no store yet.
    """
    store = store_uri(config)
    path = _sqlite_path(store)
    if not config.enabled or (path is not None and not path.exists()):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            _quiet_mlflow()
            return _register_champion(store, config.experiment, rows)
    except Exception as error:  # whatever a broken store, network or installation raises
        _warn_off("cannot register the champion", config, error, "the comparison is complete without it")
        return None


def _register_champion(store: str, experiment_name: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    with _initialisation_lock(store):
        from mlflow import MlflowClient

        client = MlflowClient(store)
        experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return None
    ranked = sorted(rows, key=lambda row: row["val_full"])
    best = next((run for row in ranked if (run := _run_behind(client, experiment.experiment_id, row))), None)
    if best is None:
        return None
    loss, split = best.data.metrics["val_full"], best.data.tags["splits_sha256"]
    registered = next(iter(client.search_registered_models(f"name = '{REGISTERED_MODEL}'")), None)
    if registered is None:
        registered = client.create_registered_model(REGISTERED_MODEL)
    elif CHAMPION in registered.aliases:
        champion = client.get_model_version(REGISTERED_MODEL, registered.aliases[CHAMPION]).tags
        if champion.get("splits_sha256") == split and float(champion.get("val_full", "inf")) <= loss:
            return None
    model = client.get_logged_model(best.outputs.model_outputs[-1].model_id)
    version = client.create_model_version(
        REGISTERED_MODEL,
        model.artifact_location,
        best.info.run_id,
        tags={key: best.data.tags[key] for key in ("variant", "seed", "splits_sha256")} | {"val_full": repr(loss)},
        description=f"{best.info.run_name}, validation loss {loss:.4f} nats per token (full)",
        model_id=model.model_id,
    )
    client.set_registered_model_alias(REGISTERED_MODEL, CHAMPION, version.version)
    return (
        f"{REGISTERED_MODEL}@{CHAMPION} is {best.info.run_name} (version {version.version}), validation loss {loss:.4f}"
    )


def _run_behind(client: Any, experiment_id: str, row: Mapping[str, Any]) -> Any:
    """The newest finished run with a model that ended with the numbers of `row`, or None.

    Loss and seconds identify it: no run id lies in DVC's outputs, where it would make equal results differ.
    """
    tags = f"tags.variant = '{row['variant']}' and tags.seed = '{row['seed']}'"
    runs = client.search_runs(
        [experiment_id], f"{tags} and attributes.status = 'FINISHED'", order_by=["attributes.start_time DESC"]
    )
    for run in runs:
        same = all(run.data.metrics.get(key) == row[key] for key in ("val_full", "seconds"))
        if same and run.outputs is not None and run.outputs.model_outputs:
            return run
    return None


# -------------------------------------------------------------------------------------------------- names, tags and git


@dataclass(frozen=True)
class GitState:
    commit: str  # 40 hexadecimal digits
    dirty: bool  # a file of RESULT_FILES differs from the commit


def git_state(folder: Path) -> GitState | None:
    """The commit checked out around `folder`, and whether the files that make results differ from it.

    None without git, outside a repository, and before its first commit.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if top is None or commit is None:
        return None
    return GitState(commit, dirty=bool(_git(Path(top), "status", "--porcelain", "--", *RESULT_FILES)))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it cannot. Takes no locks, so it disturbs no git that runs at the same time."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _all_tags(run: RunDescription) -> dict[str, str]:
    tags = run.tags | {"variant": run.variant, "seed": str(run.seed)}
    # The code that runs is around the current folder; under `dvc exp run --temp` DVC_ROOT is elsewhere.
    git = git_state(Path.cwd())
    if git is not None:
        tags |= {"mlflow.source.git.commit": git.commit, "git.dirty": str(git.dirty).lower()}
    for tag, variable in (("dvc.experiment", "DVC_EXP_NAME"), ("dvc.stage", "DVC_STAGE")):
        if os.environ.get(variable):
            tags[tag] = os.environ[variable]
    return tags


def _run_name(run: RunDescription, tags: dict[str, str]) -> str:
    """Variant, seed, commit and DVC experiment: without the last two, a chart's legend repeats one name."""
    parts = [f"{run.variant}-s{run.seed}", tags.get("mlflow.source.git.commit", "")[:7], tags.get("dvc.experiment", "")]
    return "-".join(filter(None, parts))


# ----------------------------------------------------------------------------------------------------------- the store


def project_root() -> Path:
    """Where the store lies: DVC's root, else the top of the git repository around the current folder, else that folder.

    DVC runs queued experiments in a temporary copy that it deletes; DVC_ROOT names the real root there too.
    """
    root = os.environ.get("DVC_ROOT") or _git(Path.cwd(), "rev-parse", "--show-toplevel")
    return Path(root).resolve() if root else Path.cwd()


def store_uri(config: TrackingConfig) -> str:
    """The address of the store. A relative SQLite path counts from the project's root."""
    uri = config.uri or "sqlite:///mlflow.db"
    path = _sqlite_path(uri)
    return uri if path is None else f"sqlite:///{project_root() / path}"


def _sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite address; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


@contextlib.contextmanager
def _initialisation_lock(uri: str) -> Iterator[None]:
    """One process at a time: several that create the tables of one SQLite file at once leave it broken.

    Raises TimeoutError after a minute, sqlite3.Error when the database cannot be used.
    """
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{lock.name} stays locked by another process") from None
                time.sleep(0.1)
        _check_sqlite(uri)
        yield


def _check_sqlite(uri: str) -> None:
    """Raise sqlite3.Error within seconds if the database is damaged, locked or not writable.

    MLflow would retry such a file for a minute and a half, or wait 20 s for its lock.
    """
    path = _sqlite_path(uri)
    if path is not None:
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")  # takes the lock of a writer
            database.rollback()


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, created if new."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # MLflow's default location is relative to whatever folder creates the experiment; a server has its own.
        location = None if _is_server(uri) else (project_root() / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, location))
        except Exception:  # another client of the same server was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _resumable_run(client: Any, run_id: str) -> Any:
    """The run to go on with; None, with a warning, if the store does not have it any more."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        _warn(f"MLflow run {run_id} is not in the store any more; its curve goes on in a new run")
        return None
    return run


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# -------------------------------------------------------------------------------------------------------- quiet failing

# Set unless the user has set them: no telemetry, no chatter, and a server that is away costs seconds, not minutes.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what fails is raised as well, and reported by _warn_off
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def _quiet_mlflow() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for every retry


def _warn_off(
    failure: str,
    config: TrackingConfig,
    error: Exception,
    consequence: str = "tracking is off for the rest of this run, the local curve goes on",
) -> None:
    """One line: what failed, where, why, and what happens now."""
    uri = store_uri(config)
    if isinstance(error, ModuleNotFoundError) and error.name == "mlflow":
        reason = "mlflow is not installed (pip install 'chargpt[pipeline]', or set tracking.enabled to false)"
    else:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    _warn(_without_login(f"MLflow at {uri} {failure}: {reason}; {consequence}", uri))


def _warn(message: str) -> None:
    print(f"chargpt: warning: {message}", file=sys.stderr, flush=True)


def _without_login(text: str, uri: str) -> str:
    """`text` without the `user:password@` of the address `uri`."""
    login, at, _ = urlsplit(uri).netloc.rpartition("@")
    return text.replace(login + at, "") if at else text


# -------------------------------------------------------------------------------------------------------------- the UI

UI_ENVIRONMENT = _ENVIRONMENT | {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes, 1.1 GB and half of the start
    "PYTHONWARNINGS": "ignore",
}


def ui_command(config: TrackingConfig, port: int = 5000) -> list[str]:
    """The command that serves MLflow's pages for the store on this machine only; run it under UI_ENVIRONMENT.

    Raises ConfigError if the store is a server, which has its pages already.
    """
    uri = store_uri(config)
    if _is_server(uri):
        raise ConfigError(f"tracking.uri is a server; its pages are at {_without_login(uri, uri)}")
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
    base = _without_login(uri, uri).rstrip("/") if _is_server(uri) else f"http://127.0.0.1:{port}"
    found = _sqlite_query(uri, "SELECT experiment_id FROM experiments WHERE name = ?", config.experiment)
    if found is None:
        return f"{base}/#/experiments"
    if view == "runs":
        return f"{base}/#/experiments/{found}?workflowType=machine_learning"
    # A store of an earlier version lacks the prepared view until its next run; MLflow refuses a key it does not know.
    query = "SELECT key FROM experiment_tags WHERE key = ? AND experiment_id = ?"
    prepared = f"&viewStateShareKey={_VIEW}" if _sqlite_query(uri, query, _VIEW_TAG, found) else ""
    return f"{base}/#/experiments/{found}/runs?compareRunsMode=CHART&workflowType=machine_learning{prepared}"


_VIEW = "chargpt"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"


def _view() -> dict[str, Any]:
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


def _sqlite_query(uri: str, query: str, *values: str) -> str | None:
    """The first value that the file answers with; asking MLflow instead would cost its import, seconds, for a link."""
    path = _sqlite_path(uri)
    if path is None or not path.exists():
        return None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1)) as database:
        row = database.execute(query, values).fetchone()
        return None if row is None else str(row[0])
    return None


def _page(uri: str, path: str) -> str | None:
    return f"{_without_login(uri, uri).rstrip('/')}/#/{path}" if _is_server(uri) else None
