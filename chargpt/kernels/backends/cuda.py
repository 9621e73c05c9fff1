"""The CUDA kernels, as functions that take what the reference's take, and why they may not run here."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from chargpt.kernels import native
from chargpt.kernels.compiling import assume_constant_result
from chargpt.kernels.ops import attention, cross_entropy, packed_attention
from chargpt.kernels.ops.common import OperatorLibrary

CAPABILITY = (8, 0)  # the oldest: Ampere, the first with bfloat16 in tensor cores and with asynchronous copies
WIDE_HEAD_SIZE = 128  # above it, float32 heads need more shared memory than some GPUs give a block


def _module() -> Any:
    return native.load_cuda().module


LIBRARY = OperatorLibrary(
    "chargpt_cuda",
    "CUDA",
    _module,
    (attention.OPERATION, packed_attention.OPERATION, cross_entropy.OPERATION),
    gradient_in_forward=True,
)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As the reference; heads that the kernels or this GPU are too small for are left to it."""
    if _too_wide(q.dtype, q.shape[-1], q.device):
        return attention.reference(q, k, v, **options)
    return LIBRARY["causal_attention"](q, k, v, **options)  # type: ignore[no-any-return]


def packed_causal_attention(qkv: Tensor, **options: Any) -> Tensor:
    """Likewise."""
    if _too_wide(qkv.dtype, qkv.shape[-1] // (options["n_head"] + 2 * options["n_kv_head"]), qkv.device):
        return packed_attention.reference(qkv, **options)
    return LIBRARY["packed_causal_attention"](qkv, **options)  # type: ignore[no-any-return]


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "causal_attention": causal_attention,
    "packed_causal_attention": packed_causal_attention,
    "softmax_cross_entropy": LIBRARY["softmax_cross_entropy"],
}


def _too_wide(dtype: torch.dtype, D: int, device: torch.device) -> bool:
    return dtype == torch.float32 and D > WIDE_HEAD_SIZE and not _has_room_for_wide_heads(device)


@assume_constant_result
def _has_room_for_wide_heads(device: torch.device) -> bool:
    """For float32. True on chips like sm_80 and sm_90, false on sm_86, sm_89 and sm_120."""
    has = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return bool(has >= _module().wide_float32_shared_bytes)


def problem() -> str | None:
    """Why the kernels cannot run in this process; None when they can."""
    loaded = native.load_cuda()
    if loaded.module is None:
        return loaded.problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if min(capabilities) < CAPABILITY:
        has, needed = _dotted(min(capabilities)), _dotted(CAPABILITY)
        return f"the GPU has compute capability {has}, the kernels need {needed} or newer"
    build = native.cuda_build(native.RECORD) or ""  # "CUDA 13.0 for 8.0;9.0+PTX"
    architectures = build.rpartition(" for ")[2]
    for capability in capabilities:
        if not runs_on(architectures, capability):
            return (
                f"the GPU has compute capability {_dotted(capability)}, the kernels were built for {architectures}; "
                f"set TORCH_CUDA_ARCH_LIST={_dotted(capability)} and {native.REBUILD}"
            )
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures`, in the words of TORCH_CUDA_ARCH_LIST, runs on a GPU of this capability.

    Machine code runs on chips of the same major version that are not older, PTX on all that are not older, and code
    with an `a` on that very chip alone. A word that is no number (`Hopper`) is not judged: then the answer is yes.
    """
    for word in re.split(r"[;\s]+", architectures):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", word)
        if match is None:
            return True
        built = int(match[1]), int(match[2])
        if capability == built or (capability > built and not match[3] and (capability[0] == built[0] or match[4])):
            return True
    return False


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
