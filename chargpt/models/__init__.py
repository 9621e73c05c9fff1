"""Language models: tokens to hidden states, hidden states to logits or a loss.

base.py          what every model is
bigram.py        a table
transformer.py   from the lecture's first head to modern blocks
ensemble.py      several as one
size.py          how many numbers one has
"""

import torch

from chargpt.config import BigramConfig, ModelConfig
from chargpt.models.base import LanguageModel
from chargpt.models.bigram import BigramLanguageModel
from chargpt.models.ensemble import Ensemble
from chargpt.models.size import parameter_count, parameter_estimate
from chargpt.models.transformer import Transformer

__all__ = [
    "BigramLanguageModel",
    "Ensemble",
    "LanguageModel",
    "Transformer",
    "build_model",
    "parameter_count",
    "parameter_estimate",
]

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
