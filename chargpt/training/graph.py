"""A training step as one CUDA graph: the host launches it at once, in place of some 400 kernels one after the other.

A small model keeps a GPU busy for less than half of an eager step; else it waits for the host. A graph's kernels read
the same memory at every replay, so what changes from step to step lies there: the batch, the learning rates, and the
state of the GPU's generator, from which dropout draws. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from chargpt.config import TrainConfig
from chargpt.data import Batch, BatchStream
from chargpt.models import LanguageModel
from chargpt.runtime import Runtime
from chargpt.training.steps import training_step

WARM_UP = 3  # steps before the recording: libraries choose their kernels, and optimizers make their state

Step = Callable[[], tuple[Tensor, Tensor]]


class GraphedStep:
    """`training_step` with everything but the batches bound: made step by step at first, then recorded and replayed.

    The optimizers are changed so that a graph can hold them: their learning rates become tensors.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizers: Sequence[torch.optim.Optimizer],
        batches: BatchStream,
        config: TrainConfig,
        runtime: Runtime,
        teacher: LanguageModel | None = None,
    ) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=runtime.device)
                group["capturable"] = True
        self._batches, self._held = batches, HeldBatches(config.gradient_accumulation_steps, runtime.device)
        # Kept beside its recording, which reads the memory of the model and the optimizers.
        self._eager: Step = partial(training_step, model, optimizers, self._held, config, runtime, teacher)
        self._step: Step = self._eager
        self._done = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        """One step: mean loss and gradient norm, both ()."""
        self._held.take(self._batches)
        if self._done < WARM_UP:
            self._done += 1
            return run_aside(self._step)
        if self._done == WARM_UP:
            self._done += 1
            self._step = record(self._step)
        return self._step()


class HeldBatches:
    """The batches of one step, at the same places of the device's memory in every step."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._held: list[Batch] = []
        self._next = 0

    def take(self, batches: BatchStream) -> None:
        """Take over the next step's."""
        drawn = [batches.next() for _ in range(self._count)]
        if not self._held:
            self._held = [(idx.to(self._device), targets.to(self._device)) for idx, targets in drawn]
        for held, new in zip(self._held, drawn, strict=True):
            for place, tensor in zip(held, new, strict=True):
                place.copy_(tensor, non_blocking=True)

    def next(self) -> Batch:
        batch = self._held[self._next]
        self._next = (self._next + 1) % self._count
        return batch


def run_aside(step: Step) -> tuple[Tensor, Tensor]:
    """A step on another stream, as torch asks of those before a recording."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    return results


def record(step: Step) -> Step:
    """Record the kernels that a step launches, without running them; what is returned runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        loss, norm = recorded
        return loss.clone(), norm.clone()  # the next replay overwrites them

    return replay
