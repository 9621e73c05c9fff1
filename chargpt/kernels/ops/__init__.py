"""Operations, one module each: the public function, its checks, its reference, and its operators for any backend.

A reference is the specification that every backend is tested against: plain PyTorch, written for reading,
differentiated by autograd. It computes in float32, or in float64 for float64 inputs, whatever the autocast region
around it says, and keeps whole (T, S) and (N, V) matrices, which the fused kernels exist to avoid.
"""

from chargpt.kernels.ops import activation, add_norm, attention, cross_entropy, qkv_heads
from chargpt.kernels.ops.common import Operation

OPERATIONS: dict[str, Operation] = {
    module.OPERATION.name: module.OPERATION for module in (attention, cross_entropy, add_norm, qkv_heads, activation)
}
