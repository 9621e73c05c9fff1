"""The training loop: a state, a step that moves it, and a checkpoint that holds all of it.

The one idea to know: training is a function of its state alone. Evaluation, logging and saving read the state and
touch none of its random streams, so a run that was killed and resumed ends with the same bits as one that was not.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import time
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chargpt import checkpoint
from chargpt.config import (
    EvaluationConfig,
    TrackingConfig,
    differences,
)
from chargpt.console import Interrupts, Progress, say
from chargpt.data import require_size, write_splits
from chargpt.errors import CheckpointError, RunInterruptedError, TrainingError
from chargpt.evaluation import PROTOCOLS, full_loss
from chargpt.models import Model
from chargpt.planner import require_memory
from chargpt.runtime import Runtime, available_memory, resolve_runtime
from chargpt.tracking import Point, Tracker, open_tracker
from chargpt.training.optim import set_learning_rate
from chargpt.training.probe import estimate, memory_errors
from chargpt.training.results import describe, finish, write_curve
from chargpt.training.state import Run, State, load_state_tensors, new_state, state_tensors
from chargpt.training.steps import current_learning_rate_scale, overfits, patience_lost, spent, training_step


def train(
    run: Run, evaluation: EvaluationConfig, tracking: TrackingConfig, protocols: Sequence[str] = PROTOCOLS
) -> dict[str, Any]:
    """Train until the budget or the patience is spent, going on from the folder's last checkpoint if there is one.

    The best checkpoint is scored by each of `protocols`, of which `full` must be one. Leaves in `run.folder`: best/ and
    last/ (checkpoints), config.yaml, curve.csv, sample.txt and metrics.json, which is also what it returns.
    Raises TrainingError (folder in use or finished, loss not finite, too little memory), CheckpointError (the last
    checkpoint is damaged, or of another config), RunInterruptedError (SIGINT or SIGTERM, with everything saved),
    CorpusError (too few tokens).
    """
    require_size(run.splits, run.config.model.block_size)
    run.folder.mkdir(parents=True, exist_ok=True)
    with _locked(run.folder), Interrupts() as interrupts, memory_errors(run):
        require_unfinished(run.folder)
        checkpoint.remove_unreferenced(run.folder)
        runtime = resolve_runtime(run.config)
        require_memory(run.config, run.splits.tokenizer.vocab_size, available_memory(runtime.device))
        state = new_state(run, runtime)
        if os.path.lexists(run.folder / "last"):  # a link that leads nowhere is damage, not a new run
            _resume(state, run, runtime)
            say(f"going on from step {state.step} in {run.folder}")
        else:  # so that the run can be evaluated by itself
            write_splits(run.folder / "data", run.splits)
        for line in (*runtime.reasons, estimate(state, run, runtime)):
            say(line)
        if run.teachers:
            say(f"learning what {', '.join(map(str, run.teachers))} predict" + " together" * (len(run.teachers) > 1))
        with interrupts.deferred():  # so that no run is left open in the store
            tracker = open_tracker(tracking, describe(run, runtime), state.run_id)
        state.run_id = tracker.run_id
        try:
            _loop(state, run, runtime, tracker, interrupts)
            say(f"scoring the best model on all {len(run.splits.val):,} validation tokens")
            return finish(state, run, runtime, evaluation, tracker, protocols)
        except (KeyboardInterrupt, RunInterruptedError):
            tracker.finish("KILLED")
            raise
        except BaseException:
            tracker.finish("FAILED")
            raise


def require_unfinished(folder: Path) -> None:
    """Raise TrainingError when the folder holds a finished run."""
    if (folder / "metrics.json").exists():
        raise TrainingError(f"{folder} holds a finished run; choose another folder, or delete it to train again")


def _loop(state: State, run: Run, runtime: Runtime, tracker: Tracker, interrupts: Interrupts) -> None:
    """Steps until budget or patience is spent, with points of the curve, evaluations and checkpoints where due."""
    config = run.config
    model = typing.cast(Model, torch.compile(state.model)) if runtime.compile else state.model
    state.model.train()
    with interrupts.deferred(), Progress(config, state.step, state.seconds) as progress:
        if state.history:
            _save(state, run, runtime, tracker)  # what a kill may have cut short: links, curve, tracking
        else:
            _evaluate_and_save(state, run, runtime, tracker, progress)
        clock = _Clock(state)
        while not (spent(state, config) or patience_lost(state, config)):
            set_learning_rate(state.optimizers, current_learning_rate_scale(state, config))
            loss, norm = training_step(model, state.optimizers, state.batches, config, runtime, state.teacher)
            if state.average is not None:
                state.average.update_parameters(state.model)
            state.losses.append(loss)
            state.step += 1
            clock.tick()
            evaluate = state.step % config.eval_interval == 0 or spent(state, config)
            if evaluate or state.step % config.log_interval == 0:
                mean_loss = torch.stack(state.losses).mean().item()  # waits for the GPU, so that the clock is true
                clock.tick()
                speed = _record(state, run, mean_loss, norm.item())
                progress.update(state.step, state.seconds, mean_loss, speed)
            interrupted = interrupts.requested  # read once: a signal may come at any moment
            if evaluate:
                _evaluate_and_save(state, run, runtime, tracker, progress)
            elif interrupted:
                _save(state, run, runtime, tracker)
            if interrupted:
                break
            if evaluate:
                clock.restart()
    if interrupts.requested:
        raise RunInterruptedError(
            f"stopped at step {state.step} by {interrupts.requested}; everything is saved in {run.folder}, "
            f"and the same command goes on from there"
        )
    if patience_lost(state, config):
        assert state.best is not None
        say(
            f"stopping at step {state.step}: no lower validation loss in {config.patience} evaluations; "
            f"the model of step {state.best[0]} is the result"
        )


def _record(state: State, run: Run, loss: float, norm: float) -> float:
    """Add a point to the curve; tokens per second since the last one. Raises TrainingError unless all is finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(f"the training loss became {loss} (gradient norm {norm})", state, run)
    speed = len(state.losses) * run.config.tokens_per_step / (state.seconds - state.seconds_logged)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": norm,
        "train/learning_rate": state.optimizers[0].param_groups[0]["lr"],
        "train/tokens": float(state.step * run.config.tokens_per_step),
        "train/seconds": state.seconds,
        "perf/tokens_per_second": speed,
    }
    state.history.append(Point(state.step, time.time(), metrics))
    state.losses.clear()
    state.seconds_logged = state.seconds
    return speed


