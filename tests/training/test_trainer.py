"""The training loop: what it computes, what it refuses, and how it stops. Exact resume is in test_resume.py."""

import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import runs
from chargpt import experiment, training
from chargpt.checkpoint import load_model, load_state
from chargpt.config import TrackingConfig, TrainConfig, override
from chargpt.console import Console, duration
from chargpt.data import Tokens, load_splits, write_splits
from chargpt.errors import CheckpointError, ConfigError, CorpusError, RunInterruptedError, TrainingError
from chargpt.evaluation import full_loss
from chargpt.models import Model, build_model
from chargpt.runtime import resolve_runtime
from chargpt.tracking import Timing, read_timing
from chargpt.training import Ended, Evaluated, Event, Point, Saved, Saving, Started, Stepped, Trainer, trainer
from chargpt.training.memory import require_memory, required_memory
from chargpt.training.optim import build_optimizers
from chargpt.training.state import state_tensors

DROPOUT_EMA = override(runs.TRANSFORMER, ["ema_decay=0.9"])


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> runs.FakeTracker:
    fake = runs.FakeTracker()
    monkeypatch.setattr(experiment, "open_tracker", lambda *_: fake)
    return fake


# --------------------------------------------------------------------------------------- evaluation changes no training


@pytest.mark.parametrize("config", [runs.BIGRAM, DROPOUT_EMA], ids=["bigram", "transformer"])
def test_evaluating_or_logging_more_often_leaves_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    states = []
    for number, intervals in enumerate([(1, 1), (7, 2), (1000, 1000)]):
        folder = tmp_path / str(number)
        runs.train(folder, dataclasses.replace(config, eval_interval=intervals[0], log_interval=intervals[1]))
        states.append([(folder / "last" / f"{name}.safetensors").read_bytes() for name in ("model", "state")])
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("case", runs.CASES)
def test_the_estimate_leaves_the_state_as_it_was(case: str, tmp_path: Path) -> None:
    made = Trainer(runs.make_run(tmp_path, runs.CASES[case]))
    state = made.state
    before = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
    weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    expected = training.estimate(made)
    assert expected.parameters == sum(parameter.numel() for parameter in state.model.parameters())
    assert expected.memory > 4 * expected.parameters
    assert 0 < expected.seconds < 60
    after = state_tensors(state)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert state.step == 0


def test_training_prints_each_choice_the_estimate_and_a_line_for_each_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train(tmp_path / "run")
    out, err = capsys.readouterr()
    assert out == ""
    for start in ("device cpu: ", "precision fp32: ", "compile off: ", "backend torch: ", "361 parameters, about "):
        assert sum(line.startswith(start) for line in err.splitlines()) == 1, start
    assert [int(step) for step in re.findall(r"^step +(\d+)  val \d", err, re.M)] == [0, 6, 12, 18, 20]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_second_trainer_on_the_same_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reply: Any = multiprocessing.get_context("forkserver").Queue()

    def during_training(number: int, what: str) -> None:
        if what == "step" and reply.empty() and not tried:
            tried.append(True)
            process = multiprocessing.get_context("forkserver").Process(target=_try_to_train, args=(folder, reply))
            process.start()
            process.join(60)

    tried: list[bool] = []
    with runs.Moments(folder, during_training):
        runs.train(folder)
    assert "another process is training in" in reply.get(timeout=10)
    runs.train(tmp_path / "alone")
    assert runs.result(folder) == runs.result(tmp_path / "alone")


def _try_to_train(folder: Path, reply: Any) -> None:
    try:
        runs.train(folder)
    except TrainingError as error:
        reply.put(str(error))


def interrupted(folder: Path, config: TrainConfig = runs.BIGRAM) -> None:
    with runs.signals_at(folder, {9: [signal.SIGINT]}), pytest.raises(RunInterruptedError):
        runs.train(folder, config)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"config": override(runs.BIGRAM, ["max_steps=30"])}, ["max_steps: 20 → 30"]),
        (
            {"config": override(runs.BIGRAM, ["optimizer.learning_rate=0.02", "ema_decay=0.5"])},
            ["ema_decay: None → 0.5", "optimizer.learning_rate: 0.01 → 0.02"],
        ),
        ({"config": override(runs.TRANSFORMER, ["model.n_layer=2"])}, ["model.n_layer: (not set) → 2"]),
        ({"seed": 2}, ["seed: 1 → 2"]),
        ({"text": runs.words(seed=5)}, ["data: "]),
    ],
    ids=["steps", "two knobs", "another model", "seed", "another text"],
)
def test_going_on_under_another_config_is_refused_with_the_difference(
    changes: dict[str, Any], difference: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    interrupted(folder)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="under another config") as refusal:
        runs.train(folder, **changes)
    lines = str(refusal.value).splitlines()[1:]
    for expected in difference:
        assert any(line.strip().startswith(expected) for line in lines), lines
    if "config" not in changes or "model" not in difference[0]:
        assert len(lines) == len(difference)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    runs.train(folder)  # and the old config goes on


