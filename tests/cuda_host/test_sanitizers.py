"""Cross-entropy's CUDA kernels under the sanitizers: nothing is read or written out of bounds, and nothing races.

That the sanitizers would see it is shown in test_shim.py. What is compared with what: cross_entropy_test.cpp.
"""

import pytest

from .build import run_watched


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_cross_entropy(kind: str) -> None:
    done = run_watched("cross_entropy", kind)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[-5000:]
    assert "0 failures" in done.stdout
