"""The training loop: a state, a step that moves it, and a checkpoint that holds all of it.

The one idea to know: training is a function of its state alone. Evaluation, logging and saving read the state and
touch none of its random streams, so a run that was killed and resumed ends with the same bits as one that was not.
torch's default generator is the dropout stream; every other stream has a generator of its own.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from chargpt import checkpoint
from chargpt.config import (
    EvaluationConfig,
    SampleConfig,
    TrackingConfig,
    TrainConfig,
    differences,
    flatten,
    require_seed,
)
from chargpt.console import Interrupts, Progress, duration, say
from chargpt.data import BatchSource, EpochBatches, RandomBatches, Splits, require_size, write_splits
from chargpt.distillation import distillation_loss, load_teachers
from chargpt.errors import CheckpointError, RunInterruptedError, TrainingError
from chargpt.evaluation import PROTOCOLS, TOKENS_PER_PASS, evaluate, full_loss
from chargpt.files import replaced_file
from chargpt.fitting import WHAT_TO_LOWER, Speed, require_memory
from chargpt.generation import generate_text
from chargpt.models import Ensemble, Model, build_model, parameter_count
from chargpt.optim import build_optimizers, learning_rate_scale, set_learning_rate
from chargpt.runtime import Runtime, available_memory, device_name, resolve_runtime
from chargpt.tracking import Dataset, Point, RunDescription, Tracker, open_tracker


@dataclass(frozen=True)
class Run:
    """What is to be trained, on what, and where it lives."""

    variant: str
    seed: int
    config: TrainConfig
    splits: Splits
    corpus: str  # a name for people
    folder: Path  # of this run alone: checkpoints, curve, metrics
    teachers: tuple[Path, ...] = ()  # runs or checkpoints whose mean prediction it learns, in place of the text's

    def __post_init__(self) -> None:
        require_seed(self.seed)

    def identity(self, runtime: Runtime) -> dict[str, Any]:
        """Everything that decides the result, as flat plain data: a checkpoint goes on only under the same."""
        chosen = {
            "device": runtime.device.type,
            "precision": runtime.precision,
            "compile": runtime.compile,
            "kernels": runtime.kernels,
        }
        given = {"seed": self.seed, "data": self.splits.fingerprint}
        return flatten(self.config) | chosen | given | self.teacher_weights

    @cached_property
    def teacher_weights(self) -> dict[str, str]:
        """The SHA-256 of each teacher's weights, as plain data; read once, since teachers may move while it trains."""
        contents = [checkpoint.read_description(checkpoint.find_checkpoint(path)) for path in self.teachers]
        return {f"teacher {n}": content["files"][checkpoint.WEIGHTS] for n, content in enumerate(contents, start=1)}


@dataclass
class State:
    """All that training changes, and the teachers, which it only reads."""

    model: Model
    optimizers: list[torch.optim.Optimizer]
    average: AveragedModel | None  # the exponential moving average of the weights
    batches: BatchSource
    teacher: Model | Ensemble | None = None
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent in them
    history: list[Point] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)  # () each, of the steps since the last point of the curve
    seconds_logged: float = 0.0  # `seconds` at that point
    best: tuple[int, float] | None = None  # step and validation loss
    run_id: str | None = None

    @property
    def delivered(self) -> Model:
        """The model to evaluate, save and use: the averaged one where there is one."""
        return typing.cast(Model, self.average.module) if self.average is not None else self.model


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
    with _locked(run.folder), Interrupts() as interrupts, _memory_errors(run):
        require_unfinished(run.folder)
        checkpoint.remove_unreferenced(run.folder)
        runtime = resolve_runtime(run.config)
        require_memory(run.config, run.splits.tokenizer.vocab_size, available_memory(runtime.device))
        state = _new_state(run, runtime)
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
            tracker = open_tracker(tracking, _describe(run, runtime), state.run_id)
        state.run_id = tracker.run_id
        try:
            _loop(state, run, runtime, tracker, interrupts)
            say(f"scoring the best model on all {len(run.splits.val):,} validation tokens")
            return _finish(state, run, runtime, evaluation, tracker, protocols)
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


# --------------------------------------------------------------------------------------------------------------- steps


