"""What users get wrong: exit code 2, one clear message, no traceback, nothing lost or half-written."""

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from chargpt import experiment
from chargpt.command import user_errors
from chargpt.errors import ChargptError
from chargpt.planner import machine
from chargpt.training import Speed
from test_cli import TINY, Chargpt, chargpt, interrupt, one_error, start, trained

__all__ = ["chargpt", "trained"]  # fixtures

BAD_TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing.txt": (None, r"missing\.txt"),
    "empty.txt": (b"", r"empty\.txt is empty"),
    "binary.txt": (b"PK\x03\x04\x00\x00" * 100, r"binary\.txt is binary: NUL at byte 4"),
    "latin.txt": (b"caf\xe9 " * 100, r"latin\.txt is not in utf-8: byte 0xe9 at offset 3 .*encoding"),
    "cut.txt": ("мир".encode()[:-1], r"cut\.txt is not in utf-8: byte 0xd1 at offset 4 "),
    "small.txt": (b"to be", r"tokens"),
    "short.txt": (b"to be or not to be, so", r"too few for block_size 8"),
    "one.txt": (b"x", r"1 tokens? cannot be split"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_trained_on(name: str, chargpt: Chargpt, tmp_path: Path) -> None:
    content, message = BAD_TEXTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = chargpt("train", name, *TINY)
    assert (code, out) == (2, "")
    assert re.search(message, one_error(err)), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.n_embd=10", "--set", "model.n_head=4"], r"n_embd must be divisible by n_head.*n_embd=10"),
        (["--device", "gpu"], r"device must be"),
        (["--set", "n_layer=3"], r"unknown key n_layer; did you mean model\.n_layer\?"),
        (["--set", "model.n_layers=3"], r"unknown key model\.n_layers; did you mean model\.n_layer\?"),
        (["--set", "n_layer"], r"--set takes key=value"),
        (["--set", "modle.n_layer=3"], r"'modle' is no group of knobs; did you mean model\?"),
        (["--set", "max_steps=many"], r"max_steps must be a whole number, got 'many'"),
        (["--set", "max_steps=0"], r"max_steps must be at least 1, got 0"),
        (["--set", "max_seconds=5"], r"a run is a number of steps: set max_steps"),
        (["--set", "model.dropout=[1"], r"not valid YAML"),
        (["--set", "model.kind=trigram"], r"model\.kind must be one of bigram, transformer, got 'trigram'"),
        (["--set", "optimizer.learning_rate=-1"], r"learning_rate must be positive"),
        (["--set", "device=gpu"], r"device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--set", "backend=fast"], r"backend must be one of auto, "),
        (["--preset", "modem"], r"no preset is called 'modem'; did you mean modern\?"),
        (["--minutes", "3"], r"--minutes and --set max_steps=… both set how long to train; leave one out"),
        (["--minutes", "-1"], r"--minutes must be positive and at most 1,000,000, got -1"),
        (["--set", "patience=0"], r"patience must be at least 1 or null, got 0"),
        (
            ["--set", "model.n_embd=1000000"],
            r"training would take about .* MiB of memory, and .* free; lower batch_size",
        ),
        (["--config", "no.yaml"], r"no\.yaml does not exist"),
        (["--config", "typo.yaml"], r"typo\.yaml: unknown key max_step; did you mean max_steps\?"),
        (["--config", "list.yaml"], r"list\.yaml: the file must be a group of knobs"),
        (["--config", "."], r"cannot be read"),
        (["--val-fraction", "1.5"], r"val_fraction must be between 0 and 1, got 1\.5"),
        (["--val-fraction", "nan"], r"val_fraction must be"),
        (["--encoding", "no-such"], r"no-such"),
        (["--seed", "-1"], r"seed must be a whole number of at least 0"),
        (["--out", "text.txt"], r"text\.txt"),
        (["--out", "text.txt/below"], r"text\.txt"),
        (["--out", "x" * 300], r"File name too long"),
    ],
)
def test_a_command_to_train_that_cannot_be_carried_out(
    arguments: list[str], message: str, chargpt: Chargpt, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    (tmp_path / "typo.yaml").write_text("max_step: 3\n")
    (tmp_path / "list.yaml").write_text("- 3\n")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = chargpt("train", "text.txt", *TINY, *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert sum(line.startswith("chargpt: error: ") for line in err.splitlines()) == 1
    left = sorted(path for path in tmp_path.rglob("*") if path.name not in ("runs", "text", ".lock"))
    assert left == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--prompt", "to z"], r"'z'"),
        (["sample", "RUN", "--prompt", "漢字", "--unknown", "skip"], r"no character of the prompt '漢字'"),
        (["sample", "RUN", "--temperature", "-1"], r"temperature must be at least 0"),
        (["sample", "RUN", "--temperature", "nan"], r"temperature must be"),
        (["sample", "RUN", "--top-k", "0"], r"top_k must be at least 1"),
        (["sample", "RUN", "--top-p", "1.5"], r"top_p must be in \(0, 1\]"),
        (["sample", "RUN", "--num-samples", "0"], r"num_samples must be at least 1"),
        (["sample", "RUN", "--num-samples", "2", "--stream"], r"several samples on a terminal only"),
        (["serve", "nothing"], r"nothing does not exist"),
        (["serve", "=RUN"], r"'=RUN' names no model"),
        (["serve", "RUN,"], r"names no model; it is RUN, NAME=RUN or NAME=RUN,RUN"),
        (["serve", "a=RUN", "a=RUN"], r"two models have the same name"),
        (["serve", "RUN", "--port", "99999"], r"--port 99999 is no port"),
        (["serve", "RUN", "--slots", "0"], r"--slots must be from 1 to 1024"),
        (["serve", "RUN", "--api-key", ""], r"the API key is empty: give one with CHARGPT_API_KEY or --api-key"),
        (["serve", "RUN", "--host", "0.0.0.0"], r"--host 0\.0\.0\.0 is open to others: name with --allow-host"),
        (
            ["serve", "RUN", "--host", "192.0.2.1", "--api-key", "k", "--allow-host", "x"],
            r"cannot listen at 192\.0\.2\.1",
        ),
        (["sample", "RUN", "--interactive"], r"--interactive needs a terminal"),
        (["sample", "RUN", "--interactive", "--json"], r"--interactive needs a terminal"),
        (["sample", "RUN", "--ban", "漢"], r"no token of this model has the character '漢'"),
        (["sample", "RUN", "--allow", ""], r"allow must be at least one character"),
        (["sample", "RUN", "--allow", "ab", "--ban", "b"], r"ban must be characters that allow lacks, so not 'b'"),
        (["sample", "RUN", "--max-new-tokens", "-1"], r"max_new_tokens must be at least 0"),
        (["sample", "RUN", "--device", "gpu"], r"device must be"),
        (["sample", "nothing"], r"nothing does not exist"),
        (["sample", "."], r"holds no checkpoint"),
        (["sample", "x" * 300], r"does not exist|File name too long"),
        (["eval", "nothing"], r"nothing does not exist"),
        (["eval", "RUN", "--data", "nothing"], r"nothing.*does not exist"),
        (["eval", "RUN", "--text", "nothing.txt"], r"nothing\.txt"),
        (["eval", "RUN", "--text", ""], r"empty"),
        (["eval", "RUN", "--text", "one.txt"], r"one\.txt has 1 token"),
    ],
)
def test_a_command_to_use_a_run_that_cannot_be_carried_out(
    arguments: list[str], message: str, chargpt: Chargpt, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("t")
    code, out, err = chargpt(*(str(trained / "runs/my") if argument == "RUN" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert re.search(message, one_error(err)), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_damaged_checkpoint(name: str, command: str, chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(trained / "runs/my"), str(tmp_path / "run")], check=True)
    path = tmp_path / "run" / "best" / name
    path.write_bytes(path.read_bytes()[:-9])
    code, out, err = chargpt(command, "run")
    assert (code, out) == (2, "")
    assert name in one_error(err) or "damaged" in err


def test_going_on_under_another_config_shows_every_difference(
    chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "evaluate", interrupt)
        assert chargpt("train", "text.txt", *TINY)[0] == 2
    code, out, err = chargpt("train", "text.txt", *TINY, "--set", "batch_size=5", "--set", "model.n_embd=16")
    assert (code, out) == (2, "")
    start = err.splitlines().index(next(line for line in err.splitlines() if line.startswith("chargpt: error: ")))
    first, *rest = err.splitlines()[start:]
    assert "runs/text holds a run under another config" in first
    assert rest == ["  batch_size: 4 → 5", "  model.n_embd: 8 → 16"]
    assert chargpt("train", "text.txt", *TINY)[0] == 0


@pytest.mark.parametrize(
    "where",
    [
        "chargpt.text.read_text",
        "chargpt.training.trainer.resolve_runtime",
        pytest.param("chargpt.tokenizers.build_tokenizer", marks=pytest.mark.slow),
        pytest.param("chargpt.data.split_tokens", marks=pytest.mark.slow),
        pytest.param("chargpt.experiment.evaluate", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_anywhere_is_one_line_and_the_same_command_finishes(
    where: str, chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupt)
        code, out, err = chargpt("train", "text.txt", *TINY)
    assert (code, out) == (2, "")
    assert one_error(err) == "chargpt: error: stopped by Ctrl-C; nothing half-written was left behind"
    assert chargpt("train", "text.txt", *TINY)[0] == 0


def test_a_full_disk_while_training_is_one_error_and_the_same_command_finishes(
    chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The steps that measure the speed would be moments too, more or fewer of them in every run.
    monkeypatch.setattr(machine, "measure_speed", lambda run: Speed(100_000, 100_000))
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    moments = runs.Moments(tmp_path / "alone", lambda number, what: None)
    with moments:
        assert chargpt("train", "text.txt", "--out", tmp_path / "alone", *TINY)[0] == 0
    for moment in (1, 2, moments.count // 3, moments.count // 2, moments.count - 6):
        folder = tmp_path / str(moment)
        with runs.Moments(folder, runs.disk_full(moment)):
            code, out, err = chargpt("train", "text.txt", "--out", folder, *TINY)
        assert (code, out) == (2, "")
        assert "No space left on device" in one_error(err)
        assert chargpt("train", "text.txt", "--out", folder, *TINY)[0] == 0
        assert runs.result(folder) == runs.result(tmp_path / "alone")


# ---------------------------------------------------------------------------------- the real process, exit code and all


def test_the_process_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    commands = [
        ["train", "missing.txt"],
        ["train", "text.txt", "--set", "model.n_embd=10", "--set", "model.n_head=4"],
        ["train", "text.txt", *TINY, "--out", "text.txt/below"],
        ["sample", "missing"],
    ]
    processes = [start(tmp_path, *command) for command in commands]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "")
        one_error(err)


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs /sys")
def test_a_folder_that_refuses_to_be_written(chargpt: Chargpt, tmp_path: Path) -> None:
    """/sys refuses even the superuser."""
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    code, out, err = chargpt("train", "text.txt", "--out", "/sys/run", *TINY)
    assert (code, out) == (2, "")
    assert "/sys/run" in one_error(err)


# ---------------------------------------------------------------------------------------------------------- user_errors


def outcome(action: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stop, user_errors():
        action()
    return stop.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], Any]:
    def action() -> None:
        raise error

    return action


def test_errors_of_ours_keep_their_traceback() -> None:
    for error in (ZeroDivisionError(), AssertionError(), OSError(errno.EBADF, "bad"), ValueError("x")):
        with pytest.raises(type(error)), user_errors():
            raise error


def test_a_user_error_and_ctrl_c_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(raising(ChargptError("mend it")), capsys) == (2, "chargpt: error: mend it\n")
    code, err = outcome(raising(KeyboardInterrupt("SIGTERM")), capsys)
    assert (code, err) == (2, "chargpt: error: stopped by SIGTERM; nothing half-written was left behind\n")


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts with `>&-`
    with user_errors():
        pass
