"""How many numbers a model has."""

from torch import nn

from chargpt.config import ModelConfig, TransformerConfig
from chargpt.models.transformer import BIGRAM_ROWS


def parameter_count(model: nn.Module) -> int:
    """Numbers that training changes; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_estimate(model: ModelConfig, vocab_size: int) -> int:
    """Numbers in a model's matrices and tables: `parameter_count`, to a hundredth, before anything is built.

    Never more than there are: biases and gains are left out.
    """
    if not isinstance(model, TransformerConfig):
        return vocab_size**2
    C, kv = model.n_embd, model.n_embd // model.n_head * (model.n_kv_head or model.n_head)
    hidden = 0 if model.mlp == "none" else round(model.mlp_width * C)
    mlp = C * hidden * (1 + (model.mlp == "swiglu") + model.residual)
    layer = C * (C + 2 * kv) + C * C * model.residual + mlp + vocab_size * kv * model.value_embeddings
    pairs = min(vocab_size**2, BIGRAM_ROWS) * model.bigram_embeddings
    positions = model.block_size * (model.position == "learned")
    return C * (vocab_size * (1 if model.tied_head else 2) + pairs + positions) + model.n_layer * layer