def test_a_finished_run_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.train(folder)
    finished = runs.result(folder)
    with pytest.raises(TrainingError, match="holds a finished run"):
        runs.train(folder)
    assert runs.result(folder) == finished


def test_a_run_stopped_before_its_first_checkpoint_can_be_started_on_another_text(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", runs.words(seed=5)

    def at_first_checkpoint(number: int, what: str) -> None:
        if what == "os.rename" and not (folder / "last").exists() and (folder / "config.yaml").exists():
            raise KeyboardInterrupt

    with runs.Moments(folder, at_first_checkpoint), pytest.raises(KeyboardInterrupt):
        runs.train(folder)
    assert not (folder / "last").exists()
    runs.train(folder, text=other)
    runs.train(tmp_path / "fresh", text=other)
    assert runs.result(folder) == runs.result(tmp_path / "fresh")


def test_a_text_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="too few for block_size 8"):
        runs.train(tmp_path / "run", text=runs.words(70))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "val"])
def test_ids_that_the_tokenizer_does_not_have_are_one_sentence(part: str, tmp_path: Path) -> None:
    """Of shards that were altered: opening them reads no tokens."""
    splits = runs.splits_of(runs.words())
    write_splits(tmp_path / "splits", splits)
    [shard] = (tmp_path / "splits").glob(f"{part}-*.npy")
    np.save(shard, np.full_like(np.load(shard), 200))
    run = dataclasses.replace(runs.make_run(tmp_path / "run"), splits=load_splits(tmp_path / "splits"))
    with pytest.raises(CorpusError, match=f"token id 200, and .* from 0 to {splits.tokenizer.vocab_size - 1}"):
        experiment.train(run, runs.EVALUATION, TrackingConfig(enabled=False))


@pytest.mark.parametrize("name", ["device", "backend"])
def test_what_this_machine_lacks_is_refused_before_training(name: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="cuda"):
        runs.train(tmp_path / "run", override(runs.BIGRAM, [f"{name}=cuda"]))


def test_a_last_link_that_leads_nowhere_is_an_error_not_a_new_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(folder)
    (folder / "last").unlink()
    (folder / "last").symlink_to("step-000099")
    with pytest.raises(CheckpointError, match="last holds no checkpoint"):
        runs.train(folder)


