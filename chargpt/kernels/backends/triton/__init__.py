"""Operations as Triton kernels for NVIDIA GPUs. Nothing here is imported before a backend asks for it.

attention.py, cross_entropy.py and add_norm.py each hold kernels and the functions that allocate, choose block sizes and
launch; philox.py and numerics.py are what they share, and backend.py makes operators of them. This file only answers
whether they can run.
"""

import importlib.util

import torch

OLDEST = (3, 6)  # of Triton: the first that the tests run with
CAPABILITY = (8, 0)  # Ampere: bfloat16 in tensor cores, asynchronous copies


def problem() -> str | None:
    """Why the kernels cannot run in this process, or None. Under TRITON_INTERPRET=1 they run, slowly, on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        return f"the GPU has compute capability {have}, the kernels need {need}"
    try:
        triton.runtime.driver.active.get_current_device()  # some versions compile a part of themselves for it
    except Exception as error:
        return f"triton cannot reach the GPU: {error}"
    return None
