"""Who computes an operation, best first.

cpp.py    C++ for the CPU
cuda.py   CUDA C++
triton/   Triton

and the references, which serve everything.
"""

import torch

from chargpt.kernels import native, proven, registry
from chargpt.kernels.backends import cpp, cuda, triton
from chargpt.kernels.backends.triton import backend as triton_backend
from chargpt.kernels.ops import OPERATIONS
from chargpt.kernels.registry import Backend

registry.BACKENDS = (
    Backend(
        "cuda",
        "CUDA kernels",
        cuda.FUNCTIONS,
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        problem=cuda.problem,
        unproven=lambda: proven.why_not("cuda"),
    ),
    Backend(
        "triton",
        "Triton kernels",
        triton_backend.FUNCTIONS,
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        problem=triton.problem,
        unproven=lambda: proven.why_not("triton"),
    ),
    Backend(
        "cpp",
        "C++ kernels for the CPU",
        cpp.FUNCTIONS,
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
        problem=lambda: native.load().problem,
        unproven=lambda: native.unmeasured(),
    ),
    Backend(
        "torch",
        "the reference in PyTorch, on any device",
        {name: operation.reference for name, operation in OPERATIONS.items()},
    ),
)
