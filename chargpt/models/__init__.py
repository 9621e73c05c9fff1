"""Language models: a model is (config, tokens) -> (logits, loss), nothing else."""

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
    """What sampling and evaluation ask of a model."""

    block_size: int

    def __call__(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


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
