"""The checks of `make gpu` as tests: every implementation that runs on this machine's GPU."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU is here", allow_module_level=True)

from .checks import Check, SkippedError, all_checks


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_both_implementations_are_here(impl: str) -> None:
    assert any(check.impl == impl for check in all_checks("cuda"))


@pytest.mark.parametrize("check", all_checks("cuda"), ids=str)
def test_nothing_is_wrong(check: Check) -> None:
    try:
        problems = check.problems()
    except SkippedError as reason:
        pytest.skip(str(reason))
    assert problems == []
