"""The best run of the store, as MLflow's registered model."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from chargpt.config import TrackingConfig
from chargpt.tracking.store import initialisation_lock, quiet_mlflow, sqlite_path, store_uri, warn_off

# -------------------------------------------------------------------------------------------------------- the champion

REGISTERED_MODEL, CHAMPION = "chargpt", "champion"  # mlflow.pyfunc.load_model("models:/chargpt@champion")


def register_champion(config: TrackingConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Register the model of the best of `rows` that the store has, unless the champion is as good; a line that says so.

    `rows`: the metrics of finished runs, as `experiment.train` returns them. A champion with a `val_full` at most as
    high on the same split stays, so that a comparison of worse experiments does not replace it. Never raises: a store
    that fails costs one warning. None where nothing changed, tracking is off, or there is no store yet.
    """
    store = store_uri(config)
    path = sqlite_path(store)
    if not config.enabled or (path is not None and not path.exists()):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            quiet_mlflow()
            return _register_champion(store, config.experiment, rows)
    except Exception as error:  # whatever a broken store, network or installation raises
        warn_off("cannot register the champion", config, error, "the comparison is complete without it")
        return None


def _register_champion(store: str, experiment_name: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    with initialisation_lock(store):
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

    Its weights identify it: no run id lies in DVC's outputs, where it would make equal results differ.
    """
    tags = " and ".join(f"tags.{key} = '{row[key]}'" for key in ("variant", "seed", "weights_sha256"))
    runs = client.search_runs(
        [experiment_id], f"{tags} and attributes.status = 'FINISHED'", order_by=["attributes.start_time DESC"]
    )
    for run in runs:
        if (
            run.data.metrics.get("val_full") == row["val_full"]
            and run.outputs is not None
            and run.outputs.model_outputs
        ):
            return run
    return None
