"""The Triton kernels, as functions that take what the references take. The first call imports Triton, not this file."""

import functools
from types import SimpleNamespace

from chargpt.kernels.ops import attention, cross_entropy
from chargpt.kernels.ops.common import OperatorLibrary


@functools.cache
def kernels() -> SimpleNamespace:
    from chargpt.kernels.backends.triton import attention, cross_entropy

    return SimpleNamespace(
        causal_attention_forward=attention.causal_attention_forward,
        causal_attention_backward=attention.causal_attention_backward,
        softmax_cross_entropy_forward=cross_entropy.softmax_cross_entropy_forward,
        softmax_cross_entropy_backward=cross_entropy.softmax_cross_entropy_backward,
        scale_=cross_entropy.scale_,
    )


LIBRARY = OperatorLibrary(
    "chargpt_triton", "CUDA", kernels, (attention.OPERATION, cross_entropy.OPERATION), gradient_in_forward=True
)
FUNCTIONS = LIBRARY.functions
