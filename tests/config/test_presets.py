"""Presets: the pipeline's variants of the same name are the same configurations."""

from pathlib import Path

import pytest

from chargpt.config import flatten, load_params
from chargpt.config.presets import PRESETS
from chargpt.models import build_model, parameter_count

VARIANTS = load_params(Path(__file__).parents[2] / "params.yaml").variants


@pytest.mark.parametrize("name", sorted(PRESETS.keys() & VARIANTS.keys()))
def test_a_preset_is_the_variant_of_its_name(name: str) -> None:
    assert flatten(PRESETS[name]) == flatten(VARIANTS[name])


def test_the_yardstick_is_nanogpts_cpu_configuration() -> None:
    assert {"nanogpt-cpu", "modern"} <= PRESETS.keys() & VARIANTS.keys()
    model = build_model(PRESETS["nanogpt-cpu"].model, 65, seed=0)
    assert parameter_count(model) == 804_096
