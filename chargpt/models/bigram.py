"""The lecture's first model: row i of a table holds the logits of the token that follows token i."""

import torch
from torch import nn

from chargpt.config import BigramConfig
from chargpt.kernels import softmax_cross_entropy


class BigramLanguageModel(nn.Module):
    """A table of logits (V, V), initialised N(0, 1) as in the lecture."""

    def __init__(self, config: BigramConfig, vocab_size: int, kernels: str = "auto") -> None:
        super().__init__()
        self.config, self.vocab_size, self.kernels = config, vocab_size, kernels
        self.block_size = config.block_size
        self.token_table = nn.Embedding(vocab_size, vocab_size)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (B, T, V) for the token after each of `idx` (B, T), and the mean loss in nats if `targets` (B, T)."""
        logits = self.token_table(idx)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, softmax_cross_entropy(logits, targets, impl=self.kernels)
