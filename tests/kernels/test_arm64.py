"""The C++ kernels on arm64: cross-compiled, and their tests without torch run by an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize("kernel", ["attention", "cross_entropy", "block", "decode", "product"])
def test_the_kernels_pass_their_tests_on_arm64(kernel: str, tmp_path: Path) -> None:
    """On a chip with dot products of bfloat16, and on one of the first."""
    sources = [ROOT / f"csrc/tests/{kernel}_test.cpp", ROOT / f"csrc/cpu/{kernel}.cpp"]
    subprocess.run([COMPILER, "-std=c++20", "-O2", "-static", *sources, "-o", tmp_path / kernel], check=True)
    paths = set()
    for chip in ("max,sve=off", "cortex-a72"):
        done = subprocess.run([EMULATOR, "-cpu", chip, tmp_path / kernel], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        paths |= {word.rstrip(",:") for word in done.stdout.split()}
    assert ("neon_bf16" in paths) == (kernel in ("attention", "product"))