def test_a_run_copied_without_its_links_goes_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    os.system(f"cp -rL '{tmp_path / 'run'}' '{tmp_path / 'copy'}'")
    assert not (tmp_path / "copy" / "last").is_symlink()
    runs.train(tmp_path / "run")
    runs.train(tmp_path / "copy")
    assert runs.result(tmp_path / "copy") == runs.result(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------- losses that break


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (override(runs.TRANSFORMER, ["optimizer.learning_rate=1e30", "grad_clip=null"]), "loss became"),
        (override(runs.TRANSFORMER, ["optimizer.learning_rate=1e30", "eval_interval=1000"]), "loss became"),
        (override(runs.BIGRAM, ["optimizer.learning_rate=3e38", "eval_interval=1", "log_interval=1000"]), "became"),
    ],
    ids=["validation or training", "training", "weights"],
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    config: TrainConfig, cause: str, tmp_path: Path, tracker: runs.FakeTracker
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=cause) as stop:
        runs.train(folder, config)
    assert tracker.finished == ["FAILED"]
    match = re.search(r"the last good checkpoint is (\S+)\. Lower", str(stop.value))
    assert match
    model, _ = load_model(Path(match[1]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    load_state(Path(match[1]))
    assert not (folder / "metrics.json").exists()


def test_ctrl_c_never_saves_weights_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after which the signal is seen may be the one that broke the weights, with its loss still finite."""
    whole_step = trainer.training_step

    def breaking_step(model: nn.Module, *arguments: Any) -> Any:
        reached = whole_step(model, *arguments)
        with torch.no_grad():
            next(model.parameters())[0, 0] = math.inf
        os.kill(os.getpid(), signal.SIGINT)
        return reached

    monkeypatch.setattr(trainer, "training_step", breaking_step)
    with pytest.raises(TrainingError, match="weights became infinite"):
        runs.train(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in runs.weights(tmp_path / "run").values())


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("case", runs.CASES)
def test_a_signal_saves_tells_the_tracker_and_the_run_goes_on_bitwise(
    case: str, name: str, tmp_path: Path, tracker: runs.FakeTracker
) -> None:
    config = runs.CASES[case]
    runs.train(tmp_path / "whole", config)
    tracker.finished.clear()
    folder = tmp_path / "run"
    # step 3 is before the first point of the curve, step 13 between a checkpoint and the next point
    for step, count in ((3, 3), (13, 10)):
        with runs.signals_at(folder, {count: [getattr(signal, name)]}), pytest.raises(RunInterruptedError) as stop:
            runs.train(folder, config)
        assert f"stopped at step {step} by {'Ctrl-C' if name == 'SIGINT' else name};" in str(stop.value)
        assert load_state(folder / "last")[2]["step"] == step
    assert tracker.finished == ["KILLED", "KILLED"]
    runs.train(folder, config)
    assert tracker.finished[2:] == ["FINISHED"]
    assert runs.result(folder) == runs.result(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- when to stop, memory


def test_a_run_that_overfits_stops_at_patience_warns_once_and_delivers_its_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.CASES["transformer-patience-part"]
    metrics = runs.train(tmp_path / "run", config)
    err = capsys.readouterr().err
    history = runs.curve(tmp_path / "run" / "last")
    losses = [(step, point["val/loss"]) for step, point in history if "val/loss" in point]
    for step, metrics_of_step in history:
        for name in {"train/tokens", "val/tokens"} & metrics_of_step.keys():
            assert metrics_of_step[name] == step * config.tokens_per_step
    assert {name for _, point in history for name in point} >= {"train/tokens", "val/tokens"}
    best = min(losses, key=lambda pair: pair[1])[0]
    assert config.patience is not None
    assert metrics["best_step"] == best < metrics["steps"] < config.max_steps
    assert [step for step, _ in losses if step > best] == [best + 2 * i for i in range(1, config.patience + 1)]
    assert err.count(f"stopping at step {metrics['steps']}: no lower validation loss in {config.patience} ev") == 1
    assert (tmp_path / "run" / "best").resolve().name == f"step-{best:06d}"


def point(step: int, train: float | None = None, val: float | None = None) -> Point:
    metrics = {"train/loss": train, "val/loss": val}
    return Point(step, {name: value for name, value in metrics.items() if value is not None})


@pytest.mark.parametrize(
    ("val", "train", "warned"),
    [
        ([4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4], [3.5, 2.5, 1.5, 1.4, 1.3, 1.2], [5]),
        ([4.0, 3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.1, 2.2], [3.5, 2.5, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0], [8]),
        ([4.0, 3.0, 2.0, 2.1, 2.05, 2.3, 2.4], [3.5, 2.5, 1.5, 1.4, 1.3, 1.2], []),  # up and down
        ([4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4], [3.5, 2.5, 2.6, 2.7, 2.8, 2.9], []),  # both rise: it diverges
        ([4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4], [3.5, 2.5, 2.6, 2.55, 2.55, 2.5], []),  # not below where it was then
        ([4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4], [3.5, 2.5, 2.4, 2.45, 2.45, 2.5], [5]),
        ([4.0, 3.0, 2.0, 1.9, 1.8], [3.5, 2.5, 1.5, 1.4], []),
        ([4.0], [], []),
    ],
)
def test_overfitting_is_found_once_where_validation_rises_and_training_falls(
    val: list[float], train: list[float], warned: list[int]
) -> None:
    history = [point(0, val=val[0])]
    found = []
    for i, loss in enumerate(val[1:], start=1):
        history += [point(2 * i - 1, train=train[i - 1] + 0.01), point(2 * i, train[i - 1] - 0.01, loss)]
        if training.overfits(history):
            found.append(i)
    assert found == warned
    assert not training.overfits(history[:1])


def test_overfitting_compares_means_of_training_losses_however_many_there_are() -> None:
    history = [point(0, val=4.0)]
    for i, (val, train, count) in enumerate([(2.0, 1.5, 1), (2.1, 1.4, 2), (2.2, 1.3, 3), (2.3, 1.2, 4)]):
        history += [point(10 * i + n, train=train) for n in range(1, count + 1)]
        history.append(point(10 * i + 5, val=val))
    assert training.overfits(history)


def test_evaluations_while_training_score_the_first_tokens_and_the_result_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def scored(model: Model, tokens: Tokens, device: torch.device) -> float:
        lengths.append(len(tokens))
        return full_loss(model, tokens, device)

    monkeypatch.setattr(trainer, "full_loss", scored)
    run = runs.make_run(tmp_path / "run", override(runs.BIGRAM, ["eval_tokens=50"]))
    metrics = experiment.train(run, runs.EVALUATION, TrackingConfig(enabled=False))
    assert set(lengths) == {51}
    model, _ = load_model(tmp_path / "run" / "best")
    assert metrics["val_full"] == pytest.approx(full_loss(model, run.splits.val_with_context), rel=1e-5)
    assert metrics["val_full"] != pytest.approx(full_loss(model, run.splits.val_with_context[:51]), rel=1e-3)


def allocation_error() -> RuntimeError:
    """What torch raises on a CPU for more memory than there is."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), allocation_error()])
def test_running_out_of_memory_says_what_to_lower_and_keeps_the_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: runs.FakeTracker
) -> None:
    steps = iter(range(100))
    whole_step = trainer.training_step

    def step(*arguments: Any) -> Any:
        if next(steps) == 8:
            raise error
        return whole_step(*arguments)

    monkeypatch.setattr(trainer, "training_step", step)
    with pytest.raises(
        TrainingError, match=r"memory ran out with batch_size 4 and 19 symbols; lower batch_size, .*keeps"
    ):
        runs.train(tmp_path / "run")
    assert tracker.finished == ["FAILED"]
    assert load_state(tmp_path / "run" / "last")[2]["step"] == 6


def test_other_errors_of_torch_stay_errors_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainer, "training_step", step)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        runs.train(tmp_path / "run")


