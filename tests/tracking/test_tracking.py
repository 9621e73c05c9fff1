"""Tracking against real SQLite stores: what a run shows, exactly-once curves, and stores that fail."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chargpt import tracking
from chargpt.checkpoint import save_checkpoint
from chargpt.config import BigramConfig, SampleConfig, TrackingConfig
from chargpt.errors import ConfigError
from chargpt.generation import generate_text
from chargpt.models import build_model
from chargpt.tokenizers.character import CharacterTokenizer
from chargpt.tracking import Dataset, NullTracker, Point, RunDescription, provenance, store
from chargpt.tracking.guarded import RUN_ID, Guarded

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy

CONFIG = TrackingConfig(system_metrics=False)
RUN = RunDescription(
    variant="bigram",
    seed=7,
    params={"model.kind": "bigram", "optimizer.beta1": 0.9, "note": "x" * 6001} | {f"many.{i}": i for i in range(150)},
    tags={"torch": "2.13.0", "backend": "torch"},
    dataset=Dataset("tiny_shakespeare", "d" * 64, train_tokens=1_003_854, val_tokens=111_540),
)


def open_tracker(config: TrackingConfig, run: RunDescription, run_id: str | None = None) -> Any:
    """In a folder of its own, which names `run_id` when it resumes."""
    folder = Path(tempfile.mkdtemp())
    if run_id is not None:
        (folder / RUN_ID).write_text(json.dumps({"run_id": run_id}), encoding="utf-8")
    tracker = tracking.open_tracker(config, run, folder, resumed=run_id is not None)
    known = json.loads((folder / RUN_ID).read_text(encoding="utf-8"))["run_id"] if (folder / RUN_ID).exists() else None
    assert known == (tracker.run_id if isinstance(tracker, Guarded) else run_id)  # kept for the next resume
    return tracker


def curve(last: int, first: int = 1) -> list[Point]:
    return [Point(step, 1.7e9 + step, {"train/loss": 1 / step}) for step in range(first, last + 1)]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder: Path) -> str:
    (folder / "chargpt").mkdir(parents=True)
    for name in ("__init__.py", "model.py"):
        (folder / "chargpt" / name).write_text("width = 1\n")
    (folder / "params.yaml").write_text("seed: 1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A git repository whose store the tests share: making one takes seconds. The space is part of the test."""
    root = tmp_path_factory.mktemp("a project")
    make_repository(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        yield root


@pytest.fixture(autouse=True)
def _in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


@pytest.fixture
def client(project: Path) -> Any:
    store.quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{project}/mlflow.db")


def history(client: Any, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


# ------------------------------------------------------------------------------------------------------- what a run is


def test_run_shows_what_it_is(project: Path, monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "brave-experiment")
    monkeypatch.setenv("DVC_STAGE", "train@bigram-7")
    commit = git(project, "rev-parse", "HEAD")
    monkeypatch.setattr(provenance, "PACKAGE", project / "chargpt")
    tracker = open_tracker(CONFIG, RUN)
    assert tracker.url is None  # no server shows it yet
    tracker.finish("FINISHED")

    run = client.get_run(tracker.run_id)
    assert run.info.run_name == f"bigram-s7-{commit[:7]}-brave-experiment"
    assert client.get_experiment(run.info.experiment_id).name == "chargpt"
    assert {key: value for key, value in run.data.tags.items() if key != "mlflow.runName"} == {
        "variant": "bigram",
        "seed": "7",
        "torch": "2.13.0",
        "backend": "torch",
        "mlflow.source.git.commit": commit,
        "git.dirty": "false",
        "dvc.experiment": "brave-experiment",
        "dvc.stage": "train@bigram-7",
    }
    assert run.data.params["optimizer.beta1"] == "0.9"
    assert run.data.params["note"] == "x" * 5999 + "…"
    assert len(run.data.params) == len(RUN.params)
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("tiny_shakespeare", "d" * 36)
    assert '"val_tokens": 111540' in data.dataset.profile


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("params.yaml", True), ("chargpt/model.py", True), ("chargpt/new.py", True), ("notes.txt", False)],
)
def test_dirty_means_a_file_that_makes_results(tmp_path: Path, path: str, dirty: bool) -> None:
    commit = make_repository(tmp_path)
    package = tmp_path / "chargpt"
    assert provenance.git_state(package) == tracking.GitState(commit, dirty=False)
    (tmp_path / path).write_text("changed\n")
    assert provenance.git_state(package) == tracking.GitState(commit, dirty)


