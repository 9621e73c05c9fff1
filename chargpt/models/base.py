"""What every model is: tokens to hidden states, hidden states to logits or to a loss.

The one idea to know: nobody makes (B, T, V) logits who does not need them. Generation takes the logits of the last row
alone; training and evaluation take the loss. Models know no corpus, tokenizer, file or clock.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from chargpt.models.cache import Cache


class LanguageModel(nn.Module, ABC):
    """Shapes: B batch, T ≤ block_size time, C what `hidden` gives for a token, V vocabulary."""

    block_size: int  # longest context, in tokens
    vocab_size: int
    recompute = False  # whether the backward computes what blocks computed again, so that it need not be kept
    backend: str  # who computes the operations, as `chargpt.kernels` takes it in `impl`

    @abstractmethod
    def new_cache(self) -> Cache:
        """An empty cache for `hidden`."""

    @abstractmethod
    def hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Hidden states (B, T, C) of `idx` (B, T).

        cache: of `new_cache`: what was read of these windows so far, which `idx` goes on; it keeps what is read now

        Raises ValueError for more than block_size tokens in a window.
        """

    @abstractmethod
    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) for the token after each of the hidden states (…, C)."""

    @abstractmethod
    def loss(self, h: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy in nats of `targets` (…) after hidden states (…, C): (…) for "none", () for "sum", "mean"."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """`loss` of `targets` (B, T) after `idx` (B, T), both passes in one call: what torch.compile wraps."""
        return self.loss(self.hidden(idx), targets, reduction)
