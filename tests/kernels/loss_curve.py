"""The losses of a small training run on a given implementation: the same seed gives the same ones, up to rounding."""

from functools import partial

import numpy as np
import torch

from chargpt.config import TrainConfig, TransformerConfig
from chargpt.data import build_batches
from chargpt.models import build_model
from chargpt.models.transformer import Transformer
from chargpt.runtime import resolve_runtime
from chargpt.training import training_step
from chargpt.training.graph import GraphedStep
from chargpt.training.optim import build_optimizers

STEPS = 200
DIFFERENCE = 1e-3  # that two implementations may have in one of the losses
VOCABULARY = 20


def small_model(backend: str, device: str = "cpu", dropout: float = 0.1) -> Transformer:
    config = TransformerConfig(block_size=33, n_layer=2, n_head=2, n_embd=32, dropout=dropout)
    model = build_model(config, VOCABULARY, seed=1, backend=backend)
    assert isinstance(model, Transformer)
    return model.to(device)


def training_losses(backend: str, device: str = "cpu", graphed: bool = False) -> torch.Tensor:
    """Training losses (STEPS,) in float32, with dropout, on a text that can be learnt; of a graphed step."""
    model = small_model(backend, device)
    config = TrainConfig(model=model.config, batch_size=4, precision="fp32", backend=backend, device=device)
    tokens = np.tile(np.random.default_rng(1).integers(VOCABULARY, size=200, dtype=np.uint8), 20)
    batches = build_batches("random", tokens, config.batch_size, model.config.block_size, seed=2)
    optimizers, runtime = build_optimizers(model, config.optimizer), resolve_runtime(config)
    parts = (model, optimizers, batches, config, runtime)
    step = GraphedStep(*parts) if graphed else partial(training_step, *parts)
    with torch.random.fork_rng():
        torch.manual_seed(3)  # dropout
        losses = [step()[0] for _ in range(STEPS)]
    return torch.stack(losses).cpu()
