"""One optimizer step, and what decides about the next one."""

import itertools
import math
import typing
from collections.abc import Sequence

import torch
from torch import nn

from chargpt.config import TrainConfig
from chargpt.data import BatchStream
from chargpt.models import LanguageModel
from chargpt.runtime import Runtime
from chargpt.training.distillation import distillation_loss
from chargpt.training.events import Point
from chargpt.training.optim import learning_rate_scale
from chargpt.training.state import State


def training_step(
    model: LanguageModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: BatchStream,
    config: TrainConfig,
    runtime: Runtime,
    teacher: LanguageModel | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over `gradient_accumulation_steps` batches: mean loss and gradient norm, both ().

    With a teacher the gradient is that of `distillation_loss`; the loss returned is still the one on the text.
    """
    losses = []
    for _ in range(config.gradient_accumulation_steps):
        idx, targets = batches.next()
        losses.append(backward(model, idx, targets, config, runtime, teacher))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # Within the limit the factor is 1, but for its rounding. A GPU's norm is not waited for.
    if config.grad_clip is not None and not (norm.is_cpu and norm + 1e-6 <= config.grad_clip):
        nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean(), norm


def backward(
    model: LanguageModel,
    idx: torch.Tensor,
    targets: torch.Tensor,
    config: TrainConfig,
    runtime: Runtime,
    teacher: LanguageModel | None = None,
) -> torch.Tensor:
    """Loss () of one batch on the text, with the batch's share of the gradient added to the parameters."""
    idx, targets = (tensor.to(runtime.device, non_blocking=True) for tensor in (idx, targets))
    with runtime.autocast():
        if teacher is None:
            objective = loss = model(idx, targets)
        else:
            h = model.hidden(idx)  # (B, T, C)
            with torch.no_grad():
                loss = model.loss(h, targets)
                teacher_logits = teacher.logits(teacher.hidden(idx))  # (B, T, V)
            objective = distillation_loss(model.logits(h), teacher_logits)
    (objective / config.gradient_accumulation_steps).backward()
    return typing.cast(torch.Tensor, loss.detach())


def patience_lost(state: State, config: TrainConfig) -> bool:
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


def current_learning_rate_scale(step: int, config: TrainConfig) -> float:
    """The factor on the peak learning rate for the step after `step` done ones."""
    warmup = min(config.schedule.warmup_steps, config.max_steps - 1)
    progress = (step - warmup) / (config.max_steps - warmup)
    return learning_rate_scale(config.schedule, step, min(max(progress, 0.0), 1.0))