def training_step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: BatchSource,
    config: TrainConfig,
    runtime: Runtime,
    teacher: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over `gradient_accumulation_steps` batches: mean loss and gradient norm, both ().

    With a teacher the gradient is that of `distillation_loss`; the loss returned is still the one on the text.
    """
    losses = []
    for _ in range(config.gradient_accumulation_steps):
        idx, targets = batches.next()
        losses.append(_backward(model, idx, targets, config, runtime, teacher))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if config.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean(), norm


def _backward(
    model: nn.Module,
    idx: torch.Tensor,
    targets: torch.Tensor,
    config: TrainConfig,
    runtime: Runtime,
    teacher: nn.Module | None = None,
) -> torch.Tensor:
    """Loss () of one batch on the text, with the batch's share of the gradient added to the parameters."""
    idx, targets = (tensor.to(runtime.device, non_blocking=True) for tensor in (idx, targets))
    with runtime.autocast():
        logits, loss = model(idx, targets)
        objective = loss
        if teacher is not None:
            with torch.no_grad():
                teacher_logits, _ = teacher(idx)
            objective = distillation_loss(logits, teacher_logits)
    (objective / config.gradient_accumulation_steps).backward()
    return loss.detach()  # type: ignore[no-any-return]


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
        while not (_spent(state, config) or _patience_lost(state, config)):
            set_learning_rate(state.optimizers, _learning_rate_scale(state, config))
            loss, norm = training_step(model, state.optimizers, state.batches, config, runtime, state.teacher)
            if state.average is not None:
                state.average.update_parameters(state.model)
            state.losses.append(loss)
            state.step += 1
            clock.tick()
            evaluate = state.step % config.eval_interval == 0 or _spent(state, config)
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
    if _patience_lost(state, config):
        assert state.best is not None
        say(
            f"stopping at step {state.step}: no lower validation loss in {config.patience} evaluations; "
            f"the model of step {state.best[0]} is the result"
        )


def _spent(state: State, config: TrainConfig) -> bool:
    if config.max_steps is not None:
        return state.step >= config.max_steps
    assert config.max_seconds is not None
    return state.seconds >= config.max_seconds


def _patience_lost(state: State, config: TrainConfig) -> bool:
    """Whether the last `patience` evaluations found nothing better: of the saved state alone, for an exact resume."""
    if config.patience is None or state.best is None:
        return False
    since = itertools.takewhile(lambda point: point.step > state.best[0], reversed(state.history))  # type: ignore[index]
    return sum("val/loss" in point.metrics for point in since) >= config.patience


def overfits(history: Sequence[Point]) -> bool:
    """Whether the validation loss rose from its lowest through three evaluations while the training loss fell.

    True at the first evaluation where it is so, so that a warning comes once, and not again after a resume.
    """
    val: list[float] = []
    train: list[float] = []  # the mean between the evaluation before and this one
    losses: list[float] = []
    for point in history:
        if "train/loss" in point.metrics:
            losses.append(point.metrics["train/loss"])
        if "val/loss" in point.metrics:
            val.append(point.metrics["val/loss"])
            train.append(sum(losses) / len(losses) if losses else math.inf)
            losses.clear()
    found = [
        min(val[:n]) == val[n - 3] < val[n - 2] < val[n - 1] < val[n] and train[n] < train[n - 3]
        for n in range(3, len(val))
    ]
    return bool(found) and found[-1] and not any(found[:-1])


def _learning_rate_scale(state: State, config: TrainConfig) -> float:
    if config.max_steps is not None:
        warmup = min(config.schedule.warmup_steps, config.max_steps - 1)
        progress = (state.step - warmup) / (config.max_steps - warmup)
    else:
        assert config.max_seconds is not None
        progress = state.seconds / config.max_seconds
    return learning_rate_scale(config.schedule, state.step, min(max(progress, 0.0), 1.0))


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


# --------------------------------------------------------------------------------------------------- state and its disk


def stream_seed(seed: int, stream: str) -> int:
    """The seed of a named random stream (init, batches, dropout): different names never share randomness."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8]) >> 1


def _new_state(run: Run, runtime: Runtime) -> State:
    """Everything at step 0. Seeds torch's default generators, which are the dropout stream."""
    config, tokenizer = run.config, run.splits.tokenizer
    model = build_model(config.model, tokenizer.vocab_size, stream_seed(run.seed, "init"), run.config.kernels)
    model.to(runtime.device)
    torch.manual_seed(stream_seed(run.seed, "dropout"))
    average = None
    if config.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
    source = EpochBatches if config.sampling == "epoch" else RandomBatches
    batches = source(run.splits.train, config.batch_size, config.model.block_size, stream_seed(run.seed, "batches"))
    teacher = None
    if run.teachers:
        teacher = load_teachers(run.teachers, run.splits, config.model.block_size, runtime.device, config.kernels)
    return State(model, build_optimizers(model, config.optimizer), average, batches, teacher)


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
            state=_state_tensors(state),
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
    _write_curve(state.history, run.config.tokens_per_step, run.folder / "curve.csv")
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
        _load_state_tensors(state, weights, tensors)
        if _state_tensors(state).keys() != tensors.keys():
            raise CheckpointError(f"{last} lacks a part of the state, or has one too many; use another checkpoint")
        state.step, state.seconds, state.run_id = training["step"], training["seconds"], training["run_id"]
        state.seconds_logged = training["seconds_logged"]
        state.history = [Point(*point) for point in training["history"]]
        state.best = None if training["best"] is None else tuple(training["best"])