def _evaluate_and_save(state: State, run: Run, runtime: Runtime, tracker: Tracker, progress: Progress) -> None:
    with runtime.autocast():
        scored = run.config.eval_tokens
        part = run.splits.val_with_context[: None if scored is None else 1 + scored]
        loss = full_loss(state.delivered, part, runtime.device)
    if not math.isfinite(loss):
        raise _not_finite(f"the validation loss became {loss}", state, run)
    tokens = float(state.step * run.config.tokens_per_step)
    # A chart of the loss takes a metric for its x axis only from the same steps.
    metrics = {"val/loss": loss, "val/tokens": tokens, "val/seconds": state.seconds}
    state.history.append(Point(state.step, time.time(), metrics))
    if state.best is None or loss < state.best[1]:
        state.best = (state.step, loss)
    progress.report(state.step, state.seconds, loss)
    if overfits(state.history):
        say(
            f"overfitting: since step {state.best[0]} the validation loss rises from {state.best[1]:.4f} while the "
            f"training loss falls; what helps: more text, a higher model.dropout, a shorter run, or a smaller model"
        )
    _save(state, run, runtime, tracker)


def _not_finite(what: str, state: State, run: Run) -> TrainingError:
    return TrainingError(
        f"{what} by step {state.step}; the last good checkpoint is {(run.folder / 'last').resolve()}. "
        f"Lower the learning rate or set grad_clip, and train in another folder"
    )


def _save(state: State, run: Run, runtime: Runtime, tracker: Tracker) -> None:
    """A checkpoint of everything, then what the tracker does not have yet: it never runs ahead of the disk.

    Raises TrainingError for weights that are not finite: the last checkpoint is always a good one.
    """
    if not all(parameter.isfinite().all() for parameter in state.model.parameters()):
        raise _not_finite("weights became infinite or not a number", state, run)
    name = f"step-{state.step:06d}"
    if not (run.folder / name).exists():  # the step a run was resumed at is saved already
        checkpoint.save_checkpoint(
            run.folder / name,
            state.delivered,
            run.splits.tokenizer,
            summary={
                "variant": run.variant,
                "seed": run.seed,
                "step": state.step,
                "corpus": run.corpus,
                "batch_size": run.config.batch_size,
                "data": run.splits.fingerprint,
            },
            state=state_tensors(state),
            training={
                "identity": run.identity(runtime),
                "step": state.step,
                "seconds": state.seconds,
                "seconds_logged": state.seconds_logged,
                "history": [dataclasses.astuple(point) for point in state.history],
                "best": state.best,
                "run_id": state.run_id,
            },
        )
    checkpoint.point_to(run.folder, "last", name)
    if state.best is not None and state.best[0] == state.step:
        checkpoint.point_to(run.folder, "best", name)
    checkpoint.remove_unreferenced(run.folder)
    write_curve(state.history, run.config.tokens_per_step, run.folder / "curve.csv")
    tracker.log(state.history)


def _resume(state: State, run: Run, runtime: Runtime) -> None:
    """Take over the last checkpoint. Raises CheckpointError when it is damaged or of another config."""
    last = run.folder / "last"
    weights, tensors, training = checkpoint.load_state(last)
    with checkpoint.damage(last):
        changed = differences(training["identity"], run.identity(runtime))
        if changed:
            raise CheckpointError(
                f"{run.folder} holds a run under another config, which cannot go on under this one; train in another "
                f"folder, or set back what changed:\n  " + "\n  ".join(changed)
            )
        load_state_tensors(state, weights, tensors)
        if state_tensors(state).keys() != tensors.keys():
            raise CheckpointError(f"{last} lacks a part of the state, or has one too many; use another checkpoint")
        state.step, state.seconds, state.run_id = training["step"], training["seconds"], training["run_id"]
        state.seconds_logged = training["seconds_logged"]
        state.history = [Point(*point) for point in training["history"]]
        state.best = None if training["best"] is None else tuple(training["best"])


class _Clock:
    """Adds the time since the last tick to `state.seconds`; a restart leaves out evaluation and saving."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.restart()

    def restart(self) -> None:
        self.last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self.last
        self.last = now


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises TrainingError when another one trains in it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {folder}; wait for it, stop it, or choose another folder"
            ) from None
        yield
