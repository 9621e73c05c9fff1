"""The operations where the time goes: causal attention, softmax cross-entropy, and a block's small passes over memory.

The function fixes the mathematics, `impl` chooses the backend that computes it.

ops/          one module for each operation
backends/     who computes: C++ for the CPU, CUDA C++, Triton, or PyTorch, the reference
registry.py   which backend a call gets, and why
"""

from chargpt.kernels import backends
from chargpt.kernels.ops.activation import activation
from chargpt.kernels.ops.add_norm import add_norm
from chargpt.kernels.ops.attention import causal_attention
from chargpt.kernels.ops.cross_entropy import softmax_cross_entropy
from chargpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from chargpt.kernels.ops.packed_attention import packed_causal_attention
from chargpt.kernels.ops.qkv_heads import qkv_heads
from chargpt.kernels.registry import available_backends, by_reference, describe_backends, resolve

__all__ = [
    "activation",
    "add_norm",
    "available_backends",
    "backends",
    "by_reference",
    "causal_attention",
    "describe_backends",
    "linear_cross_entropy",
    "packed_causal_attention",
    "qkv_heads",
    "resolve",
    "softmax_cross_entropy",
]
