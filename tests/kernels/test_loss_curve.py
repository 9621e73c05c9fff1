"""Every implementation trains as the reference does: the same seed gives the same losses, up to rounding."""

import numpy as np
import pytest
import torch

from chargpt.config import TrainConfig, TransformerConfig
from chargpt.data import RandomBatches
from chargpt.models import build_model
from chargpt.optim import build_optimizers
from chargpt.runtime import resolve_runtime
from chargpt.training import training_step

from .cases import implementations

STEPS = 200
MODEL = TransformerConfig(block_size=33, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


def losses(kernels: str) -> torch.Tensor:
    """Training losses (STEPS,) on a text that can be learnt."""
    config = TrainConfig(model=MODEL, batch_size=4, precision="fp32", kernels=kernels, device="cpu")
    tokens = np.tile(np.random.default_rng(1).integers(20, size=200, dtype=np.uint8), 20)
    model = build_model(MODEL, 20, seed=1, kernels=kernels)
    batches = RandomBatches(tokens, config.batch_size, MODEL.block_size, seed=2)
    optimizers, runtime = build_optimizers(model, config.optimizer), resolve_runtime(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)  # dropout
        return torch.stack([training_step(model, optimizers, batches, config, runtime)[0] for _ in range(STEPS)])


@pytest.mark.parametrize("impl", [impl for impl in implementations("causal_attention") if impl != "torch"])
def test_the_loss_curve_is_the_references(impl: str) -> None:
    reference = losses("torch")
    assert reference[-1] < 0.8 * reference[0]  # something was learnt
    assert (losses(impl) - reference).abs().max() < 1e-3
