"""Dynamic evaluation: the loss of a model that learns from each window after it was scored on it."""

import copy

import numpy as np
import torch

from chargpt.data import Tokens
from chargpt.models import Ensemble, LanguageModel

DYNAMIC_LEARNING_RATE = 0.02  # the best of six for a GPT of 2.7 million parameters: EXPERIMENTS.md, section 7


def dynamic_loss(model: LanguageModel, tokens: Tokens, device: torch.device | str = "cpu") -> float:
    """Mean loss over tokens[1:] of `tokens` (N,) as in `full`, by a copy of the model that learns from each window.

    A window is scored first, and then the copy takes one step of gradient descent on it: no token is learned from
    before its score stands (Krause et al. 2018, arXiv 1709.07432, section 3). In an ensemble each member learns by its
    share in the mean probability.
    """
    adapted = copy.deepcopy(model).eval().requires_grad_()
    members = len(model.members) if isinstance(model, Ensemble) else 1
    optimizer = torch.optim.SGD(adapted.parameters(), lr=DYNAMIC_LEARNING_RATE * members)
    total = 0.0
    for start in range(0, len(tokens) - 1, model.block_size):
        window = torch.from_numpy(tokens[start : start + model.block_size + 1].astype(np.int64)).to(device)
        loss = adapted(window[None, :-1], window[None, 1:])
        total += loss.item() * (len(window) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return total / (len(tokens) - 1)
