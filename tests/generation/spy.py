"""A model whose answers are known, and that tells what it was asked."""

import torch

from chargpt.models.cache import Cache


class SpyModel:
    """Always wants token (last + 1) mod V, and remembers what it was fed."""

    def __init__(self, block_size: int, vocab_size: int = 10) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        self.fed: list[list[list[int]]] = []

    def new_cache(self) -> Cache:
        return Cache()

    def hidden(self, idx: torch.Tensor, cache: Cache) -> torch.Tensor:
        self.fed.append(idx.tolist())
        cache.length += idx.size(1)
        assert cache.length <= self.block_size
        return idx[..., None]  # (B, T, 1)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        assert h.dim() == 2, "only the last position's logits are needed"  # (B, 1)
        return 50.0 * torch.nn.functional.one_hot((h[:, 0] + 1) % self.vocab_size, self.vocab_size).float()
