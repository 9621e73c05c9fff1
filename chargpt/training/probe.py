"""What a run will take, tried out: memory, time, speed."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from chargpt.data import require_size
from chargpt.errors import TrainingError
from chargpt.evaluation import TOKENS_PER_PASS, full_loss
from chargpt.models import parameter_count
from chargpt.runtime import Runtime, is_out_of_memory, resolve_runtime
from chargpt.training.memory import WHAT_TO_LOWER
from chargpt.training.state import Run, State, new_state
from chargpt.training.steps import backward, training_step
from chargpt.training.trainer import Trainer


@dataclass(frozen=True)
class Speed:
    """Tokens per second under one config on this machine."""

    training: float
    evaluation: float


@dataclass(frozen=True)
class Estimate:
    """What the rest of a run will take."""

    parameters: int
    memory: int  # bytes
    seconds: float  # of training alone, without evaluations


def estimate(trainer: Trainer) -> Estimate:
    """Parameters, memory and time, from a trial pass that leaves the state as it was."""
    state, config = trainer.state, trainer.run.config
    parameters = parameter_count(state.model)
    activations, seconds = _trial(state, trainer.run, trainer.runtime)
    numbers = parameters * (2 + (state.average is not None))  # weights, gradients, average
    for optimizer in state.optimizers:  # Muon keeps one momentum for each weight, AdamW two
        managed = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        numbers += managed * (1 if isinstance(optimizer, torch.optim.Muon) else 2)
    passes = config.gradient_accumulation_steps * (config.max_steps - state.step)
    return Estimate(parameters, 4 * numbers + activations, seconds * passes)


def measure_speed(run: Run, seconds: float = 1.0) -> Speed:
    """Train for about so many seconds, score some validation text, and forget both: tokens per second of each.

    Without torch.compile, which takes longer than this to compile. Raises TrainingError when memory runs out, and
    CorpusError for too few tokens.
    """
    config = run.config
    require_size(run.splits, config.model.block_size)
    with memory_errors(run), torch.random.fork_rng():
        runtime = resolve_runtime(config)
        state = new_state(run, runtime)
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
            kept.clear()  # what one pass keeps; the next may find other addresses
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
                backward(state.model, idx, targets, run.config, runtime, state.teacher)
            runtime.synchronize()
            seconds = time.perf_counter() - start
    state.model.zero_grad(set_to_none=True)
    state.batches.load_state_dict(position)
    return sum(kept.values()), seconds


@contextlib.contextmanager
def memory_errors(run: Run) -> Iterator[None]:
    """A sentence for the user in place of the errors with which torch and Python run out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        saved = f"; {run.folder} keeps the last checkpoint" if (run.folder / "last").exists() else ""
        raise TrainingError(
            f"memory ran out with batch_size {run.config.batch_size} and {run.splits.tokenizer.vocab_size:,} symbols; "
            f"{WHAT_TO_LOWER}{saved}"
        ) from None
