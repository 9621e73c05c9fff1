"""The code for CPUs with fewer instructions than this one: the numerical tests of every kernel, on each lower path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .cases import implementations

FOLDER = Path(__file__).parent
FILES = [FOLDER / name for name in ("test_attention.py", "test_block.py", "test_cross_entropy.py")]
FILES.append(FOLDER.parent / "generation" / "test_native.py")
NUMERICAL = "loses_no_more or naive_twins or hidden or missing or no_row or every_bfloat16"
SOME = "T65 or D16 or D31 or D80 or one_query or grouped or window_16 or dropout or packed or huge"  # of attention's
DECODER = "(rounded_matrices or held_window and None or bits_depend and not long)"


@pytest.mark.skipif("cpp" not in implementations("causal_attention"), reason="the native module is not here")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "plain", "avx512", "avx512_bf16"])
def test_lower_code_paths_pass_the_numerical_tests(isa: str) -> None:
    """In another process, since the path is chosen once. The best path runs in this one."""
    chosen = f"cpp and ({NUMERICAL}) and (not test_attention or {SOME}) or {DECODER}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *FILES, "-k", chosen],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CHARGPT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(f"{file.name}::" in done.stdout for file in FILES)  # none was left out by a name that changed
