"""The real pipeline, run by the real DVC, in a repository of its own and on a small text."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog, {i * i} times.\n" for i in range(400))
KEYS = {
    "variant",
    "seed",
    "parameters",
    "steps",
    "weights_sha256",
    "bits_per_byte",
    "val_full",
    "val_nanogpt",
    "val_sliding",
    "backend",
    "device",
    "threads",
    "torch",
}


def params() -> dict:
    """The project's own params.yaml, on a small text and with short runs."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["corpus"]["path"] = "text.txt"
    raw["ablation"] = {"variants": ["bigram", "nanogpt-cpu"], "seeds": [1]}
    raw["evaluation"]["nanogpt_batches"] = 5
    raw["sample"]["max_new_tokens"] = 40
    raw["tracking"]["system_metrics"] = False
    small, transformer = raw["variants"]["bigram"], raw["variants"]["nanogpt-cpu"]
    small |= {"max_steps": 60, "eval_interval": 20, "batch_size": 8}
    transformer |= {"max_steps": 20, "eval_interval": 10, "batch_size": 4}
    transformer["model"] |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    return raw


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh repository with the project's code and a finished `dvc repro`."""
    folder = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("chargpt", "csrc", "pipelines", ".dvc"):
        ignore_dvc = shutil.ignore_patterns("cache", "tmp") if name == ".dvc" else ignored
        shutil.copytree(ROOT / name, folder / name, ignore=ignore_dvc)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    write_params(folder, params())
    (folder / "text.txt").write_text(TEXT)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start")
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def write_params(folder: Path, raw: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


def environment(folder: Path) -> dict[str, str]:
    """The stages' `python` is this one, and they import the copy of the project they stand in."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def stages_run(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}


def tracked_runs(folder: Path) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("chargpt")
    return list(client.search_runs([experiment.experiment_id]))


def test_one_command_leaves_models_samples_and_a_comparison(project: Path) -> None:
    metrics = json.loads((project / "reports/comparison.json").read_text())
    rows = [row for variant in metrics.values() for row in variant["runs"]]
    assert [(row["variant"], row["seed"]) for row in rows] == [("bigram", 1), ("nanogpt-cpu", 1)]
    assert all(row.keys() >= KEYS for row in rows)
    assert "nanogpt-cpu" in (project / "reports/comparison.md").read_text()
    times = json.loads((project / "reports/timing.json").read_text())
    assert {name: max(map(int, points)) for name, points in times.items()} == {
        f"{row['variant']}-s1": row["steps"] for row in rows
    }
    assert (project / "reports/curves.png").read_bytes().startswith(b"\x89PNG")
    for variant in ("bigram", "nanogpt-cpu"):
        sample = (project / f"samples/{variant}.txt").read_text()
        assert sample.count(f"=== {variant}") == 2  # with and without a prompt
        assert not (project / f"models/{variant}-s1/state.safetensors").exists()
    assert not list((project / "checkpoints").iterdir())


def test_the_page_names_the_stages_that_dvc_knows_and_what_they_were_run_on(project: Path) -> None:
    page = (project / "reports/index.html").read_text()
    stages = dvc(project, "stage", "list", "--name-only").stdout.split()
    assert set(re.findall(r"train@[\w.-]+", page)) == {stage for stage in stages if stage.startswith("train@")}
    assert hashlib.sha256(TEXT.encode()).hexdigest() in page
    assert run(project, "git", "rev-parse", "HEAD").stdout.strip() in page
    assert 'class="published"' not in page  # others' numbers are for another text


def test_dvc_shows_the_metrics_of_each_variant(project: Path) -> None:
    shown = json.loads(dvc(project, "metrics", "show", "--json", "reports/comparison.json").stdout)
    metrics = shown[""]["data"]["reports/comparison.json"]["data"]
    assert metrics["bigram"]["val_full"] > 0
    assert metrics["nanogpt-cpu"]["steps"] == 20


def test_every_variant_is_one_finished_run_in_mlflow(project: Path) -> None:
    runs = {run.data.tags["variant"]: run for run in tracked_runs(project) if run.data.tags["dvc.stage"]}
    assert {"bigram", "nanogpt-cpu"} <= runs.keys()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["bigram"].info.run_name.startswith("bigram-s1-")
    assert runs["bigram"].data.params["model.block_size"] == "8"
    assert runs["bigram"].data.tags["dvc.stage"] == "train@bigram-1"
    assert runs["bigram"].data.tags["mlflow.note.content"] == "Talk to it: `chargpt serve models/bigram-s1`"


def test_make_serve_takes_the_best_and_the_smallest_of_the_comparison(project: Path) -> None:
    metrics = json.loads((project / "reports/comparison.json").read_text())
    best = min(metrics, key=lambda variant: metrics[variant]["val_full"])
    command = [sys.executable, "-m", "pipelines.tools.serve", "--port", "0"]
    with subprocess.Popen(command, cwd=project, env=environment(project), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        served = []
        while not (line := server.stdout.readline()).startswith("serving at") and line:
            served.append(line.split(":")[0])
        server.terminate()
    assert line, "it did not come up"
    assert served == list(dict.fromkeys([best, "bigram"]))


def test_mlflow_can_draw_the_loss_over_tokens_and_seconds(project: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run,) = [run for run in tracked_runs(project) if run.data.tags["variant"] == "nanogpt-cpu"]
    curves = {key: client.get_metric_history(run.info.run_id, key) for key in ("val/loss", "val/tokens", "val/seconds")}
    assert [[point.step for point in curve] for curve in curves.values()] == [[0, 10, 20]] * 3
    assert [point.value for point in curves["val/tokens"]] == [0, 640, 1280]
    seconds = [point.value for point in curves["val/seconds"]]
    assert seconds == sorted(seconds)


def test_the_best_run_of_the_comparison_is_the_champion(project: Path) -> None:
    from mlflow.tracking import MlflowClient

    metrics = json.loads((project / "reports/comparison.json").read_text())
    best = min(metrics, key=lambda variant: metrics[variant]["val_full"])
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    champion = client.get_model_version_by_alias("chargpt", "champion")
    assert client.get_run(champion.run_id).data.tags["variant"] == best
    assert float(champion.tags["val_full"]) == metrics[best]["runs"][0]["val_full"]


def test_dvc_plots_every_run_in_one_chart(project: Path) -> None:
    shown = json.loads(dvc(project, "plots", "show", "--json").stdout)["data"]
    for title, x in (("Validation loss over tokens", "tokens"), ("Validation loss over seconds", "seconds")):
        content = shown[title][0]["content"]
        points = content["data"]["values"]
        assert content["encoding"]["x"]["field"] == x
        assert {(point["variant"], point["seed"]) for point in points} == {("bigram", "1"), ("nanogpt-cpu", "1")}
        assert all(float(point[x]) >= 0 and float(point["val_loss"]) > 0 for point in points)
    assert len(shown) == 2  # no chart for each run beside them


def test_a_second_repro_runs_no_stage(project: Path) -> None:
    assert stages_run(dvc(project, "repro")) == set()


@pytest.mark.slow
def test_editing_one_variant_reruns_it_alone_and_what_depends_on_it(project: Path) -> None:
    raw = params()
    raw["variants"]["bigram"]["max_steps"] = 40
    write_params(project, raw)
    assert stages_run(dvc(project, "repro")) == {"train@bigram-1", "sample@bigram", "compare"}
    metrics = json.loads((project / "reports/comparison.json").read_text())
    assert {name: variant["steps"] for name, variant in metrics.items()} == {"bigram": 40, "nanogpt-cpu": 20}

    raw["ablation"]["variants"] = ["nanogpt-cpu"]
    write_params(project, raw)
    assert stages_run(dvc(project, "repro")) == {"compare"}
    assert "bigram" not in (project / "reports/comparison.md").read_text()

    write_params(project, params())  # back to the start: everything comes out of DVC's cache
    assert stages_run(dvc(project, "repro")) <= {"compare"}


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_under_its_own_mlflow_run(project: Path) -> None:
    raw = params()
    raw["variants"]["slow"] = raw["variants"]["nanogpt-cpu"] | {"max_steps": 600, "eval_interval": 50}
    write_params(project, raw)
    command = [sys.executable, "-m", "pipelines.train", "--variant", "slow", "--seed", "3"]
    process = subprocess.Popen(command, cwd=project, env=environment(project), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step     50"):
            process.send_signal(signal.SIGTERM)
            break
    stderr = process.stderr.read()
    assert process.wait() == 2, stderr
    assert "chargpt: error: stopped at step" in stderr
    (stopped,) = [run for run in tracked_runs(project) if run.data.tags["variant"] == "slow"]
    assert stopped.info.status == "KILLED"

    done = run(project, *command)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    (finished,) = [run for run in tracked_runs(project) if run.data.tags["variant"] == "slow"]
    assert finished.info.run_id == stopped.info.run_id
    assert finished.info.status == "FINISHED"
    from mlflow.tracking import MlflowClient

    history = MlflowClient(f"sqlite:///{project}/mlflow.db").get_metric_history(finished.info.run_id, "val/loss")
    steps = [point.step for point in history]
    assert steps == sorted(set(steps))
    assert steps[-1] == 600
    write_params(project, params())


@pytest.mark.parametrize(
    ("change", "stage", "says"),
    [
        (
            lambda raw: raw["variants"]["bigram"]["model"].update(block_sise=8),
            "download",
            "did you mean variants.bigram.model.block_size?",
        ),
        (lambda raw: raw["corpus"].update(path="absent.txt"), "download", "absent.txt"),
        (
            lambda raw: raw["corpus"].update(path=None, name="tiny_shakespear"),
            "download",
            "did you mean tiny_shakespeare?",
        ),
        (
            lambda raw: raw["variants"]["nanogpt-cpu"]["model"].update(block_size=9000),
            "split",
            "too few for block_size",
        ),
        (lambda raw: raw["ablation"].update(seeds=[1, 7]), "compare", "s7 holds no finished run"),
    ],
)
def test_what_users_get_wrong_is_one_sentence_and_exit_code_2(project: Path, change, stage: str, says: str) -> None:
    raw = params()
    change(raw)
    write_params(project, raw)
    before = {path: path.read_bytes() for path in (project / "data").rglob("*") if path.is_file()}
    failed = run(project, sys.executable, "-m", f"pipelines.{stage}")
    write_params(project, params())
    assert failed.returncode == 2
    assert failed.stderr.startswith("chargpt: error: ")
    assert says in failed.stderr
    assert "Traceback" not in failed.stderr
    assert {path: path.read_bytes() for path in (project / "data").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_queued_experiments_land_in_the_same_store_with_the_same_kernels(project: Path) -> None:
    """Queued, an experiment runs in a checkout of its own, where the native module and the store are not."""
    git(project, "add", "-A")
    git(project, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "results", "--allow-empty")
    before = {run.info.run_id for run in tracked_runs(project)}
    for name, steps in (("shorter", 30), ("longer", 80)):  # that nothing has trained yet, so not in DVC's cache
        override = f"variants.bigram.max_steps={steps}"
        queued = dvc(project, "exp", "run", "--queue", "--name", name, "--set-param", override)
        assert queued.returncode == 0, queued.stderr
    done = dvc(project, "exp", "run", "--run-all")
    assert done.returncode == 0, done.stdout + done.stderr

    runs = {run.data.tags["dvc.experiment"]: run for run in tracked_runs(project) if run.info.run_id not in before}
    assert {name: run.data.params["max_steps"] for name, run in runs.items()} == {"shorter": "30", "longer": "80"}
    kernels = json.loads((project / "reports/comparison.json").read_text())["bigram"]["runs"][0]["backend"]
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["backend"] == kernels
        location = Path(run.info.artifact_uri.removeprefix("file://"))
        assert location.is_relative_to(project / "mlartifacts")
        assert (location / "curve.csv").exists()
    diff = json.loads(dvc(project, "metrics", "diff", "HEAD", "longer", "--json").stdout)
    assert diff["reports/comparison.json"]["bigram.steps"] == {"old": 60, "new": 80, "diff": 20}
    assert json.loads((project / "reports/comparison.json").read_text())["bigram"]["steps"] == 60  # ours is untouched


@pytest.mark.slow
def test_make_ablation_trains_what_is_missing_and_the_default_comes_back_from_the_cache(project: Path) -> None:
    command = [sys.executable, "-m", "pipelines.tools.ablation"]
    variants = ("bigram", "head", "nanogpt-cpu")
    raw = params()
    raw["variants"] = {name: raw["variants"][name] for name in ("bigram", "nanogpt-cpu")}
    raw["variants"]["head"] = raw["variants"]["nanogpt-cpu"] | {"max_steps": 10}
    write_params(project, raw)
    assert stages_run(dvc(project, "repro")) <= {"compare"}
    before = (project / "params.yaml").read_text()

    done = run(project, *command)
    there = {"train@bigram-1", "train@nanogpt-cpu-1"}
    trained = {stage for stage in stages_run(done) if stage.startswith("train@")}
    assert trained == {f"train@{variant}-{seed}" for variant in variants for seed in (1, 2, 3)} - there
    metrics = json.loads((project / "reports/comparison.json").read_text())
    assert {name: metrics[name]["seeds"] for name in metrics} == dict.fromkeys(variants, 3)
    assert stages_run(run(project, *command)) == set()

    (project / "params.yaml").write_text(before)
    assert stages_run(dvc(project, "repro")) <= {"compare"}
    assert json.loads((project / "reports/comparison.json").read_text()).keys() == {"bigram", "nanogpt-cpu"}
    write_params(project, params())