def test_the_repository_that_a_text_or_an_environment_lies_in_is_not_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / ".venv" / "site-packages" / "chargpt"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert provenance.git_state(installed) is None
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    assert "mlflow.source.git.commit" not in provenance.all_tags(RUN)


def test_without_git_the_name_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    assert tracking.code_state() is None
    monkeypatch.setenv("PATH", "")  # not installed
    assert tracking.code_state() is None
    assert provenance.run_name(RUN, provenance.all_tags(RUN)) == "bigram-s7"


@pytest.mark.parametrize("uri", [None, "sqlite:///mlflow.db"])
def test_store_lies_at_the_root_wherever_the_process_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.store_uri(TrackingConfig(uri=uri)) == f"sqlite:///{project}/mlflow.db"
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.chdir(project / "chargpt")  # the top of the repository
    assert tracking.store_uri(TrackingConfig(uri=uri)) == f"sqlite:///{project}/mlflow.db"


# ---------------------------------------------------------------------------------------------------------- the curve


def test_long_curve_is_stored_whole(client: Any) -> None:
    points = curve(1500)  # more than one batch
    odd = [Point(1501, 1.8e9, {"train/loss": math.nan}), Point(1502, 1.8e9, {"train/loss": -math.inf})]
    tracker = open_tracker(CONFIG, RUN)
    tracker.log(points[:700])
    tracker.log(points + odd)
    tracker.finish("FAILED")
    stored = history(client, tracker.run_id)
    assert stored[:1500] == [(point.step, point.metrics["train/loss"]) for point in points]
    assert math.isnan(stored[1500][1])
    assert stored[1501][1] < -1e300


def test_resumed_run_stores_each_step_once(client: Any) -> None:
    killed = open_tracker(CONFIG, RUN)  # never told to finish, as after SIGKILL
    killed.log(curve(20))
    assert client.get_run(killed.run_id).info.status == "RUNNING"
    client.log_metric(killed.run_id, "val/loss", 0.5, step=10)  # one metric further than the other
    client.set_terminated(killed.run_id, "KILLED")

    # The checkpoint was of step 10: steps 11 to 20 are computed, and timed, again.
    again = [Point(p.step, p.time + 60, p.metrics | {"val/loss": float(p.step)}) for p in curve(30, first=11)]
    resumed = open_tracker(
        CONFIG, RunDescription("bigram", 7, {**RUN.params, "new": 1}, {"torch": "2.14"}), killed.run_id
    )
    assert resumed.run_id == killed.run_id
    assert client.get_run(resumed.run_id).info.status == "RUNNING"
    resumed.log(curve(10) + again[:15])
    resumed.log(curve(10) + again)
    resumed.finish("FINISHED")

    run = client.get_run(resumed.run_id)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(client, run.info.run_id)] == list(range(1, 31))
    assert [step for step, _ in history(client, run.info.run_id, "val/loss")] == list(range(10, 31))
    assert run.data.params["new"] == "1"
    assert (run.data.tags["torch"], run.data.tags["resumed.torch"]) == ("2.13.0", "2.14")
    assert "resumed.variant" not in run.data.tags
    assert len(run.inputs.dataset_inputs) == 1


@pytest.mark.parametrize("deleted", [True, False])
def test_run_that_is_gone_starts_anew_with_its_whole_curve(
    client: Any, capsys: pytest.CaptureFixture[str], deleted: bool
) -> None:
    gone = "0" * 32
    if deleted:
        gone = str(open_tracker(CONFIG, RUN).run_id)
        client.delete_run(gone)
    tracker = open_tracker(CONFIG, RUN, gone)
    assert tracker.run_id not in (None, gone)
    assert gone in capsys.readouterr().err
    tracker.log(curve(5))
    assert len(history(client, str(tracker.run_id))) == 5


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_finish_leaves_status_summary_and_files(
    project: Path, tmp_path: Path, client: Any, status: tracking.RunStatus
) -> None:
    (tmp_path / "curve.csv").write_text("step,loss\n")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "romeo.txt").write_text("ROMEO:")
    tracker = open_tracker(CONFIG, RUN)
    tracker.log(curve(5))
    tracker.finish(status, {"best/val_loss": 1.5}, {"weights": "abc"}, [tmp_path / "curve.csv", tmp_path / "samples"])
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == status
    assert run.info.end_time is not None
    assert run.data.tags["weights"] == "abc"
    assert history(client, run.info.run_id, "best/val_loss") == [(5, 1.5)]
    artifacts = project / "mlartifacts" / run.info.run_id / "artifacts"
    assert (artifacts / "curve.csv").read_text() == "step,loss\n"
    assert (artifacts / "samples" / "romeo.txt").read_text() == "ROMEO:"


