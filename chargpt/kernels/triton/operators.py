"""The Triton kernels, as functions that take what the reference takes. The first call imports Triton, not this file."""

import functools
from types import SimpleNamespace

from chargpt.kernels.operators import OperatorsWithGradient


@functools.cache
def kernels() -> SimpleNamespace:
    from chargpt.kernels.triton import attention, cross_entropy

    return SimpleNamespace(
        causal_attention_forward=attention.causal_attention_forward,
        causal_attention_backward=attention.causal_attention_backward,
        softmax_cross_entropy_forward=cross_entropy.softmax_cross_entropy_forward,
        softmax_cross_entropy_backward=cross_entropy.softmax_cross_entropy_backward,
        scale_=cross_entropy.scale_,
    )


_OPERATORS = OperatorsWithGradient("chargpt_triton", "CUDA", kernels)
causal_attention = _OPERATORS.causal_attention
softmax_cross_entropy = _OPERATORS.softmax_cross_entropy
