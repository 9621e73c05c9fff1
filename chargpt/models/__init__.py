"""Language models: tokens to hidden states, hidden states to logits or a loss.

base.py          what every model is
bigram.py        a table
transformer.py   from the lecture's first head to modern blocks
ensemble.py      several as one
"""

import torch
from torch import nn

from chargpt.config import BigramConfig, ModelConfig
from chargpt.models.base import LanguageModel
from chargpt.models.bigram import BigramLanguageModel
from chargpt.models.ensemble import Ensemble
from chargpt.models.transformer import Transformer

__all__ = ["BigramLanguageModel", "Ensemble", "LanguageModel", "Transformer", "build_model", "parameter_count"]

Model = BigramLanguageModel | Transformer


def build_model(config: ModelConfig, vocab_size: int, seed: int, backend: str = "auto") -> Model:
    """The model that `config` describes, initialised from `seed` alone: torch's default generator is left as it was.

    `backend` names who computes attention and cross-entropy (see `chargpt.kernels`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where weights are made
        if isinstance(config, BigramConfig):
            return BigramLanguageModel(config, vocab_size, backend)
        return Transformer(config, vocab_size, backend)


def parameter_count(model: nn.Module) -> int:
    """Numbers that training changes; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
