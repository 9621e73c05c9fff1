"""How good a model is: the loss of a text under it, by several protocols.

protocols.py   of a model that stays as it is
dynamic.py     of one that learns as it reads
baselines.py   of guesses without a model
"""

from chargpt.evaluation.baselines import guess_losses
from chargpt.evaluation.dynamic import dynamic_loss
from chargpt.evaluation.protocols import (
    PROTOCOLS,
    TOKENS_PER_PASS,
    bits_per_byte,
    evaluate,
    evaluating,
    full_loss,
    nanogpt_loss,
    sliding_loss,
    token_logits,
)

__all__ = [
    "PROTOCOLS",
    "TOKENS_PER_PASS",
    "bits_per_byte",
    "dynamic_loss",
    "evaluate",
    "evaluating",
    "full_loss",
    "guess_losses",
    "nanogpt_loss",
    "sliding_loss",
    "token_logits",
]
