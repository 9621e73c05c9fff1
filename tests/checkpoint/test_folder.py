"""A run's folder: nothing in it that is not ours is ever written over or deleted."""

import json
import os
import shutil
from pathlib import Path

import pytest

from chargpt.checkpoint.folder import RECORD, locked, recorded, remove_unreferenced
from chargpt.errors import CheckpointError, TrainingError
from runs import result, train


def everything(folder: Path) -> dict[str, bytes | str]:
    """All that lies below a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("data/t.txt", "step-1/notes", "step-000001/notes", "step-by-step.md", ".best.backup/x", ".config.yaml.swp"),
        *("sample.txt", "config.yaml", "curve.csv", "timing.csv", "metrics.json", "tokenizer.json", "last", "best/x"),
        *(".hidden", ".step-old", ".last.link", ".best.copied/x", ".config.yaml.0123abcd", "run.json/x"),
    ],
)
def test_a_folder_of_the_users_is_refused_and_stays_as_it_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    before = everything(folder)
    with pytest.raises(TrainingError, match=r"mine.*(is not empty|finished run)"):
        train(folder)
    assert everything(folder) == before


def test_a_finished_run_inside_a_folder_is_no_reason_to_train_there(tmp_path: Path) -> None:
    train(tmp_path / "runs" / "step-000001")
    before = everything(tmp_path)
    with pytest.raises(TrainingError, match="is not empty"):
        train(tmp_path / "runs")
    assert everything(tmp_path) == before


def test_what_users_lay_into_a_run_outlives_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        pass
    mine = ("step-000003/notes", "step-000500/notes", "step-1/x", ".best.backup/x", ".step-000003.swp", "notes.txt")
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    train(run)
    assert [name for name in mine if not (run / name).is_file()] == []
    assert recorded(run) == sorted({os.readlink(run / "best"), os.readlink(run / "last")})


def test_what_has_the_name_of_a_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        (run / "step-000006").mkdir()
        (run / "step-000006" / "notes").write_text("mine")
    with pytest.raises(TrainingError, match="step-000006 is not of this run"):
        train(run)
    assert (run / "step-000006" / "notes").read_text() == "mine"
    assert os.readlink(run / "last") == "step-000000"


@pytest.mark.parametrize("made", ["nothing", "an empty folder", "a lock", "a record cut short"])
def test_a_new_or_empty_folder_becomes_a_run(tmp_path: Path, made: str) -> None:
    run = tmp_path / "run"
    if made != "nothing":
        run.mkdir()
    if made == "a lock":
        (run / ".lock").touch()
    if made == "a record cut short":  # a process killed in its first moment
        (run / f".{RECORD}.0123abcd").touch()
    train(run)
    assert (run / RECORD).is_file()
    assert not list(run.glob(f".{RECORD}.*"))


def test_the_record_is_written_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chargpt.experiment.Trainer", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", RECORD]


def test_a_run_from_before_there_were_records_goes_on(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run, symlinks=True)
    for name in (RECORD, "metrics.json"):
        (run / name).unlink()
    train(run)
    assert result(run) == result(tmp_path / "whole")
    assert recorded(run) == recorded(tmp_path / "whole")


def test_the_lock_is_no_way_to_another_file(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(TrainingError, match=r"\.lock is a link"):
        train(run)
    assert victim.read_text() == "mine"
    (run / ".lock").unlink()
    (run / ".lock").write_text("mine")
    with locked(run):
        assert (run / ".lock").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "1", "null", "{}", '"x"', "[" * 100_000),
        json.dumps({"format": "chargpt-run", "version": 2, "checkpoints": []}),
        json.dumps({"format": "chargpt-run", "version": 1, "checkpoints": {}}),
        json.dumps({"format": "chargpt-run", "version": 1, "checkpoints": [1]}),
        json.dumps({"format": "chargpt-run", "version": 1, "checkpoints": ["../data"]}),
        json.dumps({"format": "chargpt-run", "version": 1, "checkpoints": ["step-000001/../../data"]}),
    ],
)
def test_a_damaged_record_deletes_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "data").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / RECORD).write_text(content)
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        remove_unreferenced(run)
    assert everything(tmp_path) == before


def test_a_listed_checkpoint_that_became_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.txt").write_text("mine")
    with locked(run := tmp_path / "run"):
        (run / RECORD).write_text(json.dumps({"format": "chargpt-run", "version": 1, "checkpoints": ["step-000001"]}))
        (run / "step-000001").symlink_to(tmp_path / "data", target_is_directory=True)
        remove_unreferenced(run)
    assert (tmp_path / "data" / "t.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["best", "last"])
def test_links_to_themselves_are_damage(tmp_path: Path, name: str) -> None:
    train(run := tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / name).unlink()
    (run / name).symlink_to(name)
    if name == "last":
        with pytest.raises(CheckpointError, match="last holds no checkpoint"):
            train(run)
    else:
        train(run)
        assert (run / "best" / "checkpoint.json").is_file()
