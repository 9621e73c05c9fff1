"""The CUDA kernels, as functions that take what the reference's take, and why they may not run here."""

from typing import Any

import torch

from chargpt.kernels import native
from chargpt.kernels.operators import OperatorsWithGradient

CAPABILITY = (8, 0)  # the oldest: Ampere, the first with bfloat16 in tensor cores and with asynchronous copies


def _module() -> Any:
    return native.load_cuda().module


_OPERATORS = OperatorsWithGradient("chargpt_cuda", "CUDA", _module)
causal_attention = _OPERATORS.causal_attention
softmax_cross_entropy = _OPERATORS.softmax_cross_entropy


def problem() -> str | None:
    """Why the kernels cannot run in this process; None when they can."""
    loaded = native.load_cuda()
    if loaded.module is None:
        return loaded.problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < CAPABILITY:
        has, needed = (".".join(map(str, capability)) for capability in (oldest, CAPABILITY))
        return f"the GPU has compute capability {has}, the kernels need {needed} or newer"
    return None
