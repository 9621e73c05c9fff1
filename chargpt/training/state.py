"""What is to be trained, and all that training changes, with its form on disk.

torch's default generator is the dropout stream; every other random stream has a generator of its own.
"""

import hashlib
import typing
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from chargpt import checkpoint
from chargpt.config import (
    TrainConfig,
    flatten,
    require_seed,
)
from chargpt.data import BatchSource, Splits, build_batches
from chargpt.models import LanguageModel, Model, build_model
from chargpt.runtime import Runtime
from chargpt.training.distillation import load_teachers
from chargpt.training.events import Point
from chargpt.training.optim import build_optimizers


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
    home: Path | None = None  # where the best model is put in the end, if not in the folder

    def __post_init__(self) -> None:
        require_seed(self.seed)

    def identity(self, runtime: Runtime) -> dict[str, Any]:
        """Everything that decides the result, as flat plain data: a checkpoint goes on only under the same."""
        chosen = {
            "device": runtime.device.type,
            "precision": runtime.precision,
            "compile": runtime.compile,
            "cuda_graph": runtime.cuda_graph,
            "backend": runtime.backend,
        }
        given = {"seed": self.seed, "data": self.splits.fingerprint}
        config = flatten(self.config)
        del config["recompute"]  # which changes no bit
        return config | chosen | given | self.teacher_weights

    @cached_property
    def teacher_weights(self) -> dict[str, str]:
        """The SHA-256 of each teacher's weights, as plain data; read once, since teachers may move while it trains."""
        contents = [checkpoint.read_description(path) for path in self.teachers]
        return {f"teacher {n}": content["files"][checkpoint.WEIGHTS] for n, content in enumerate(contents, start=1)}


@dataclass
class State:
    """All that training changes, and the teachers, which it only reads."""

    model: Model
    optimizers: list[torch.optim.Optimizer]
    average: AveragedModel | None  # the exponential moving average of the weights
    batches: BatchSource
    teacher: LanguageModel | None = None
    step: int = 0  # optimizer steps done
    history: list[Point] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)  # () each, of the steps since the last point of the curve
    best: tuple[int, float] | None = None  # step and validation loss

    @property
    def delivered(self) -> Model:
        """The model to evaluate, save and use: the averaged one where there is one."""
        return typing.cast(Model, self.average.module) if self.average is not None else self.model


# --------------------------------------------------------------------------------------------------- state and its disk


def stream_seed(seed: int, stream: str) -> int:
    """The seed of a named random stream (init, batches, dropout): different names never share randomness."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8]) >> 1


def new_state(run: Run, runtime: Runtime) -> State:
    """Everything at step 0. Seeds torch's default generators, which are the dropout stream."""
    config, tokenizer = run.config, run.splits.tokenizer
    model = build_model(config.model, tokenizer.vocab_size, stream_seed(run.seed, "init"), run.config.backend)
    model.to(runtime.device)
    model.recompute = config.recompute
    torch.manual_seed(stream_seed(run.seed, "dropout"))
    average = None
    if config.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))  # type: ignore[no-untyped-call]
    block_size, seed = config.model.block_size, stream_seed(run.seed, "batches")
    batches = build_batches(config.order, run.splits.train, config.batch_size, block_size, seed, tokenizer.vocab_size)
    teacher = None
    if run.teachers:
        teacher = load_teachers(run.teachers, run.splits, block_size, runtime.device, config.backend)
    return State(model, build_optimizers(model, config.optimizer), average, batches, teacher)


def state_tensors(state: State) -> checkpoint.Tensors:
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


def load_state_tensors(
    state: State, weights: checkpoint.Tensors, tensors: checkpoint.Tensors, trained: bool, where: Path
) -> None:
    """Take over what `state_tensors` gave. Raises CheckpointError, which names `where`, unless every tensor fits."""
    checkpoint.require_tensors(weights, state.delivered.state_dict(), where / checkpoint.WEIGHTS)
    expected = _expected_tensors(state, trained, len(tensors.get("losses", ())))
    checkpoint.require_tensors(tensors, expected, where / checkpoint.STATE)
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


def _expected_tensors(state: State, trained: bool, n_losses: int) -> checkpoint.Tensors:
    """What `state_tensors` gives of a run like this one: names, dtypes and shapes, on torch's meta device.

    trained: whether there was a step, before which optimizers have no state
    """
    expected = state_tensors(state)
    if n_losses:
        expected["losses"] = torch.empty(n_losses, device="meta")
    for i, optimizer in enumerate(state.optimizers):
        numbered = enumerate(p for group in optimizer.param_groups for p in group["params"])
        for index, parameter in numbered if trained else ():
            like = torch.empty_like(parameter, device="meta")
            if isinstance(optimizer, torch.optim.Muon):
                values = {"momentum_buffer": like}
            else:
                values = {"step": torch.empty((), device="meta"), "exp_avg": like, "exp_avg_sq": like}
            expected |= {f"optimizer/{i}/{index}/{key}": value for key, value in values.items()}
    return expected


def _device(state: State) -> torch.device:
    return next(state.model.parameters()).device
