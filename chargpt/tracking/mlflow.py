"""A run in an MLflow store. `mlflow` is imported only when a run starts."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chargpt.checkpoint import export_checkpoint
from chargpt.config import TrackingConfig
from chargpt.tracking.base import Dataset, Point, RunDescription, RunStatus
from chargpt.tracking.provenance import all_tags, run_name
from chargpt.tracking.store import (
    check_sqlite,
    initialisation_lock,
    is_server,
    page,
    project_root,
    quiet_mlflow,
    store_uri,
    warn,
)
from chargpt.tracking.ui import VIEW_TAG, view


class MlflowTracker:
    """A run in an MLflow store. Raises whatever MLflow raises.

    Only the client is used, never MLflow's fluent functions: these keep a current run in global state and end it as
    FINISHED at exit, also when the process failed.
    """

    def __init__(self, config: TrackingConfig, run: RunDescription, run_id: str | None) -> None:
        self.config = config
        self._store = store_uri(config)
        quiet_mlflow()
        with initialisation_lock(self._store):
            from mlflow import MlflowClient

            self._client = MlflowClient(self._store)
            self._experiment_id = _experiment_id(self._client, config.experiment, self._store)
            self._client.set_experiment_tag(self._experiment_id, VIEW_TAG, json.dumps(view()))
        resumed = None if run_id is None else _resumable_run(self._client, run_id)
        tags = all_tags(run)
        if resumed is None:
            created = self._client.create_run(self._experiment_id, run_name=run_name(run, tags), tags=tags)
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
        self.url = page(self._store, f"experiments/{self._experiment_id}/runs/{self.run_id}")
        self._monitor = self._start_monitor(resumed is not None) if config.system_metrics else None

    def log(self, history: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        check_sqlite(self._store)
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
        self,
        status: RunStatus,
        summary: dict[str, float],
        tags: dict[str, str],
        artifacts: Sequence[Path],
        model: Path | None,
    ) -> None:
        check_sqlite(self._store)
        if self._monitor is not None:
            self._monitor.finish()
        last_step = max(self._last_step.values(), default=0)
        try:
            self.log([Point(last_step, time.time(), summary)])
            self._log_tags(tags)
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
            path, delivery = str(Path(scratch) / "model"), Path(scratch) / "checkpoint"
            export_checkpoint(folder, delivery)  # without what only training needs
            pyfunc.save_model(
                path,
                python_model=str(Path(__file__).with_name("logged_model.py")),
                artifacts={"checkpoint": str(delivery.resolve())},
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


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, created if new."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # MLflow's default location is relative to whatever folder creates the experiment; a server has its own.
        location = None if is_server(uri) else (project_root() / "mlartifacts").as_uri()
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
        warn(f"MLflow run {run_id} is not in the store any more; its curve goes on in a new run")
        return None
    return run


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