def test_system_metrics_go_on_after_a_resume(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    key, run_id, steps = "system/cpu_utilization_percentage", None, 0
    for _ in range(2):
        tracker = open_tracker(TrackingConfig(), RUN, run_id)
        run_id = str(tracker.run_id)
        deadline = time.monotonic() + 60
        while len(history(client, run_id, key)) <= steps and time.monotonic() < deadline:
            time.sleep(0.1)
        tracker.finish("KILLED")
        stored = [step for step, _ in history(client, run_id, key)]
        assert len(stored) > steps
        assert stored == list(range(len(stored)))
        steps = len(stored)


# ---------------------------------------------------------------------------------------------------------- the model


def test_logged_model_loads_back_and_generates(project: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = CharacterTokenizer("\nabc")
    model = build_model(BigramConfig(), tokenizer.vocab_size, seed=1)
    training = {"identity": {}, "step": 0, "history": [[0, {}]], "best": [0, 1.0]}
    save_checkpoint(tmp_path / "checkpoint", model, tokenizer, {}, {"only/to go on": torch.zeros(1)}, training)
    (tmp_path / "best").symlink_to("checkpoint")
    tracker = open_tracker(CONFIG, RUN)
    tracker.finish("FINISHED", model=tmp_path / "best")
    (tmp_path / "checkpoint").rename(tmp_path / "away")  # the store has its own copy

    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    loaded = mlflow.pyfunc.load_model(f"runs:/{tracker.run_id}/model")
    params = {"max_new_tokens": 20, "temperature": 0.5, "top_k": 2, "seed": 3}
    config = SampleConfig(max_new_tokens=20, temperature=0.5, top_k=2, seed=3)
    expected = [generate_text(model, tokenizer, prompt, config)[0] for prompt in ("ab", "")]
    assert loaded.predict(["ab", ""], params=params) == expected
    assert loaded.predict(pd.DataFrame({"prompt": ["ab", ""]}), params=params) == expected
    assert len(loaded.predict(["a"])[0]) == 501
    names = {path.name for path in (project / "mlartifacts").rglob("*")}
    assert {"checkpoint.json", "model.safetensors", "tokenizer.json"} <= names
    assert "state.safetensors" not in names
    assert not [name for name in names if name.endswith(".pkl")]
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)] == []
    assert not any((project / name).exists() for name in ("mlruns", "chargpt/mlflow.db"))


# -------------------------------------------------------------------------------------------------------- the champion

NOT_IN_STORE = {
    "variant": "bigram",
    "seed": 99,
    "val_full": 0.1,
    "weights_sha256": "f" * 64,
}  # a row out of DVC's cache, say


def finished_run(folder: Path, seed: int, loss: float, split: str = "a" * 64) -> tuple[dict[str, Any], Any, Any]:
    """A finished run with a model: the row of metrics that it left, and its model and tokenizer."""
    tokenizer = CharacterTokenizer("\nabc")
    model = build_model(BigramConfig(), tokenizer.vocab_size, seed)
    save_checkpoint(folder / f"model-{seed}", model, tokenizer, {})
    tracker = open_tracker(CONFIG, RunDescription("bigram", seed, tags={"splits_sha256": split}))
    row = {"variant": "bigram", "seed": seed, "val_full": loss, "weights_sha256": f"{seed:064}"}
    tags = {"weights_sha256": f"{seed:064}"}
    tracker.finish("FINISHED", {"val_full": loss}, tags, model=folder / f"model-{seed}")
    return row, model, tokenizer


def champion(client: Any) -> Any:
    return client.get_model_version_by_alias("chargpt", "champion")