def test_what_cannot_fit_is_refused_before_any_weight_is_made(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"training would take about .* MiB of memory"):
        runs.train(tmp_path / "run", override(runs.TRANSFORMER, ["model.n_embd=4000000"]))


def test_a_wider_mlp_needs_more_memory_than_a_narrower_one() -> None:
    """Beyond its weights: a hidden layer is kept for the backward pass, and SwiGLU keeps three."""
    needed = []
    for mlp in ("none", "relu", "gelu", "relu2", "swiglu"):
        config = override(runs.TRANSFORMER, [f"model.mlp={mlp}", "batch_size=4096"])
        needed.append(required_memory(config, 65))
    assert needed[0] < 0.9 * needed[1]
    assert needed[1] == needed[2] == needed[3] < 0.95 * needed[4]


def test_what_is_computed_again_needs_no_memory() -> None:
    """One block's worth, and for each other block its inputs."""
    long = ["model.n_layer=20", "model.n_embd=64", "batch_size=4096"]
    kept, again = (
        required_memory(override(runs.TRANSFORMER, [*long, f"recompute={on}"]), 65) for on in ("false", "true")
    )
    assert again < 0.3 * kept
    one = [
        required_memory(override(runs.TRANSFORMER, ["model.n_layer=1", f"recompute={on}"]), 65)
        for on in ("false", "true")
    ]
    assert one[0] == one[1]


def test_a_run_that_computes_again_has_the_same_bits(tmp_path: Path) -> None:
    states = []
    for recompute in ("false", "true"):
        folder = tmp_path / recompute
        runs.train(folder, override(DROPOUT_EMA, [f"recompute={recompute}"]))
        states.append([(folder / "last" / f"{name}.safetensors").read_bytes() for name in ("model", "state")])
    assert states[0] == states[1]
    made = Trainer(
        runs.make_run(tmp_path / "false", override(DROPOUT_EMA, ["recompute=true"]))
    )  # and resumes the other
    assert made.state.step == DROPOUT_EMA.max_steps


def test_memory_that_just_suffices_suffices() -> None:
    needed = required_memory(runs.TRANSFORMER, 65)
    require_memory(runs.TRANSFORMER, 65, needed)
    require_memory(runs.TRANSFORMER, 65, None)
    free = needed - 1
    told = f"about {needed / 2**20:,.0f} MiB of memory, and {free / 2**20:,.0f} MiB are free; lower batch_size"
    with pytest.raises(TrainingError, match=re.escape(told)):
        require_memory(runs.TRANSFORMER, 65, free)


