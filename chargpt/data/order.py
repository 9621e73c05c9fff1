"""The order in which training sees tokens.

The one idea to know: a batch is a pure function of (seed, batch number), in memory that does not grow with the text, so
resuming, or spreading a batch over ranks, needs no more state than a count.
"""

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from chargpt.data.shards import Tokens, require_known

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, both (B, T) int64
Starts = npt.NDArray[np.int64]  # (B,) first tokens of windows

MOST_BATCHES = 2**40  # far beyond any run; tokens are still counted in 64 bits
MOST_IDS = 2**63  # more than any tokenizer has
FEISTEL_ROUNDS = 6
MIX_1, MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # odd, of MurmurHash3's finaliser


class Order(Protocol):
    """Where the windows of each batch begin."""

    def starts(self, number: int) -> Starts:
        """First tokens (B,) of the windows of a global batch, counted from 0."""
        ...


class BatchStream(Protocol):
    """An endless stream of batches."""

    def next(self) -> Batch: ...


class BatchSource(BatchStream, Protocol):
    """One whose position can be saved."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class Batches:
    """The batches of an order, one after the other. Each of several ranks takes its rows of the same global batch.

    vocab_size: `next` raises CorpusError for a token id that is not below it
    """

    def __init__(
        self,
        tokens: Tokens,
        order: Order,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int = MOST_IDS,
    ) -> None:
        self.tokens, self.order, self.block_size = tokens, order, block_size
        self.rank, self.world_size, self.vocab_size = rank, world_size, vocab_size
        self.position = 0  # global batches drawn

    def next(self) -> Batch:
        starts = self.order.starts(self.position)
        if len(starts) % self.world_size:
            raise ValueError(f"batch_size {len(starts)} does not divide among {self.world_size} ranks")
        rows = len(starts) // self.world_size
        self.position += 1
        batch = windows(self.tokens, starts[self.rank * rows : (self.rank + 1) * rows], self.block_size)
        for ids in batch:
            require_known(ids.numpy().reshape(-1), self.vocab_size)
        return batch

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.position = int(state["position"])
        if not 0 <= self.position < MOST_BATCHES:
            raise ValueError(f"batch {self.position} is none of a run")


def build_batches(
    order: Literal["epoch", "random"],
    tokens: Tokens,
    batch_size: int,
    block_size: int,
    seed: int,
    vocab_size: int = MOST_IDS,
) -> Batches:
    """Batches of windows of `tokens` (N,), in the order that a config names."""
    kind = EpochOrder if order == "epoch" else RandomOrder
    return Batches(tokens, kind(len(tokens), batch_size, block_size, seed), block_size, vocab_size=vocab_size)


class EpochOrder:
    """Every epoch is a seeded permutation of non-overlapping windows that begin at a random phase.

    Sampling without replacement: each window of an epoch is seen once, and the phase moves the cuts from epoch to
    epoch. A batch may straddle two epochs.
    """

    def __init__(self, n_tokens: int, batch_size: int, block_size: int, seed: int) -> None:
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.windows_per_epoch = max(1, (n_tokens - block_size) // block_size)
        slack = n_tokens - 1 - self.windows_per_epoch * block_size
        self.phases = min(block_size, slack + 1)

    def starts(self, number: int) -> Starts:
        windows = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        epochs, places = np.divmod(windows, self.windows_per_epoch)
        starts = np.empty(self.batch_size, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            phase, *keys = np.random.SeedSequence([self.seed, epoch]).generate_state(1 + FEISTEL_ROUNDS, np.uint64)
            chosen = permuted(places[epochs == epoch], self.windows_per_epoch, keys)
            starts[epochs == epoch] = int(phase) % self.phases + self.block_size * chosen
        return starts


class RandomOrder:
    """The lecture's and nanoGPT's sampling: every offset is as likely at any time, with replacement."""

    def __init__(self, n_tokens: int, batch_size: int, block_size: int, seed: int) -> None:
        self.offsets, self.batch_size, self.seed = n_tokens - block_size, batch_size, seed

    def starts(self, number: int) -> Starts:
        return np.random.Generator(np.random.PCG64([self.seed, number])).integers(self.offsets, size=self.batch_size)


def permuted(places: Starts, size: int, keys: list[np.uint64]) -> Starts:
    """Where a permutation of 0 … size − 1, which `keys` choose, takes each of `places` (n,): (n,).

    A Feistel network over the next even number of bits, walked along until it is back below `size` (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains", method 2). No table: the size does not matter.
    """
    half = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = left << half | right
        outside = found >= size
    return found.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Every bit of the result depends on every bit of `x`: the finaliser of MurmurHash3 (Appleby 2011)."""
    for factor in (MIX_1, MIX_2):
        x = (x ^ (x >> np.uint64(33))) * factor
    return x ^ (x >> np.uint64(33))


def windows(tokens: Tokens, starts: Starts, block_size: int) -> Batch:
    """Inputs and targets (B, T) for windows that begin at `starts` (B,): targets are the inputs one token later."""
    chunk = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))  # (B, T + 1)
    return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def random_batch(tokens: Tokens, batch_size: int, block_size: int, generator: torch.Generator | None) -> Batch:
    """The lecture's batch: windows at `torch.randint` offsets, with replacement. None: torch's default generator."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator)
    return windows(tokens, starts.numpy(), block_size)
