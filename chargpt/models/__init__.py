"""Language models: tokens to hidden states, hidden states to logits."""

from typing import Protocol

import torch
from torch import nn

from chargpt.config import BigramConfig, ModelConfig
from chargpt.models.bigram import BigramLanguageModel
from chargpt.models.ensemble import Ensemble
from chargpt.models.transformer import Transformer

__all__ = ["BigramLanguageModel", "Ensemble", "LanguageModel", "Transformer", "build_model", "parameter_count"]

Model = BigramLanguageModel | Transformer


class LanguageModel(Protocol):
    """What generation asks of a model: who needs the next token alone takes the logits of the last row alone."""

    block_size: int

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) of `idx` (B, T), with T ≤ block_size."""
        ...

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) for the token after each of the hidden states (…, C)."""
        ...


def build_model(config: ModelConfig, vocab_size: int, seed: int, kernels: str = "auto") -> Model:
    """The model that `config` describes, initialised from `seed` alone: torch's default generator is left as it was.

    `kernels` names the implementation of attention and cross-entropy (see `chargpt.kernels`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where weights are made
        if isinstance(config, BigramConfig):
            return BigramLanguageModel(config, vocab_size, kernels)
        return Transformer(config, vocab_size, kernels)


def parameter_count(model: nn.Module) -> int:
    """Numbers that training changes; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
