"""Distillation: its loss against its definition, what a student learns, and teachers that would make the loss a lie."""

import re
import signal
from pathlib import Path

import pytest
import torch

import runs
from chargpt.checkpoint import load_ensemble, load_model, read_description
from chargpt.config import override
from chargpt.errors import CheckpointError, RunInterruptedError
from chargpt.evaluation import full_loss
from chargpt.runtime import resolve_runtime
from chargpt.training import training_step
from chargpt.training.distillation import distillation_loss, load_teachers
from chargpt.training.state import new_state

TEACHER = override(runs.BIGRAM, ["max_steps=60", "optimizer.learning_rate=0.1"])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    runs.train(folder / "1", TEACHER)
    runs.train(folder / "2", override(runs.TRANSFORMER, ["max_steps=60"]), seed=2)
    return folder / "1", folder / "2"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 65), (3, 7, 2), (2, 5, 65), (2, 3, 1000)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_loss_and_its_gradient_are_those_of_the_definition(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(shape, generator=generator)).requires_grad_()
    teacher = scale * torch.randn(shape, generator=generator)
    distillation_loss(logits, teacher).backward()
    p, q = teacher.double().softmax(-1), logits.detach().double()
    log_q = q - q.logsumexp(-1, keepdim=True)
    naive = sum(-float((p[b, t] * log_q[b, t]).sum()) for b in range(shape[0]) for t in range(shape[1]))
    torch.testing.assert_close(
        distillation_loss(logits, teacher).item(), naive / (shape[0] * shape[1]), rtol=1e-5, atol=1e-6
    )
    expected = (q.softmax(-1) - p) / (shape[0] * shape[1])
    torch.testing.assert_close(logits.grad, expected.float(), rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, teacher = torch.randn(2, 2, 5, 65, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = distillation_loss(logits, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(logits.double(), teacher.double()).float())


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_step_follows_the_teachers_and_reports_the_loss_on_the_text(
    accumulated: int, teachers: tuple[Path, Path], tmp_path: Path
) -> None:
    config = override(runs.TRANSFORMER, ["model.dropout=0.0", f"gradient_accumulation_steps={accumulated}"])
    run = runs.make_run(tmp_path, config, teachers=teachers)
    state = new_state(run, resolve_runtime(config))
    teacher, _ = load_ensemble(teachers)
    objectives, losses = [], []
    position = state.batches.state_dict()
    for _ in range(accumulated):
        idx, targets = state.batches.next()
        logits, loss = state.model.logits(state.model.hidden(idx)), state.model(idx, targets)
        objectives.append(distillation_loss(logits, teacher.logits(teacher.hidden(idx))))
        losses.append(loss.item())
    expected = torch.autograd.grad(sum(objectives) / accumulated, list(state.model.parameters()))
    state.batches.load_state_dict(position)
    loss, norm = training_step(state.model, [], state.batches, config, resolve_runtime(config), state.teacher)
    torch.testing.assert_close(loss.item(), sum(losses) / accumulated)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(expected))
    for parameter, gradient in zip(state.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in state.teacher.parameters())


def test_a_student_learns_what_the_teacher_predicts_not_the_text(tmp_path: Path) -> None:
    """The teacher has learned nothing, and its student must come to the same loss, where training would go below."""
    runs.train(tmp_path / "teacher", override(runs.BIGRAM, ["max_steps=1", "optimizer.learning_rate=1e-9"]))
    config = override(TEACHER, ["max_steps=300"])
    runs.train(tmp_path / "student", config, teachers=(tmp_path / "teacher",))
    runs.train(tmp_path / "untaught", config)
    val = runs.make_run(tmp_path).splits.val_with_context
    losses = {
        name: full_loss(load_model(tmp_path / name)[0], val, torch.device("cpu"))
        for name in ("teacher", "student", "untaught")
    }
    assert losses["student"] == pytest.approx(losses["teacher"], abs=0.05)
    assert losses["untaught"] < losses["teacher"] - 0.5


def test_a_student_that_was_stopped_ends_with_the_same_bits(teachers: tuple[Path, Path], tmp_path: Path) -> None:
    runs.train(tmp_path / "whole", runs.TRANSFORMER, teachers=teachers)
    runs.train(tmp_path / "untaught", runs.TRANSFORMER)
    folder = tmp_path / "run"
    with runs.signals_at(folder, {9: [signal.SIGINT]}), pytest.raises(RunInterruptedError):
        runs.train(folder, runs.TRANSFORMER, teachers=teachers)
    with pytest.raises(CheckpointError, match=r"teacher 2: [0-9a-f]{64} → \(not set\)"):
        runs.train(folder, runs.TRANSFORMER, teachers=teachers[:1])
    runs.train(folder, runs.TRANSFORMER, teachers=teachers)
    assert runs.result(folder) == runs.result(tmp_path / "whole")
    assert runs.result(folder) != runs.result(tmp_path / "untaught")


def test_teachers_that_may_have_seen_the_validation_part_are_refused(tmp_path: Path) -> None:
    text = runs.words()
    runs.train(tmp_path / "longer", TEACHER, text=text + runs.words(500, seed=3))  # its training part reaches further
    with pytest.raises(CheckpointError, match="longer was trained on another text, another split"):
        runs.train(tmp_path / "student", runs.BIGRAM, teachers=(tmp_path / "longer",))
    assert not (tmp_path / "student" / "last").exists()


def test_every_teacher_s_data_is_checked(teachers: tuple[Path, Path], tmp_path: Path) -> None:
    runs.train(tmp_path / "longer", TEACHER, text=runs.words() + runs.words(500, seed=3))
    run = runs.make_run(tmp_path / "student")
    for order in ([teachers[0], tmp_path / "longer"], [tmp_path / "longer", teachers[0]]):
        with pytest.raises(CheckpointError, match="longer was trained on another text, another split"):
            load_teachers(order, run.splits, 8, torch.device("cpu"))


def test_teachers_that_read_less_or_do_not_exist_are_refused(teachers: tuple[Path, Path], tmp_path: Path) -> None:
    run = runs.make_run(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape("set model.block_size=8, or take other teachers")):
        load_teachers(teachers, run.splits, 9, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="does not exist"):
        load_teachers([tmp_path / "nothing"], run.splits, 8, torch.device("cpu"))


def test_the_checkpoint_says_on_which_data_it_was_trained(teachers: tuple[Path, Path], tmp_path: Path) -> None:
    splits = runs.make_run(tmp_path).splits
    assert {read_description(path / "best")["summary"]["data"] for path in teachers} == {splits.fingerprint}
