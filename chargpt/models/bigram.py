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
        self.block_size, self.width = config.block_size, vocab_size  # tokens of context; C
        self.token_table = nn.Embedding(vocab_size, vocab_size)

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """The row (B, T, V) of each of `idx` (B, T): a bigram has no more inside."""
        return self.token_table(idx)  # type: ignore[no-any-return]

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """`h` (…, V) itself."""
        return h

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (B, T, V) for the token after each of `idx` (B, T), and the mean loss in nats if `targets` (B, T)."""
        logits = self.logits(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, softmax_cross_entropy(logits, targets, impl=self.kernels)