def _state_tensors(state: State) -> checkpoint.Tensors:
    tensors = {f"batches/{name}": tensor for name, tensor in state.batches.state_dict().items()}
    tensors["dropout/cpu"] = torch.get_rng_state()
    if (device := _device(state)).type == "cuda":
        tensors["dropout/cuda"] = torch.cuda.get_rng_state(device)
    if state.losses:
        tensors["losses"] = torch.stack(state.losses)
    for i, optimizer in enumerate(state.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{key}": value for key, value in values.items()}
    if state.average is not None:  # model.safetensors holds the average, so the weights themselves go here
        tensors |= {f"weights/{name}": tensor for name, tensor in state.model.state_dict().items()}
        tensors["average/n_averaged"] = state.average.n_averaged
    return tensors


def _load_state_tensors(state: State, weights: checkpoint.Tensors, tensors: checkpoint.Tensors) -> None:
    groups: dict[str, checkpoint.Tensors] = defaultdict(dict)
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    state.delivered.load_state_dict(weights)
    if state.average is not None:
        state.model.load_state_dict(groups["weights"])
        state.average.n_averaged.copy_(groups["average"]["n_averaged"])
    state.batches.load_state_dict(groups["batches"])
    torch.set_rng_state(groups["dropout"]["cpu"])
    if (device := _device(state)).type == "cuda":
        torch.cuda.set_rng_state(groups["dropout"]["cuda"], device)
    if "losses" in tensors:
        state.losses = list(tensors["losses"].to(device))
    for i, optimizer in enumerate(state.optimizers):
        loaded = optimizer.state_dict()
        values: dict[int, checkpoint.Tensors] = defaultdict(dict)
        for name, tensor in groups["optimizer"].items():
            number, index, key = name.split("/")
            if int(number) == i:
                values[int(index)][key] = tensor
        optimizer.load_state_dict(loaded | {"state": values})


def _device(state: State) -> torch.device:
    return next(state.model.parameters()).device


# ----------------------------------------------------------------------------------------------------- before and after


def estimate(state: State, run: Run, runtime: Runtime) -> str:
    """Parameters, memory and duration in one line, from a trial pass that leaves the state as it was."""
    config = run.config
    parameters = parameter_count(state.model)
    activations, seconds = _trial(state, run, runtime)
    numbers = parameters * (2 + (state.average is not None))  # weights, gradients, average
    for optimizer in state.optimizers:  # Muon keeps one momentum for each weight, AdamW two
        managed = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        numbers += managed * (1 if isinstance(optimizer, torch.optim.Muon) else 2)
    if config.max_steps is not None:
        training = seconds * config.gradient_accumulation_steps * (config.max_steps - state.step)
    else:
        assert config.max_seconds is not None
        training = config.max_seconds - state.seconds
    return (
        f"{parameters:,} parameters, about {(4 * numbers + activations) / 2**20:,.0f} MiB of memory, "
        f"about {duration(training)} of training"
    )


def measure_speed(run: Run, seconds: float = 1.0) -> Speed:
    """Train for about so many seconds, score some validation text, and forget both: tokens per second of each.

    Without torch.compile, which takes longer than this to compile. Raises TrainingError when memory runs out, and
    CorpusError for too few tokens.
    """
    config = run.config
    require_size(run.splits, config.model.block_size)
    with _memory_errors(run), torch.random.fork_rng():
        runtime = resolve_runtime(config)
        state = _new_state(run, runtime)
        state.model.train()

        def step() -> None:
            training_step(state.model, state.optimizers, state.batches, config, runtime, state.teacher)
            runtime.synchronize()

        def score() -> None:
            with runtime.autocast():
                full_loss(state.model, tokens, runtime.device)

        tokens = run.splits.val_with_context[: 1 + 2 * TOKENS_PER_PASS]
        training, evaluation = (_seconds_each(action, seconds * share) for action, share in ((step, 0.8), (score, 0.2)))
    return Speed(config.tokens_per_step / training, (len(tokens) - 1) / evaluation)


def _seconds_each(action: Callable[[], None], seconds: float) -> float:
    """Mean time of one call, over as many as begin within `seconds`, after a first that pays for allocation."""
    action()
    start = time.perf_counter()
    for calls in itertools.count(1):
        action()
        if (passed := time.perf_counter() - start) >= seconds:
            return passed / calls
    raise AssertionError  # count() has no end


def _trial(state: State, run: Run, runtime: Runtime) -> tuple[int, float]:
    """Bytes that one batch keeps for its backward pass, and seconds that both passes take."""
    kept: dict[int, int] = {}

    def measure(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    position = state.batches.state_dict()
    state.model.train()
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for _ in range(2):  # the first pass pays for allocation
            idx, targets = state.batches.next()
            runtime.synchronize()
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
                _backward(state.model, idx, targets, run.config, runtime, state.teacher)
            runtime.synchronize()
            seconds = time.perf_counter() - start
    state.model.zero_grad(set_to_none=True)
    state.batches.load_state_dict(position)
    return sum(kept.values()) // 2, seconds


def _finish(
    state: State,
    run: Run,
    runtime: Runtime,
    evaluation: EvaluationConfig,
    tracker: Tracker,
    protocols: Sequence[str],
) -> dict[str, Any]:
    """Evaluate the best checkpoint by each protocol, leave the results in the folder, and close the tracked run."""
    assert state.best is not None
    config = run.config
    model, tokenizer = checkpoint.load_model(run.folder / "best", runtime.device, config.kernels)
    # In fp32, whatever it was trained in, so that `chargpt eval` gives the same numbers.
    losses = evaluate(model, run.splits.val_with_context, evaluation, config.batch_size, runtime.device, protocols)
    text = generate_text(model, tokenizer, "", SampleConfig(max_new_tokens=300), runtime.device)[0]
    val_losses = [point.metrics["val/loss"] for point in state.history if "val/loss" in point.metrics]
    metrics = {
        "variant": run.variant,
        "seed": run.seed,
        "parameters": parameter_count(model),
        "steps": state.step,
        "tokens": state.step * config.tokens_per_step,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.step * config.tokens_per_step / state.seconds, 1),
        **{f"val_{protocol}": loss for protocol, loss in losses.items()},
        "val_full_last": val_losses[-1],
        "best_step": state.best[0],
        "kernels": runtime.kernels,
        "device": device_name(runtime.device),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "torch": torch.__version__,
    }
    _write_text(run.folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    _write_text(run.folder / "sample.txt", text)
    with tempfile.TemporaryDirectory() as scratch:
        delivery = Path(scratch) / "checkpoint"  # the best one without what only training needs
        checkpoint.export_checkpoint(run.folder / "best", delivery)
        tracker.finish(
            "FINISHED",
            summary={name: value for name, value in metrics.items() if isinstance(value, (int, float))},
            artifacts=[run.folder / name for name in ("config.yaml", "curve.csv", "sample.txt")],
            model=delivery,
        )
    _write_text(run.folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")  # last: it marks a finished run
    return metrics


def _describe(run: Run, runtime: Runtime) -> RunDescription:
    """The run as a tracker shows it."""
    fingerprint = run.splits.fingerprint
    return RunDescription(
        variant=run.variant,
        seed=run.seed,
        params=flatten(run.config) | {"seed": run.seed} | run.teacher_weights,
        tags={
            "corpus": run.corpus,
            "corpus_sha256": run.splits.text_sha256,
            "splits_sha256": fingerprint,
            "tokenizer_sha256": run.splits.tokenizer.fingerprint,
            "kernels": runtime.kernels,
            "precision": runtime.precision,
            "device": device_name(runtime.device),
            "torch": torch.__version__,
        },
        dataset=Dataset(run.corpus, fingerprint, len(run.splits.train), len(run.splits.val)),
    )


def _write_curve(history: list[Point], tokens_per_step: int, path: Path) -> None:
    """The whole curve as CSV: step, tokens, seconds, train_loss, val_loss, learning_rate; empty where not measured."""
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for point in history:
        rows[point.step] |= point.metrics
    lines = ["step,tokens,seconds,train_loss,val_loss,learning_rate"]
    keys = ("train/seconds", "train/loss", "val/loss", "train/learning_rate")
    for step, metrics in sorted(rows.items()):
        measured = [f"{metrics[key]:.6g}" if key in metrics else "" for key in keys]
        lines.append(",".join([str(step), str(step * tokens_per_step), *measured]))
    _write_text(path, "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replaced_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _memory_errors(run: Run) -> Iterator[None]:
    """A sentence for the user in place of the errors with which torch and Python run out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError, a RuntimeError, is of GPUs alone; on a CPU the message has to tell.
        refused = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not refused and not re.search("not enough memory|can't allocate memory", str(error)):
            raise
        saved = f"; {run.folder} keeps the last checkpoint" if (run.folder / "last").exists() else ""
        raise TrainingError(
            f"memory ran out with batch_size {run.config.batch_size} and {run.splits.tokenizer.vocab_size:,} symbols; "
            f"{WHAT_TO_LOWER}{saved}"
        ) from None


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