def test_the_best_run_is_the_champion_that_others_load(
    project: Path, tmp_path: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    worse, *_ = finished_run(tmp_path, 11, 2.0)
    best, model, tokenizer = finished_run(tmp_path, 12, 1.5 + 1e-9)
    twin = best | {"weights_sha256": "0" * 64}  # the same loss by other weights, which the store does not have
    line = tracking.register_champion(CONFIG, [worse, NOT_IN_STORE, best, twin])
    assert line is not None
    assert line.startswith("chargpt@champion is bigram-s12-")
    assert line.endswith(" (version 1), validation loss 1.5000")
    assert client.get_run(champion(client).run_id).data.tags["seed"] == "12"
    assert tracking.register_champion(CONFIG, [worse, best]) is None
    assert tracking.register_champion(CONFIG, [worse]) is None  # an experiment that is not as good
    assert tracking.register_champion(CONFIG, [NOT_IN_STORE]) is None
    assert tracking.register_champion(TrackingConfig(enabled=False), [best]) is None
    assert tracking.register_champion(TrackingConfig(experiment="never ran"), [best]) is None
    assert int(champion(client).version) == 1

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    loaded = mlflow.pyfunc.load_model("models:/chargpt@champion")
    expected = generate_text(model, tokenizer, "ab", SampleConfig(max_new_tokens=20, seed=3))
    assert loaded.predict(["ab"], params={"max_new_tokens": 20, "seed": 3}) == expected

    better, *_ = finished_run(tmp_path, 13, 1.4)
    assert "version 2" in str(tracking.register_champion(CONFIG, [worse, best, better]))
    of_another_text, *_ = finished_run(tmp_path, 14, 3.0, split="b" * 64)
    assert "version 3" in str(tracking.register_champion(CONFIG, [of_another_text]))
    assert champion(client).tags == {"variant": "bigram", "seed": "14", "splits_sha256": "b" * 64, "val_full": "3.0"}
    assert capsys.readouterr().err == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["closed port", "damaged", "no store at all"])
def test_no_champion_in_a_store_that_fails_costs_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    assert tracking.register_champion(TrackingConfig(uri=broken_store(kind, tmp_path)), [NOT_IN_STORE]) is None
    [line] = capfd.readouterr().err.splitlines()
    assert "cannot register the champion" in line
    assert "secret" not in line


