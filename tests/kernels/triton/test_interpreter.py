"""Proof without a GPU, leg 1: the Triton kernels in Triton's interpreter, on the shared cases.

In a process of its own: TRITON_INTERPRET must be set before anything imports Triton, torch.compile included, and it
changes what Triton does for everybody, the ahead-of-time tests beside this file included.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


LONG = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.mark.parametrize(
    "chosen",
    [
        "not attention and not cross_entropy and not norms_lose",
        pytest.param("attention", marks=LONG),
        pytest.param("cross_entropy", marks=LONG),
        pytest.param("norms_lose", marks=LONG),
    ],
)
def test_interpreted(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--timeout", "0"]
    done = subprocess.run(
        [*command, "-m", "slow or not slow", "-k", chosen, str(Path(__file__).with_name("interpreted.py"))],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **products(), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def products() -> dict[str, str]:
    """Settings under which NumPy rounds q kᵀ as k qᵀ, as a GPU does; else the backward's P is not the forward's.

    OpenBLAS's kernels for AVX-512 do so, and those for AVX. Those for AVX2 do not, and it takes these on CPUs that are
    newer than it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    kernels = {"AVX512": "SkylakeX", "AVX2": "Sandybridge"}
    return next(({"OPENBLAS_CORETYPE": kernels[name]} for name in kernels if capability.startswith(name)), {})
