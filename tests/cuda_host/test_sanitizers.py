"""Cross-entropy's CUDA kernels under the sanitizers: nothing is read or written out of bounds, and nothing races.

That the sanitizers would see it is shown in test_shim.py. What is compared with what: cross_entropy_test.cpp.
"""

import pytest

from .build import run_watched


# ThreadSanitizer runs fewer cases by default: "few".
@pytest.mark.parametrize(
    ("kind", "arguments"), [("asan", ()), ("tsan", ("few",)), pytest.param("tsan", (), marks=pytest.mark.slow)], ids=str
)
def test_cross_entropy(kind: str, arguments: tuple[str, ...]) -> None:
    done = run_watched("cross_entropy", kind, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr[-5000:]
    assert "0 failures" in done.stdout