def test_no_store_is_made_to_look_for_a_champion(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.register_champion(TrackingConfig(uri=uri), [NOT_IN_STORE]) is None
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------- stores that fail


def broken_store(kind: str, folder: Path) -> str:
    if kind == "closed port":
        return "http://user:secret@127.0.0.1:9"
    if kind == "damaged":
        (folder / "mlflow.db").write_bytes(b"no database " * 1000)
    if kind == "folder in its place":
        (folder / "mlflow.db").mkdir()
    if kind == "not writable":
        return "sqlite:////proc/nowhere/mlflow.db"  # where even root may not write
    if kind == "no store at all":
        return "carrier-pigeon://home"
    return f"sqlite:///{folder}/mlflow.db"


@pytest.mark.timeout(60)  # MLflow's own settings would retry for minutes
@pytest.mark.parametrize("kind", ["closed port", "damaged", "folder in its place", "not writable", "no store at all"])
def test_store_that_cannot_open_costs_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    config = TrackingConfig(uri=broken_store(kind, tmp_path))
    tracker = open_tracker(config, RUN, "an id from a checkpoint")
    tracker.log(curve(3))
    tracker.finish("FINISHED", {"best/val_loss": 1.0}, {}, [tmp_path / "missing"], tmp_path / "missing")
    output = capfd.readouterr()
    [line] = output.err.splitlines()
    assert line.startswith("chargpt: warning: MLflow at ")
    assert "cannot start the run" in line
    assert "the local curve goes on" in line
    assert "secret" not in line
    assert output.out == ""
    assert isinstance(tracker, NullTracker)


def test_mlflow_that_is_not_installed_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert isinstance(open_tracker(CONFIG, RUN), NullTracker)
    [line] = capsys.readouterr().err.splitlines()
    assert "mlflow is not installed" in line


def test_store_locked_during_the_run_costs_one_warning(
    project: Path, client: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = open_tracker(CONFIG, RUN)
    tracker.log(curve(2))
    with sqlite3.connect(project / "mlflow.db") as other:
        other.execute("BEGIN IMMEDIATE")
        tracker.log(curve(4))
        other.rollback()
    tracker.log(curve(6))
    tracker.finish("FINISHED")
    [line] = capfd.readouterr().err.splitlines()
    assert "cannot log metrics: OperationalError: database is locked" in line
    assert len(history(client, str(tracker.run_id))) == 2
    assert open_tracker(CONFIG, RUN, tracker.run_id).run_id == tracker.run_id  # resuming later mends it


def test_missing_artifact_still_ends_the_run(tmp_path: Path, client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(CONFIG, RUN)
    tracker.finish("FINISHED", artifacts=[tmp_path / "missing.csv"])
    [line] = capfd.readouterr().err.splitlines()
    assert "cannot finish the run" in line
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"


def test_ctrl_c_passes_through(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    tracker = open_tracker(CONFIG, RUN)
    with monkeypatch.context() as patch:
        patch.setattr(type(client), "log_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracker.log(curve(3))
    tracker.log(curve(3))
    tracker.finish("KILLED")
    assert client.get_run(str(tracker.run_id)).info.status == "KILLED"
    assert len(history(client, str(tracker.run_id))) == 3


# ------------------------------------------------------------------------------------------------------ whole processes


def start_python(code: str, **environment: str) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"} | environment
    paths = [str(Path(tracking.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_switched_off_imports_no_mlflow() -> None:
    code = """
import sys
from pathlib import Path
from chargpt.config import TrackingConfig
from chargpt.tracking import Point, RunDescription, open_tracker, ui_url
tracker = open_tracker(TrackingConfig(enabled=False), RunDescription("bigram", 1), Path("not made"), True)
tracker.log([Point(1, 0.0, {"train/loss": 1.0})])
tracker.finish("FINISHED", {"best/val_loss": 1.0})
ui_url(TrackingConfig())
assert not Path("not made").exists()
assert "mlflow" not in sys.modules
"""
    process = start_python(code)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_several_processes_open_a_new_store_at_once_and_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, tempfile, time
from pathlib import Path
from chargpt.config import TrackingConfig
from chargpt.tracking import Point, RunDescription, open_tracker
run = RunDescription("bigram", int(os.environ["SEED"]), {"a": 1})
tracker = open_tracker(TrackingConfig(), run, Path(tempfile.mkdtemp()), False)
tracker.log([Point(step, time.time(), {"train/loss": 1.0}) for step in range(3)])
tracker.finish("FINISHED")
"""
    processes = [start_python(code, DVC_ROOT=str(tmp_path), SEED=str(seed)) for seed in range(4)]
    assert [process.communicate() for process in processes] == [("", "")] * 4  # MLflow's chatter is off too
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("SELECT status, experiment_id FROM runs").fetchall()
        assert database.execute("SELECT count(*) FROM metrics WHERE key = 'train/loss'").fetchone() == (12,)
    assert [status for status, _ in runs] == ["FINISHED"] * 4
    assert len({experiment for _, experiment in runs}) == 1


# --------------------------------------------------------------------------------------------------------------- the UI


def test_links_lead_to_the_experiment(client: Any) -> None:
    open_tracker(CONFIG, RUN).finish("FINISHED")
    experiment = client.get_experiment_by_name("chargpt").experiment_id
    base = f"http://127.0.0.1:5001/#/experiments/{experiment}"
    assert tracking.ui_url(CONFIG, port=5001) == f"{base}?workflowType=machine_learning"
    charts = f"{base}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    assert tracking.ui_url(CONFIG, "charts", port=5001) == f"{charts}&viewStateShareKey=chargpt"
    client.delete_experiment_tag(experiment, "mlflow.sharedViewState.chargpt")  # as in a store of an earlier version
    assert tracking.ui_url(CONFIG, "charts", port=5001) == charts
    unknown = TrackingConfig(experiment="never ran")
    assert tracking.ui_url(unknown) == "http://127.0.0.1:5000/#/experiments"


def test_prepared_charts_take_metrics_that_a_run_logs_together(client: Any) -> None:
    """MLflow joins a curve with the metric on its x axis by step; tests/pipeline holds that a run logs both."""
    open_tracker(CONFIG, RUN).finish("FINISHED")
    view = json.loads(client.get_experiment_by_name("chargpt").tags["mlflow.sharedViewState.chargpt"])
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "variant"}]
    assert view["useGroupedValuesInCharts"]  # one line for a variant's seeds
    assert all(chart["useGlobalLineSmoothing"] for chart in view["compareRunCharts"])
    [section] = view["compareRunSections"]
    shown = [(c["metricSectionId"], c["metricKey"], c["selectedXAxisMetricKey"]) for c in view["compareRunCharts"]]
    assert shown == [(section["uuid"], "val/loss", x) for x in ("val/seconds", "val/tokens")]


def test_ui_is_for_stores_without_a_server(project: Path) -> None:
    command = tracking.ui_command(CONFIG, port=5001)
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{project}/mlflow.db"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"http://server:5000$"):
        tracking.ui_command(TrackingConfig(uri="http://user:secret@server:5000"))
