"""The Triton kernels, as functions that take what the reference takes. The first call imports Triton, not this file."""

import functools
from types import SimpleNamespace

from chargpt.kernels.operators import OperatorsWithGradient


@functools.cache
def _kernels() -> SimpleNamespace:
    from chargpt.kernels.triton import attention, cross_entropy

    return SimpleNamespace(**vars(attention) | vars(cross_entropy))


_OPERATORS = OperatorsWithGradient("chargpt_triton", "CUDA", _kernels)
causal_attention = _OPERATORS.causal_attention
softmax_cross_entropy = _OPERATORS.softmax_cross_entropy
