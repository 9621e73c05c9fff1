"""The order in which training sees tokens.

The one idea to know: a batch is a pure function of (seed, batch number), so resuming, or spreading a batch over ranks,
needs no more state than a count.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from chargpt.data.shards import Tokens

# ------------------------------------------------------------------------------------------------------------- batches

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, both (B, T) int64


class BatchSource(Protocol):
    """An endless source of batches whose position can be saved."""

    def next(self) -> Batch: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


def windows(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> Batch:
    """Inputs and targets (B, T) for windows that begin at `starts` (B,): targets are the inputs one token later."""
    chunk = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    chunk_tensor = torch.from_numpy(chunk)
    return chunk_tensor[:, :-1].contiguous(), chunk_tensor[:, 1:].contiguous()


class EpochBatches:
    """Every epoch is a seeded permutation of non-overlapping windows that begin at a random phase.

    Sampling without replacement: each window of an epoch is seen once, and the phase moves the cuts from epoch to
    epoch. A batch may straddle two epochs. With several ranks, each takes its rows of the same global batch.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, block_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} does not divide among {world_size} ranks")
        self.tokens, self.batch_size, self.block_size, self.seed = tokens, batch_size, block_size, seed
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)
        slack = len(tokens) - 1 - self.windows_per_epoch * block_size
        self.phases = min(block_size, slack + 1)
        self.position = 0  # global batches drawn
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """First tokens (W,) of the windows of an epoch, in the order in which they are drawn."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            phase = generator.integers(self.phases)
            self._epoch = (epoch, phase + self.block_size * generator.permutation(self.windows_per_epoch))
        return self._epoch[1]

    def next(self) -> Batch:
        first = self.position * self.batch_size
        numbers = range(first, first + self.batch_size)[self.rows]
        starts = [self.epoch_starts(n // self.windows_per_epoch)[n % self.windows_per_epoch] for n in numbers]
        self.position += 1
        return windows(self.tokens, np.array(starts), self.block_size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.position = int(state["position"])


def random_batch(tokens: Tokens, batch_size: int, block_size: int, generator: torch.Generator | None) -> Batch:
    """The lecture's batch: windows at `torch.randint` offsets, with replacement. None: torch's default generator."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator)
    return windows(tokens, starts.numpy(), block_size)


class RandomBatches:
    """The lecture's and nanoGPT's sampling, from a generator of its own."""

    def __init__(self, tokens: Tokens, batch_size: int, block_size: int, seed: int) -> None:
        self.tokens, self.batch_size, self.block_size = tokens, batch_size, block_size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Batch:
        return random_batch(self.tokens, self.batch_size, self.block_size, self.generator)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])