def test_measuring_the_speed_leaves_no_trace(tmp_path: Path) -> None:
    run = runs.make_run(tmp_path / "run", runs.TRANSFORMER)
    before = torch.get_rng_state()
    speed = training.measure_speed(run, seconds=0.05)
    assert torch.equal(torch.get_rng_state(), before)
    assert not run.folder.exists()
    assert 100 < speed.training < speed.evaluation * 10


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupted(tmp_path / "run")
    runs.train(tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_stops_at_once_and_the_run_goes_on(tmp_path: Path, tracker: runs.FakeTracker) -> None:
    folder = tmp_path / "run"
    with runs.signals_at(folder, {9: [signal.SIGINT, signal.SIGINT]}), pytest.raises(KeyboardInterrupt):
        runs.train(folder)
    assert load_state(folder / "last")[2]["step"] == 6  # the checkpoint before it
    assert tracker.finished == ["KILLED"]
    runs.train(folder)
    runs.train(tmp_path / "whole")
    assert runs.result(folder) == runs.result(tmp_path / "whole")


def test_a_signal_in_the_last_step_stops_before_the_final_evaluation(tmp_path: Path, tracker: runs.FakeTracker) -> None:
    folder = tmp_path / "run"
    with runs.signals_at(folder, {20: [signal.SIGTERM]}), pytest.raises(RunInterruptedError, match="step 20"):
        runs.train(folder)
    assert tracker.finished == ["KILLED"]
    runs.train(folder)
    runs.train(tmp_path / "whole")
    assert runs.result(folder) == runs.result(tmp_path / "whole")


@pytest.mark.parametrize(
    "where",
    ["experiment.evaluate", "experiment.generate_text", "experiment.estimate", "training.state.build_model"],
)
def test_ctrl_c_outside_the_steps_stops_at_once_and_the_same_command_finishes(
    where: str, tmp_path: Path, tracker: runs.FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:

        def stop(*_: Any, **__: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal did not stop it")

        patched.setattr(f"chargpt.{where}", stop)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            runs.train(folder)
    assert tracker.finished == (["KILLED"] if where in ("experiment.evaluate", "experiment.generate_text") else [])
    assert not (folder / "metrics.json").exists()
    runs.train(folder)
    runs.train(tmp_path / "whole")
    assert runs.result(folder) == runs.result(tmp_path / "whole")


def test_a_signal_while_the_tracker_opens_leaves_no_run_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = runs.FakeTracker()

    def slow_open(*_: Any) -> runs.FakeTracker:
        signal.raise_signal(signal.SIGINT)
        return fake

    monkeypatch.setattr(experiment, "open_tracker", slow_open)
    with pytest.raises(RunInterruptedError):
        runs.train(tmp_path / "run")
    assert fake.finished == ["KILLED"]


# -------------------------------------------------------------------------------------------- the mathematics of a step


class Given:
    """A batch source that hands out given batches."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.batches = iter(batches)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        return next(self.batches)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


def double_model_and_batch(rows: int = 6) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    config = override(runs.TRANSFORMER, ["model.dropout=0"]).model
    model = build_model(config, 11, seed=1, backend="torch").double()
    idx, targets = torch.randint(11, (2, rows, 8), generator=torch.Generator().manual_seed(2))
    return model, idx, targets


def test_gradient_accumulation_equals_the_bigger_batch() -> None:
    gradients, losses = [], []
    for parts in (1, 2, 3, 6):
        model, idx, targets = double_model_and_batch()
        config = dataclasses.replace(runs.TRANSFORMER, gradient_accumulation_steps=parts, grad_clip=None)
        source = Given(list(zip(idx.chunk(parts), targets.chunk(parts), strict=True)))
        before = nn.utils.parameters_to_vector(model.parameters()).clone()
        loss, norm = training.training_step(
            model, [torch.optim.SGD(model.parameters(), lr=1.0)], source, config, resolve_runtime(config)
        )
        gradient = before - nn.utils.parameters_to_vector(model.parameters())
        torch.testing.assert_close(gradient.norm(), norm)
        gradients.append(gradient)
        losses.append(loss)
    for gradient, loss in zip(gradients, losses, strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("clip", "clipped"), [(0.01, True), (1e6, False)])
def test_clipping_bounds_the_whole_gradient_and_reports_its_true_norm(clip: float, clipped: bool) -> None:
    moved = {}
    for grad_clip in (None, clip):
        model, idx, targets = double_model_and_batch()
        config = dataclasses.replace(runs.TRANSFORMER, grad_clip=grad_clip)
        before = nn.utils.parameters_to_vector(model.parameters()).clone()
        _, norm = training.training_step(
            model,
            [torch.optim.SGD(model.parameters(), lr=1.0)],
            Given([(idx, targets)]),
            config,
            resolve_runtime(config),
        )
        moved[grad_clip] = (before - nn.utils.parameters_to_vector(model.parameters()), norm)
    (whole, true_norm), (bounded, reported) = moved[None], moved[clip]
    torch.testing.assert_close(reported, true_norm)
    expected = whole * (clip / true_norm) if clipped else whole
    torch.testing.assert_close(bounded, expected, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("excess", [-1e-3, 1e-3, math.nan])
def test_gradients_within_the_limit_are_not_walked_over(excess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a norm that is no number reaches every gradient."""
    model, idx, targets = double_model_and_batch()
    clipped = []
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda parameters, limit, norm: clipped.append(norm))
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda gradients: torch.tensor(1.0 + excess))
    config = dataclasses.replace(runs.TRANSFORMER, grad_clip=1.0)
    training.training_step(model, [], Given([(idx, targets)]), config, resolve_runtime(config))
    assert len(clipped) == (not excess < 0)


def test_a_step_leaves_no_gradient_behind() -> None:
    model, idx, targets = double_model_and_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    training.training_step(
        model, [optimizer], Given([(idx, targets)]), runs.TRANSFORMER, resolve_runtime(runs.TRANSFORMER)
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def nanogpt_rate(step: int, peak: float, warmup: int, decay_steps: int, floor: float) -> float:
    """nanoGPT's `get_lr`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > decay_steps:
        return floor
    ratio = (step - warmup) / (decay_steps - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - floor)


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_the_schedule_reaches_every_optimizer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    whole_step = trainer.training_step

    def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], *arguments: Any) -> Any:
        rates = [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers]
        assert all(len(rate) == 1 for rate in rates)
        seen.append((rates[0].pop(), rates[1].pop()))
        return whole_step(model, optimizers, *arguments)

    monkeypatch.setattr(trainer, "training_step", step)
    config = override(
        runs.TRANSFORMER,
        ["optimizer.kind=muon", "optimizer.muon_learning_rate=0.05", f"schedule.kind={kind}", "log_interval=1"],
    )
    runs.train(tmp_path / "run", config)
    expected = {
        "cosine": [nanogpt_rate(step, 0.01, 3, 20, 0.001) for step in range(20)],
        "constant": [0.0025, 0.005, 0.0075] + [0.01] * 17,
        # stable until 60 % of what follows the warm-up, then straight to zero at step 20
        "wsd": [0.0025, 0.005, 0.0075] + [0.01 * min(1, (20 - step) / (0.4 * 17)) for step in range(3, 20)],
    }[kind]
    assert [adamw for adamw, _ in seen] == pytest.approx(expected)
    assert [muon for _, muon in seen] == pytest.approx([5 * rate for rate in expected])
    logged = [
        metrics["train/learning_rate"] for _, metrics in runs.curve(tmp_path / "run" / "last") if len(metrics) > 2
    ]
    assert logged == pytest.approx(expected)


def test_weight_decay_acts_on_matrices_and_embeddings_alone() -> None:
    """With no gradient, a decayed weight shrinks and all others stay."""
    config = override(
        runs.TRANSFORMER, ["model.bias=true", "model.value_embeddings=true", "optimizer.weight_decay=0.5"]
    )
    for kind in ("adamw", "muon"):
        model = build_model(config.model, 11, seed=1, backend="torch")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        for optimizer in build_optimizers(model, dataclasses.replace(config.optimizer, kind=kind)):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        shrunk = {name for name, parameter in model.named_parameters() if (parameter < 1).all()}
        kept = {name for name, parameter in model.named_parameters() if (parameter == 1).all()}
        assert shrunk == {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
        assert kept == {name for name, parameter in model.named_parameters() if parameter.dim() == 1}


def test_the_average_is_the_exponential_moving_average_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin: dict[str, torch.Tensor] = {}
    whole_step = trainer.training_step

    def step(model: nn.Module, *arguments: Any) -> Any:
        reached = whole_step(model, *arguments)
        for name, tensor in model.state_dict().items():
            twin[name] = 0.9 * twin[name] + 0.1 * tensor.double() if name in twin else tensor.double()
        return reached

    monkeypatch.setattr(trainer, "training_step", step)
    runs.train(tmp_path / "run", DROPOUT_EMA)
    delivered = runs.weights(tmp_path / "run")
    last = load_file(tmp_path / "run" / "last" / "state.safetensors")
    assert delivered.keys() == twin.keys()
    for name, tensor in delivered.items():
        torch.testing.assert_close(tensor.double(), twin[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensor, last[f"weights/{name}"])


# --------------------------------------------------------------------------------------------------------- what is left


def test_best_and_last_are_kept_apart(
    tmp_path: Path, tracker: runs.FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: Iterator[float] = iter([5.0, 4.0, 2.0, 3.0, 2.5])  # at steps 0, 6, 12, 18, 20
    monkeypatch.setattr(trainer, "full_loss", lambda *_: next(losses))
    folder = tmp_path / "run"
    metrics = runs.train(folder)
    assert (folder / "best").resolve().name == "step-000012"
    assert (folder / "last").resolve().name == "step-000020"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000012", "step-000020"]
    assert metrics["best_step"] == 12
    assert metrics["val_last"] == 2.5
    best = runs.weights(folder, "best")
    assert not torch.equal(best["token_table.weight"], runs.weights(folder)["token_table.weight"])
    assert tracker.model["model.safetensors"] == (folder / "best" / "model.safetensors").read_bytes()


def test_the_tracker_gets_the_whole_curve_in_order_and_the_best_model(
    tmp_path: Path, tracker: runs.FakeTracker
) -> None:
    folder = tmp_path / "run"
    interrupted(folder)
    metrics = runs.train(folder)
    for earlier, later in zip(tracker.histories, tracker.histories[1:], strict=False):
        assert later[: len(earlier)] == earlier
        assert later == sorted(later)
    assert tracker.histories[-1][-1] == 20
    assert tracker.finished == ["KILLED", "FINISHED"]
    assert tracker.model == {path.name: path.read_bytes() for path in (folder / "best").iterdir()}
    assert tracker.artifacts == ["config.yaml", "curve.csv", "sample.txt"]
    assert tracker.summary["val_full"] == metrics["val_full"]
    assert all(isinstance(value, (int, float)) for value in tracker.summary.values())


def test_metrics_and_curve_are_plausible_over_several_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in (1, 2, 8):
        with runs.signals_at(folder, {step: [signal.SIGINT]}), pytest.raises(RunInterruptedError):
            runs.train(folder)
    metrics = runs.train(folder)
    assert metrics == json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 20
    assert metrics["tokens"] == 20 * 4 * 8
    assert metrics["parameters"] == 19 * 19
    header, *rows = (folder / "curve.csv").read_text(encoding="utf-8").splitlines()
    assert header == "step,tokens,train_loss,val_loss,learning_rate"
    table = [row.split(",") for row in rows]
    assert [int(row[0]) for row in table] == [0, 4, 6, 8, 12, 16, 18, 20]
    moments = read_timing(folder / "timing.csv")
    assert list(moments) == [0, 1, 3, 4, 6, 8, 11, 12, 16, 18, 20]  # of the curve, and of each stop
    for of in (lambda moment: moment.seconds, lambda moment: moment.time):
        values = [of(moment) for moment in moments.values()]
        assert values == sorted(values)
        assert len(set(values[1:])) == 10


def test_the_tracker_gets_times_and_speeds_that_no_checkpoint_has(tmp_path: Path, tracker: runs.FakeTracker) -> None:
    folder = tmp_path / "run"
    interrupted(folder)
    runs.train(folder)
    assert [point.step for point in tracker.points] == [0, 4, 6, 6, 8, 12, 12, 16, 18, 18, 20, 20]
    seconds = [point.metrics.get("train/seconds", point.metrics.get("val/seconds")) for point in tracker.points]
    assert seconds == sorted(seconds)
    speeds = [point.metrics["perf/tokens_per_second"] for point in tracker.points if "train/loss" in point.metrics]
    assert len(speeds) == 7
    assert all(0 < speed < 1e8 for speed in speeds)
    timed = {"train/seconds", "val/seconds", "perf/tokens_per_second"}
    assert [
        (point.step, {key: value for key, value in point.metrics.items() if key not in timed})
        for point in tracker.points
    ] == runs.curve(folder / "last")
    assert tracker.tags == {"weights_sha256": runs.sha256(folder / "best" / "model.safetensors")}
    assert tracker.summary["seconds"] == pytest.approx(seconds[-1], abs=1e-3)


def test_without_its_timing_a_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(folder)
    (folder / "timing.csv").write_text("step,seconds,time\n4,not a number,3\n", encoding="utf-8")
    runs.train(folder)
    runs.train(tmp_path / "whole")
    assert runs.result(folder) == runs.result(tmp_path / "whole")


def test_two_runs_of_one_config_leave_the_same_bytes_but_for_times(tmp_path: Path) -> None:
    for name in ("first", "second"):
        runs.train(tmp_path / name, DROPOUT_EMA)
    timed = ("timing.csv", ".lock")
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file() and path.name not in timed
        }
        for name in ("first", "second")
    )
    assert len(first) == 9
    assert [path for path in first.keys() | second.keys() if first.get(path) != second.get(path)] == []


# --------------------------------------------------------------------------------------------------------------- events


def test_events_come_in_order_and_with_what_the_checkpoint_has(tmp_path: Path) -> None:
    events: list[Event] = []
    run = runs.make_run(tmp_path / "run")
    run.folder.mkdir()
    with runs.one_thread():
        Trainer(run).train([events.append])
    names = [type(event).__name__ for event in events]
    assert [(type(event), event.step) for event in events[:6]] == [
        (Started, 0),
        (Evaluated, 0),
        (Saving, 0),
        (Saved, 0),
        (Stepped, 4),
        (Stepped, 6),
    ]
    assert names.count("Evaluated") == names.count("Saved") == names.count("Saving") == 5
    assert [event.step for event in events if isinstance(event, Stepped)] == [4, 6, 8, 12, 16, 18, 20]
    assert sum(event.tokens for event in events if isinstance(event, Stepped)) == 20 * run.config.tokens_per_step
    last = events[-1]
    assert isinstance(last, Ended)
    assert (last.step, last.reason) == (20, "steps")
    saved = [event for event in events if isinstance(event, Saved)][-1]
    assert [(point.step, point.metrics) for point in saved.history] == runs.curve(run.folder / "last")


def test_a_text_of_one_symbol_trains_to_a_loss_of_nothing(tmp_path: Path) -> None:
    assert runs.train(tmp_path / "run", text="a" * 500)["val_full"] == 0.0


@pytest.mark.parametrize("case", ["transformer-muon-random-ema"])
def test_bf16_trains_close_to_fp32_and_resumes(case: str, tmp_path: Path) -> None:
    config = override(runs.CASES[case], ["precision=bf16"])
    interrupted(tmp_path / "run", config)
    metrics = runs.train(tmp_path / "run", config)
    runs.train(tmp_path / "whole", config)
    assert runs.result(tmp_path / "run") == runs.result(tmp_path / "whole")
    exact = runs.train(tmp_path / "fp32", runs.CASES[case])
    assert metrics["val_full"] == pytest.approx(exact["val_full"], rel=0.02)


def test_compiled_training_agrees_with_eager_training(tmp_path: Path) -> None:
    config = override(runs.BIGRAM, ["max_steps=3"])
    eager = runs.train(tmp_path / "eager", config)
    compiled = runs.train(tmp_path / "compiled", override(config, ["compile=always"]))
    assert compiled["val_full"] == pytest.approx(eager["val_full"], rel=1e-5)
    names = [runs.weights(tmp_path / run).keys() for run in ("eager", "compiled")]
    assert names[0] == names[1]  # no prefix of torch.compile's


# --------------------------------------------------------------------------------------------------------- the terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    timing = Timing(tmp_path)
    with Console(timing, bytes_per_token=2.0, patience=None, minutes=0.1) as console:
        console(Started(0, 10))
        console(Evaluated(0, 3.5, (0, 3.5), overfits=False))
        console.bar.mininterval = 0
        timing.seconds, timing.tokens_per_second = 6.0, 1234.5
        console(Stepped(4, 128, 2.345678))
        console.bar.refresh()
        for step in (4, 5):
            console(Evaluated(step, 2.5, (step, 2.5), overfits=False))
    shown = terminal.getvalue()
    assert "loss 2.3457, 1,234 tokens/s" in shown
    assert "40%" in shown
    assert "step      4  val 2.5000 (1.803 bits/byte)  train 2.3457  1,234 tokens/s  9 s left" in shown
    warning = "the 10 steps of this run will take about 15 s of training, not the 0.1 min that were asked for"
    assert shown.count(warning) == shown.count("asked for") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (-7.0, "0 s")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------------------ what is not the run's


def test_a_folder_that_is_deleted_while_a_run_trains_ends_it_and_does_not_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = iter(range(100))

    def delete(number: int, what: str) -> None:
        if what == "step" and next(steps) == 8:
            shutil.rmtree(folder)

    with runs.Moments(folder, delete), pytest.raises(TrainingError, match="was deleted or moved while the run trained"):
        runs.train(folder)
    assert not folder.exists()


def test_the_callers_random_stream_goes_on_as_if_nothing_was_trained(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    runs.train(tmp_path / "run", runs.TRANSFORMER)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_run_needs_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    for name in ("gettempdir", "mkdtemp", "TemporaryDirectory", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, none)
    runs.train(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").is_file()
