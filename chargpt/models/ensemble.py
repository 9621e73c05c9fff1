"""Several models as one: the mean of their probabilities."""

import math
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from chargpt.kernels import softmax_cross_entropy
from chargpt.models.base import LanguageModel
from chargpt.models.cache import Cache, EnsembleCache

if TYPE_CHECKING:
    from chargpt.models import Model


class Ensemble(LanguageModel):
    """Predicts with its members' mean probability (Lakshminarayanan et al. 2017, arXiv 1612.01474, section 2.4).

    Its loss is never above the mean of theirs, since −log is convex. The members must share a vocabulary; the window is
    the shortest of theirs.
    """

    def __init__(self, members: Sequence["Model"], backend: str = "auto") -> None:
        super().__init__()
        self.members, self.backend = nn.ModuleList(members), backend
        self.block_size = min(member.block_size for member in members)
        self.vocab_size = members[0].vocab_size

    def new_cache(self) -> Cache:
        return EnsembleCache([member.new_cache() for member in self._models()])

    def hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The members' hidden states of `idx` (B, T) side by side: (B, T, C₁ + C₂ + …)."""
        if cache is None:
            return torch.cat([member.hidden(idx) for member in self._models()], -1)
        assert isinstance(cache, EnsembleCache)
        cache.length += idx.size(1)
        members = zip(self._models(), cache.members, strict=True)
        return torch.cat([member.hidden(idx, own) for member, own in members], -1)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Logits (…, V), float32, of the members' mean probability, from hidden states (…, C₁ + C₂ + …)."""
        models = self._models()
        own = torch.split(h, [model.width for model in models], -1)
        logs = [model.logits(part).float().log_softmax(-1) for model, part in zip(models, own, strict=True)]
        return torch.stack(logs).logsumexp(0) - math.log(len(self.members))

    def loss(self, h: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy in nats of `targets` (…) after hidden states (…, C₁ + C₂ + …); () for "mean" or "sum"."""
        return softmax_cross_entropy(self.logits(h), targets, reduction=reduction, impl=self.backend)

    def _models(self) -> "list[Model]":
        return typing.cast("list[Model]", list(self.members))
