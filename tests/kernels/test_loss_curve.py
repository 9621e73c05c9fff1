"""Every implementation trains as the reference does: the same seed gives the same losses, up to rounding."""

import pytest

from .cases import implementations
from .loss_curve import DIFFERENCE, training_losses


@pytest.mark.parametrize("impl", [impl for impl in implementations("causal_attention") if impl != "torch"])
def test_the_loss_curve_is_the_references(impl: str) -> None:
    reference = training_losses("torch")
    assert reference[-1] < 0.8 * reference[0]  # something was learnt
    assert (training_losses(impl) - reference).abs().max() < DIFFERENCE
