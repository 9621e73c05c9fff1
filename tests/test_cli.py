"""`chargpt` at the command line: train, sample, eval and info on one's own text, and signals from a terminal."""

import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import runs
from chargpt import __version__, cli, experiment
from chargpt.cli import sample, train
from chargpt.config import TokenizerConfig, TrainConfig
from chargpt.config.presets import PRESETS
from chargpt.data import split_tokens, write_splits
from chargpt.kernels import available_backends
from chargpt.planner import machine
from chargpt.tokenizers import build_tokenizer
from chargpt.training import Speed

TINY = [
    *("--set", "max_steps=12", "--set", "batch_size=4", "--set", "eval_interval=6", "--set", "device=cpu"),
    *("--set", "model.block_size=8", "--set", "model.n_layer=1", "--set", "model.n_head=2", "--set", "model.n_embd=8"),
]
COMMAND = [sys.executable, "-c", "from chargpt.cli import main; main()"]
Chargpt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chargpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chargpt:
    """Run a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return commander(monkeypatch, capsys)


def commander(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chargpt:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chargpt", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            with runs.one_thread():
                cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample x --max-token 30", "chargpt sample has no '--max-token'; did you mean --max-new-tokens?"),
        (
            "sample x --length=30 --more",
            "chargpt sample has no '--length'; known: --help, --prompt, --prompt-file, --stream,",
        ),
        ("info x y", "chargpt info takes no 'x'; see chargpt info --help"),
        ("info -- y", "chargpt info takes no 'y'; see chargpt info --help"),
        ("info -q", "chargpt info has no '-q'; known: --help, --json, --check"),
        ("--json info", "options come after the command: chargpt info --json …"),
        ("--device=cpu train x.txt", "options come after the command: chargpt train --device=cpu …"),
        ("info -- --json", "chargpt info takes no '--json'; see chargpt info --help"),
        ("info -", "chargpt info takes no '-'; see chargpt info --help"),
        ("info --" + 5000 * "x", "chargpt info has no '--xxxxxxx"),
    ],
)
def test_what_a_command_does_not_know_is_named_with_what_it_knows(chargpt: Chargpt, words: str, message: str) -> None:
    code, out, err = chargpt(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"chargpt: error: {message}")
    assert len(err) < 500
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with my.txt (emoji and Cyrillic in it) and its finished run in runs/my."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "my.txt").write_text(runs.words(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["chargpt", "train", "my.txt", *TINY])
        with runs.one_thread():
            cli.main()
        yield folder


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["train", "sample", "serve", "eval", "compare", "info"])
def test_help_of_each_command_has_examples_that_parse(command: str, chargpt: Chargpt) -> None:
    code, out, err = chargpt(command, "--help")
    assert (code, err) == (0, "")
    examples = re.findall(rf"^  (chargpt {command}.*?)(?:  .*)?$", out.split("examples:")[1], re.M)
    assert len(examples) >= 2
    for option in re.findall(r"^  (--\S+ [A-Z].*?)(?=^  -|^\S|\Z)", out, re.M | re.S):  # those that take a value
        optional = option.split()[0] in ("--config", "--like", "--set", "--teacher", "--text", "--page")
        assert optional or "(default: " in " ".join(option.split()), option
    for example in examples:
        cli.build_parser().parse_args(shlex.split(example)[1:])


def test_help_names_every_preset(chargpt: Chargpt) -> None:
    out = " ".join(chargpt("train", "--help")[1].split())
    assert ", ".join([*PRESETS][:-1]) + f" or {[*PRESETS][-1]} (default" in out


def test_help_lists_the_commands_and_version_is_the_packages(chargpt: Chargpt) -> None:
    code, out, _ = chargpt("--help")
    assert code == 0
    assert all(f"    {command} " in out for command in ("train", "sample", "serve", "eval", "compare", "info"))
    assert chargpt("--version")[:2] == (0, f"chargpt {__version__}\n")


# ---------------------------------------------------------------------------------------------------------------- train


def test_training_leaves_a_run_that_needs_nothing_else(trained: Path) -> None:
    run = trained / "runs" / "my"
    names = {path.name for path in run.iterdir() if not path.name.startswith((".", "step-"))}
    files = {"config.yaml", "curve.csv", "metrics.json", "sample.txt", "timing.csv", "run.json"}
    assert names == {"best", "last"} | files
    data = json.loads((run / "best" / "checkpoint.json").read_text())["content"]["summary"]["data"]
    assert [path.name for path in (trained / "runs" / "data").iterdir()] == [data]
    assert sorted(path.name for path in (trained / "runs").iterdir()) == ["data", "my"]
    assert not (trained / "mlflow.db").exists()


def test_training_says_the_loss_where_it_is_and_how_to_sample(chargpt: Chargpt, tmp_path: Path) -> None:
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "a.txt").write_text(runs.words(2000), encoding="utf-8")
    (tmp_path / "poems" / "b.txt").write_text(runs.words(2000, seed=1), encoding="utf-8")
    code, out, err = chargpt("train", "poems", "--out", "there/it-is", "--set", "model.kind=bigram", *TINY[:8])
    assert code == 0
    loss = json.loads(Path("there/it-is/metrics.json").read_text())["val_full"]
    first, meaning, *guesses, last = out.splitlines()
    bits = json.loads(Path("there/it-is/metrics.json").read_text())["bits_per_byte"]
    assert 0.5 < bits * math.log(2) / loss < 1  # some characters are more than a byte
    assert first.startswith(f"validation loss {loss:.4f} ({bits:.3f} bits/byte) in nats per token, at step ")
    assert first.endswith(" of 12, in there/it-is")
    assert f" as guessing among {math.exp(loss):.2f} equally likely tokens;" in meaning
    values = [float(guess.split()[0]) for guess in guesses]
    assert values == sorted(values)[::-1]
    assert len(guesses) == 3
    assert last == "sample it: chargpt sample there/it-is --stream"
    assert "MiB of memory" in err
    assert chargpt(*last.split()[3:], "--max-new-tokens", "5")[0] == 0


def test_each_choice_is_told_with_its_reason_and_what_is_set_by_hand_stays(
    chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four passes over the text: a faster machine would be given less time.
    monkeypatch.setattr(machine, "measure_speed", lambda run: Speed(10_000, 100_000))
    (tmp_path / "text.txt").write_text(runs.words(4000), encoding="utf-8")
    arguments = ("--minutes", "0.02", "--set", "model.n_layer=1", "--set", "model.n_embd=32", "--set", "device=cpu")
    code, _, err = chargpt("train", "text.txt", *arguments)
    assert code == 0
    lines = err.splitlines()
    assert lines[0].startswith(
        "text text.txt: 4,000 characters, 4,000 tokens of 19 symbols (character); the last 800 are for validation"
    )
    assert lines[1].startswith("preset modern: the usual one for 0.02 min on a CPU")
    for knob in ("block_size 128", "eval_interval", "patience"):
        assert sum(line.startswith(f"{knob} ") for line in lines) == (knob != "block_size 128"), knob
    config = yaml.safe_load(Path("runs/text/config.yaml").read_text(encoding="utf-8"))
    assert [*config] == [field.name for field in dataclasses.fields(TrainConfig)]
    assert (config["model"]["n_layer"], config["model"]["n_embd"]) == (1, 32)
    assert config["max_steps"] == 3  # 1.2 seconds at 10,000 tokens a second, of 4,096 in a step
    assert json.loads(Path("runs/text/metrics.json").read_text())["variant"] == "modern"


def test_a_run_goes_on_with_the_steps_it_began_with_though_the_machine_is_slower_now(
    chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(runs.words(4000), encoding="utf-8")
    small = ("--set", "model.n_layer=1", "--set", "model.n_embd=32", "--set", "device=cpu")
    speeds = iter([Speed(100_000, 100_000)] * 4 + [Speed(10, 10)] * 2)
    with monkeypatch.context() as patched:
        patched.setattr(machine, "measure_speed", lambda run: next(speeds))
        with monkeypatch.context() as stopping:
            stopping.setattr(experiment, "evaluate", interrupt)
            assert chargpt("train", "text.txt", *small, "--minutes", "0.02")[0] == 2
        code, _, err = chargpt("train", "text.txt", *small, "--minutes", "0.02", "--set", "patience=99")
        assert code == 2
        assert re.findall(r"^  (\w+): .*→", err, re.M) == ["patience"]
        code, _, err = chargpt("train", "text.txt", "--preset", "cpu-best")
        assert code == 2
        assert "holds a run of modern, and --preset cpu-best asks for another" in err
        assert chargpt("train", "text.txt", "--minutes", "500")[0] == 0  # reuses the recorded steps
        rest = list(speeds)
        assert Speed(10, 10) in rest  # nothing was measured again
    assert json.loads(Path("runs/text/metrics.json").read_text())["steps"] == 29


def test_a_config_file_with_minutes_gets_its_steps_measured(
    chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chargpt.training.measure_speed", lambda run: Speed(4_000, 1))
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    (tmp_path / "variant.yaml").write_text("model: {kind: bigram, block_size: 4}\nmax_steps: 3\ndevice: cpu\n")
    assert chargpt("train", "text.txt", "--config", "variant.yaml", "--minutes", "0.01")[0] == 0
    assert json.loads(Path("runs/text/metrics.json").read_text())["steps"] == 50  # 0.6 s, 48 tokens a step


def test_a_run_like_another_differs_in_the_knob_alone(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "my.txt", tmp_path / "my.txt")
    like = trained / "runs/my"
    code, _, err = chargpt("train", "my.txt", "--like", like, "--set", "model.n_layer=2")
    assert code == 0
    assert "because of --set" not in err
    first, second = (yaml.safe_load((run / "config.yaml").read_text()) for run in (like, Path("runs/my")))
    assert second["model"].pop("n_layer") == 2
    assert first["model"].pop("n_layer") == 1
    assert first == second
    assert chargpt("train", "my.txt", "--like", like, "--out", "same")[0] == 0
    for name in ("metrics.json", "best/model.safetensors", "curve.csv"):
        assert (Path("same") / name).read_bytes() == (like / name).read_bytes()
    code, _, err = chargpt("train", "my.txt", "--like", "nothing", "--out", "other")
    assert code == 2
    assert "--like nothing: that is no folder of a run" in err
    (tmp_path / "less.txt").write_text(runs.words(2900), encoding="utf-8")
    code, _, err = chargpt("train", "less.txt", "--like", like)
    assert code == 0
    assert "was trained on another text, or another split of it: the losses do not compare" in err


def test_what_the_planner_moved_because_of_a_knob_is_named(chargpt: Chargpt, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text(runs.words(), encoding="utf-8")
    code, _, err = chargpt("train", "my.txt", *TINY[:8], "--set", "model.block_size=4", "--set", "model.n_embd=16")
    assert code == 0
    [line] = [line for line in err.splitlines() if line.startswith("because of --set")]
    assert "patience: " in line
    assert "eval_interval" not in line  # set by hand
    assert line.endswith("--like RUN changes nothing else")


@pytest.mark.parametrize("tokenizer", ["character", "byte"])
def test_both_tokenizers_go_through_training_sampling_and_evaluation(
    tokenizer: str, chargpt: Chargpt, tmp_path: Path
) -> None:
    (tmp_path / "my.txt").write_text(runs.words(), encoding="utf-8")
    assert chargpt("train", "my.txt", "--tokenizer", tokenizer, *TINY)[0] == 0
    metrics = json.loads(Path("runs/my/metrics.json").read_text())
    assert metrics["parameters"] > 0
    code, out, err = chargpt("eval", "runs/my", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["bits_per_byte"]["full"] == pytest.approx(metrics["bits_per_byte"])
    code, out, _ = chargpt("sample", "runs/my", "--prompt", "мир 🙂", "--max-new-tokens", "40")
    assert code == 0
    assert out.startswith("мир 🙂")
    streamed = chargpt("sample", "runs/my", "--prompt", "мир 🙂", "--max-new-tokens", "40", "--stream")[1]
    assert streamed == out
    code, _, err = chargpt("train", "my.txt", "--tokenizer", "word", *TINY, "--out", "other")
    assert code == 2
    assert "kind must be one of character, byte, got 'word'" in err


@pytest.mark.parametrize("page", [".", "..", "my.txt", "empty", "folder", "link", "nowhere", "pipe", ""])
def test_a_page_takes_the_place_of_nothing_but_a_page(
    page: str, chargpt: Chargpt, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "my.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("my.txt")
    (tmp_path / "nowhere").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    code, out, err = chargpt("compare", trained / "runs/my", "--page", page)
    assert (code, out) == (2, "")
    assert "name a" in one_error(err)
    assert (sorted(tmp_path.iterdir()), (tmp_path / "my.txt").read_text()) == (before, "mine")


def test_runs_are_compared_in_a_table_and_on_a_page(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="the page needs chargpt[pipeline]")
    shutil.copy(trained / "my.txt", tmp_path / "my.txt")
    assert chargpt("train", "my.txt", "--like", trained / "runs/my", "--seed", "9", "--out", "runs/nine")[0] == 0
    code, out, err = chargpt("compare", trained / "runs/my", "runs/nine", "--page", "there/page.html")
    assert (code, err) == (0, "")
    compared = (trained / "runs/my", Path("runs/nine"))
    losses = [json.loads((run / "metrics.json").read_text())["val_full"] for run in compared]
    assert re.findall(r"^\| (\w+) \| 1 \|", out, re.M) == ["my", "nine"]
    assert all(f"{loss:.4f}" in out for loss in losses)
    assert "do not compare" not in out
    page = Path("there/page.html").read_text(encoding="utf-8")
    assert all(f"{loss:.4f}" in page for loss in losses)
    assert chargpt("compare", trained / "runs/my", "--page", "there/page.html")[0] == 0  # ours may be replaced
    code, _, err = chargpt("compare", trained / "runs/my", "nothing")
    assert code == 2
    assert "nothing holds no finished run (no metrics.json in it)" in err
    (tmp_path / "other.txt").write_text(runs.words(2900), encoding="utf-8")
    assert chargpt("train", "other.txt", *TINY)[0] == 0
    assert "do not compare" in chargpt("compare", trained / "runs/my", "runs/other")[1]


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_finished_run_is_not_trained_again(chargpt: Chargpt, trained: Path) -> None:
    os.chdir(trained)
    code, out, err = chargpt("train", "my.txt", *TINY)
    assert (code, out) == (2, "")
    assert err.startswith("chargpt: error: runs/my holds a finished run, which stays as it is; to train longer")
    assert "--like runs/my with --set max_steps=N" in err


def test_the_config_of_a_variant_can_be_a_file(chargpt: Chargpt, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    (tmp_path / "variant.yaml").write_text("model: {kind: bigram, block_size: 4}\nmax_steps: 3\ndevice: cpu\n")
    assert chargpt("train", "text.txt", "--config", "variant.yaml", "--set", "max_steps=5")[0] == 0
    metrics = json.loads(Path("runs/text/metrics.json").read_text())
    assert (metrics["variant"], metrics["steps"], metrics["tokens"]) == ("bigram", 5, 5 * 12 * 4)


def test_the_seed_decides_the_run(chargpt: Chargpt, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(runs.words(), encoding="utf-8")
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert chargpt("train", "text.txt", "--out", out, "--seed", seed, *TINY)[0] == 0
    models = [Path(out, "last", "model.safetensors").read_bytes() for out in "abc"]
    assert models[0] == models[1] != models[2]


# ------------------------------------------------------------------------------------------------------ sample and eval


@pytest.mark.parametrize("prompt", ["", "to be ", "🙂 мир"])
@pytest.mark.parametrize("options", [[], ["--temperature", "0"], ["--top-k", "3", "--top-p", "0.9", "--seed", "7"]])
def test_streaming_shows_what_not_streaming_shows(
    prompt: str, options: list[str], chargpt: Chargpt, trained: Path
) -> None:
    arguments = ["sample", trained / "runs/my", "--prompt", prompt, "--max-new-tokens", "30", *options]
    whole, streamed = chargpt(*arguments), chargpt(*arguments, "--stream")
    assert whole == streamed
    assert whole[0] == 0
    assert whole[1].startswith(prompt)
    assert len(whole[1]) == len(prompt) + 30 + 1
    assert chargpt(*arguments) == whole  # seeded


def test_a_prompt_comes_from_a_file_or_standard_input_as_it_is(
    trained: Path, chargpt: Chargpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = chargpt("sample", trained / "runs/my", "--prompt", "to be\n", "--max-new-tokens", "20")[1]
    (tmp_path / "prompt.txt").write_text("to be\n", encoding="utf-8")
    arguments = ["sample", trained / "runs/my", "--max-new-tokens", "20", "--prompt-file"]
    assert chargpt(*arguments, "prompt.txt") == (0, shown, "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"to be\n")))
    assert chargpt(*arguments, "-") == (0, shown, "")
    (tmp_path / "latin").write_bytes(b"to \xe9")
    for name, message in (
        ("missing", "--prompt-file missing: No such file or directory"),
        (".", "--prompt-file .: Is a directory"),
        ("latin", "--prompt-file latin is not UTF-8 at byte 3; convert it first"),
    ):
        code, out, err = chargpt(*arguments, name)
        assert (code, out, err) == (2, "", f"chargpt: error: {message}\n")
    code, _, err = chargpt(*arguments, "prompt.txt", "--prompt", "to")
    assert (code, "not allowed with argument" in err) == (2, True)


def test_a_sample_ends_at_the_first_of_its_stop_texts(trained: Path, chargpt: Chargpt) -> None:
    arguments = ["sample", trained / "runs/my", "--prompt", "to", "--max-new-tokens", "200"]
    whole = chargpt(*arguments)[1]
    cut = chargpt(*arguments, "--stop", "be", "--stop", " q", "--stream")[1]
    assert cut == whole[: min(place for stop in ("be", " q") if (place := whole.find(stop)) >= 0)] + "\n"
    code, out, err = chargpt(*arguments, "--stop", "")
    assert (code, out) == (2, "")
    assert "stop must be texts that are not empty" in err


def test_several_samples_differ_and_are_set_apart(chargpt: Chargpt, trained: Path) -> None:
    _, out, _ = chargpt("sample", trained / "runs/my", "--num-samples", "3", "--max-new-tokens", "40")
    samples = out.split("\n---\n")
    assert len(samples) == len(set(samples)) == 3


def test_json_lines_for_programs(chargpt: Chargpt, trained: Path) -> None:
    arguments = ["sample", trained / "runs/my", "--prompt", "to", "--max-new-tokens", "40", "--num-samples", "2"]
    texts = chargpt(*arguments)[1].removesuffix("\n").split("\n---\n")
    whole = [json.loads(line) for line in chargpt(*arguments, "--json")[1].splitlines()]
    assert [(found["sample"], found["prompt"] + found["text"]) for found in whole] == list(enumerate(texts))
    for found in whole:
        assert found.keys() == {"sample", "prompt", "text", "tokens", "logprobs", "finish_reason"}
        assert len(found["tokens"]) == len(found["logprobs"]) == 40
        assert max(found["logprobs"]) < 0
        assert found["finish_reason"] == "length"
    pieces = [json.loads(line) for line in chargpt(*arguments, "--json", "--stream", "--stop", " ")[1].splitlines()]
    for i, found in enumerate(whole):
        mine = [piece for piece in pieces if piece["sample"] == i]
        assert "".join(piece["text"] for piece in mine) == found["text"].partition(" ")[0]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_logprobs_stand_before_each_token(chargpt: Chargpt, trained: Path) -> None:
    arguments = ["sample", trained / "runs/my", "--prompt", "to", "--max-new-tokens", "5", "--num-samples", "2"]
    texts = chargpt(*arguments)[1].removesuffix("\n").split("\n---\n")
    tables = chargpt(*arguments, "--logprobs")[1].removesuffix("\n").split("\n---\n")
    for text, table in zip(texts, tables, strict=True):
        rows = [(line[:9], line[11:]) for line in table.splitlines()]
        assert [shown for _, shown in rows] == [repr(character) for character in text.removeprefix("to")]
        assert all(float(logprob) < 0 for logprob, _ in rows)


def test_what_may_come_can_be_said(chargpt: Chargpt, trained: Path) -> None:
    arguments = ["sample", trained / "runs/my", "--prompt", "to", "--max-new-tokens", "200", "--temperature", "3"]
    assert set(chargpt(*arguments, "--allow", "tobe")[1].removeprefix("to")) == set("tobe\n")
    assert not set("tobe") & set(chargpt(*arguments, "--ban", "tobe")[1].removeprefix("to"))


def test_a_checkpoint_can_be_sampled_from_anywhere(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs/my/best", tmp_path / "alone")
    shown = [chargpt("sample", path, "--max-new-tokens", "20") for path in (trained / "runs/my", "alone")]
    assert shown[0] == shown[1]


def test_eval_gives_the_numbers_of_the_run(chargpt: Chargpt, trained: Path) -> None:
    metrics = json.loads((trained / "runs/my/metrics.json").read_text())
    code, out, err = chargpt("eval", trained / "runs/my", "--json")
    assert (code, err) == (0, "")
    losses = json.loads(out)
    assert losses.keys() == {"full", "sliding", "nanogpt", "bits_per_byte"}
    assert losses["full"] == metrics["val_full"]
    _, out, _ = chargpt("eval", trained / "runs/my/last", "--protocol", "full")
    assert out.startswith(f"full     {metrics['val_last']:.4f} nats per token, ")
    assert out.endswith(" bits per byte\n")


def test_several_runs_are_evaluated_and_sampled_together(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "my.txt", tmp_path / "my.txt")
    assert chargpt("train", "my.txt", *TINY, "--seed", "2")[0] == 0
    both = (trained / "runs/my", tmp_path / "runs/my")
    alone = [json.loads(chargpt("eval", run, "--protocol", "full", "--json")[1])["full"] for run in both]
    code, out, err = chargpt("eval", *both, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["full"] < sum(alone) / 2
    code, out, _ = chargpt("sample", *both, "--max-new-tokens", "20")
    assert (code, len(out)) == (0, 21)


def test_runs_on_different_splits_are_scored_together_on_named_data_only(
    chargpt: Chargpt, trained: Path, tmp_path: Path
) -> None:
    shutil.copy(trained / "my.txt", tmp_path / "my.txt")
    assert chargpt("train", "my.txt", *TINY, "--val-fraction", "0.3")[0] == 0
    for runs_in_order in ((trained / "runs/my", "runs/my"), ("runs/my", trained / "runs/my")):
        code, out, err = chargpt("eval", *runs_in_order)
        assert (code, out) == (2, "")
        assert f"{runs_in_order[1]} was trained on another text, another split" in err
    [data] = Path("runs/data").iterdir()
    assert chargpt("eval", trained / "runs/my", "runs/my", "--data", data)[0] == 0


@pytest.mark.parametrize("fingerprint", ["", "g"])  # below and above every fingerprint
def test_another_split_is_named_whichever_way_it_compares(
    fingerprint: str, chargpt: Chargpt, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(trained / "my.txt", tmp_path / "my.txt")
    real = train._like
    monkeypatch.setattr(
        train, "_like", lambda like, key, other: fingerprint if key == "data" else real(like, key, other)
    )
    _, _, err = chargpt("train", "my.txt", "--like", trained / "runs/my")
    assert "was trained on another text, or another split of it" in err


def test_the_speed_is_told_to_a_terminal_with_who_wrote(
    chargpt: Chargpt, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sample", trained / "runs/my", "--max-new-tokens", "30", "--stream", "--engine"]
    assert chargpt(*arguments, "torch")[2] == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    err = chargpt(*arguments, "torch")[2]
    assert re.search(r"^30 tokens in \d+\.\d s, [\d,]+ a second, by torch \(.+\)$", err, re.MULTILINE)
    if "cpp" in available_backends():
        assert "a second, by C++ in fp32 (" in chargpt(*arguments, "fp32")[2]


def test_a_line_of_json_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    class Out(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Out())
    sample.print_json({"text": "a"})
    assert flushed == ['{"text": "a"}\n']


def test_a_student_is_trained_and_says_from_whom_it_learns(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "my.txt", tmp_path / "my.txt")
    teacher = trained / "runs/my"
    code, _, err = chargpt("train", "my.txt", *TINY, "--out", "student", "--teacher", teacher)
    assert code == 0, err
    assert f"learning what {teacher} predict\n" in err
    code, _, err = chargpt("train", "my.txt", *TINY, "--out", "other", "--teacher", teacher, "nothing")
    assert code == 2
    assert "nothing does not exist" in err


def test_runs_of_different_symbols_do_not_predict_together(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other symbols " * 200, encoding="utf-8")
    assert chargpt("train", "other.txt", *TINY)[0] == 0
    code, out, err = chargpt("eval", trained / "runs/my", "runs/other")
    assert (code, out) == (2, "")
    assert "runs/other has another tokenizer (" in err


def test_eval_scores_another_text_in_the_same_symbols(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(runs.words(500, seed=3), encoding="utf-8")
    (tmp_path / "random.txt").write_text("zq" * 100, encoding="utf-8")
    code, out, _ = chargpt("eval", trained / "runs/my", "--text", "other.txt", "--protocol", "full", "--json")
    assert code == 0
    assert 0 < json.loads(out)["full"] < 5
    code, out, err = chargpt("eval", trained / "runs/my", "--text", "random.txt")
    assert (code, out) == (2, "")
    assert "'z'" in err
    assert "--unknown" in err
    assert chargpt("eval", trained / "runs/my", "--text", "random.txt", "--unknown", "replace")[0] == 0


def test_eval_of_a_short_text_keeps_what_can_be_said(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("to be", encoding="utf-8")
    code, out, err = chargpt("eval", trained / "runs/my", "--text", "short.txt")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["full", "sliding"]
    assert "not by nanogpt: random windows of 8 tokens need a text of at least 9" in err
    code, out, err = chargpt("eval", trained / "runs/my", "--text", "short.txt", "--protocol", "nanogpt")
    assert (code, out) == (2, "")


def test_eval_of_data_with_other_ids_is_one_sentence(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    [shard] = Path("runs/data").glob("*/val-*.npy")
    ids = np.load(shard)
    ids[3] = 200
    np.save(shard, ids)
    code, out, err = chargpt("eval", "runs/my")
    assert (code, out) == (2, "")
    assert "has the token id 200, and the model knows ids from 0 to" in one_error(err)
    np.save(shard, ids[:0])
    assert chargpt("eval", "runs/my")[0] == 2


@pytest.mark.parametrize(
    "name", ["caf\udce9", "%41 ?#", *(pytest.param(name, marks=pytest.mark.slow) for name in ("'\"", "\n", "ä"))]
)
def test_a_text_and_a_run_may_have_any_name(name: str, chargpt: Chargpt, tmp_path: Path) -> None:
    Path(f"{name}.txt").write_text(runs.words(), encoding="utf-8")
    code, _, err = chargpt("train", f"{name}.txt", *TINY)
    assert code == 0, err
    code, _, _ = chargpt("sample", f"runs/{name}", "--max-new-tokens", "5")
    assert code == 0
    assert Path(f"runs/{name}/metrics.json").is_file()


def test_runs_are_called_as_their_texts_are(chargpt: Chargpt, tmp_path: Path) -> None:
    for folder in ("v1.0", "v1.1"):
        Path(folder).mkdir()
        Path(folder, "t.txt").write_text(runs.words(), encoding="utf-8")
        assert chargpt("train", folder, *TINY)[0] == 0
    Path("current.txt").symlink_to("v1.0/t.txt")
    assert chargpt("train", "current.txt", *TINY)[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["current", "data", "v1.0", "v1.1"]


def test_training_in_a_folder_of_texts_does_not_read_its_own_runs(chargpt: Chargpt, tmp_path: Path) -> None:
    Path("a.txt").write_text(runs.words(), encoding="utf-8")
    assert chargpt("train", ".", *TINY, "--out", "runs/x")[0] == 0
    shutil.copy("runs/x/metrics.json", "kept")
    Path("runs/x/metrics.json").unlink()
    Path("kept").rename(".kept")
    code, _, err = chargpt("train", ".", *TINY, "--out", "runs/x")  # the same text: the run ends as it did
    assert code == 0, err
    assert Path("runs/x/metrics.json").read_text() == Path(".kept").read_text()


def test_a_prompt_that_is_wrong_is_an_error_before_anything_is_printed(chargpt: Chargpt, trained: Path) -> None:
    code, out, _ = chargpt("sample", trained / "runs/my", "--stream", "--prompt", "to Ω")
    assert (code, out) == (2, "")


@pytest.mark.parametrize("n", [30_000_000, 10**12, 2**63])
def test_more_samples_than_fit_is_one_sentence(n: int, chargpt: Chargpt, trained: Path) -> None:
    code, out, err = chargpt("sample", trained / "runs/my", "--num-samples", str(n))
    assert (code, out) == (2, "")
    assert "num_samples must be at least 1 and at most 65536" in one_error(err)


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "0", "1e308"])
def test_minutes_that_are_none_are_one_sentence(minutes: str, chargpt: Chargpt, tmp_path: Path) -> None:
    Path("a.txt").write_text(runs.words(), encoding="utf-8")
    code, out, err = chargpt("train", "a.txt", f"--minutes={minutes}")
    assert (code, out) == (2, "")
    assert "minutes" in one_error(err)


def test_eval_refuses_the_data_of_another_tokenizer(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(), "abc")
    write_splits(tmp_path / "splits", split_tokens(tokenizer.encode("abc" * 100), tokenizer, 0.1))
    code, out, err = chargpt("eval", trained / "runs/my", "--data", "splits")
    assert (code, out) == (2, "")
    assert "was trained with another tokenizer (" in err


def test_eval_of_a_checkpoint_without_data_says_what_to_give(chargpt: Chargpt, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs/my/best", tmp_path / "alone")
    code, _, err = chargpt("eval", "alone")
    assert code == 2
    data = json.loads(Path("alone/checkpoint.json").read_text())["content"]["summary"]["data"]
    assert data in err
    assert "--data" in err
    assert "--text" in err
    expected = chargpt("eval", trained / "runs/my/best")[1]
    assert chargpt("eval", "alone", "--data", trained / "my.txt")[1] == expected  # the text again
    (tmp_path / "other.txt").write_text(runs.words(seed=4), encoding="utf-8")
    code, _, err = chargpt("eval", "alone", "--data", "other.txt")
    assert code == 2
    assert "other.txt is not the text that the run was trained on" in err


# ----------------------------------------------------------------------------------------------------------------- info


def test_info_for_people_and_as_json(chargpt: Chargpt) -> None:
    code, text, err = chargpt("info")
    assert (code, err) == (0, "")
    assert text.startswith(f"chargpt {__version__}, Python ")
    code, out, err = chargpt("info", "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    assert {"packages", "cpu", "gpus", "native_module", "backends", "chosen"} <= info.keys()
    assert all(state in text for state in info["backends"].values())


# ------------------------------------------------------------------------------------------------ processes and signals


def start(folder: Path, *arguments: str, **options: int) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )


def one_error(err: str) -> str:
    """The error in what a command wrote to stderr: one, on one line, without a traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("chargpt: error: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_to_the_command_saves_and_the_same_command_finishes(name: str, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text(runs.words(), encoding="utf-8")
    arguments = ["train", "my.txt", *TINY, "--set", "max_steps=4000", "--set", "eval_interval=4000"]
    process = start(tmp_path, *arguments)
    while not (tmp_path / "runs/my/last").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    shown = "Ctrl-C" if name == "SIGINT" else "SIGTERM"
    assert (process.returncode, out) == (2, "")
    step = re.search(rf"stopped at step (\d+) by {shown}; everything is saved in runs/my", one_error(err))
    assert step
    assert 0 < int(step[1]) < 4000
    process = start(tmp_path, *arguments)  # and on, to be stopped again
    line = ""
    while "resuming from step" not in line:
        line = process.stderr.readline()  # type: ignore[union-attr]
        assert line, process.communicate()
    assert f"resuming from step {step[1]} " in line
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("delay", [0.15, 0.6, 1.2, 1.8])
def test_ctrl_c_while_python_and_torch_load_is_quiet(delay: float, tmp_path: Path) -> None:
    """Before main() runs Python itself ends on the signal; from there on it is exit code 2 and one line."""
    (tmp_path / "my.txt").write_text(runs.words(), encoding="utf-8")
    ready = "import sys; from chargpt.cli import main; print('ready', flush=True); main()"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", ready, "train", "my.txt", *TINY, "--set", "max_steps=100000"],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    one_error(err)
    assert not list(tmp_path.glob("runs/my/.step-*"))


def test_a_reader_that_goes_away_is_no_error(trained: Path) -> None:
    process = start(trained, "sample", "runs/my", "--stream", "--max-new-tokens", "3000")
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    process.wait(60)
    assert process.stderr is not None
    assert (process.returncode, process.stderr.read()) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_error(trained: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(trained, "sample", "runs/my", "--max-new-tokens", "10", stdout=full.fileno())
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "No space left on device" in one_error(err)
