"""The lecture's first model: row i of a table holds the logits of the token that follows token i."""

import torch
from torch import nn

from chargpt.config import BigramConfig
from chargpt.kernels import softmax_cross_entropy
from chargpt.models.base import LanguageModel
from chargpt.models.cache import Cache


class BigramLanguageModel(LanguageModel):
    """A table of logits (V, V), initialised N(0, 1) as in the lecture."""

    def __init__(self, config: BigramConfig, vocab_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.vocab_size, self.backend = config, vocab_size, backend
        self.block_size, self.width = config.block_size, vocab_size  # tokens of context; C
        self.token_table = nn.Embedding(vocab_size, vocab_size)

    def new_cache(self) -> Cache:
        return Cache()

    def hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The row (B, T, V) of each of `idx` (B, T): a bigram has no more inside."""
        if cache is not None:
            cache.length += idx.size(1)
        return self.token_table(idx)  # type: ignore[no-any-return]

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """`h` (…, V) itself."""
        return h

    def loss(self, h: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy in nats of `targets` (…) under the rows `h` (…, V); () for "mean" or "sum", else (…)."""
        return softmax_cross_entropy(h, targets, reduction=reduction, impl=self.backend)
