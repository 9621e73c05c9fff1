"""`make ablation` writes two lists into params.yaml; everything else is DVC's, and in test_pipeline.py."""

from pathlib import Path

import pytest
import yaml

from pipelines.tools.ablation import with_list

BLOCK = """\
# every knob
ablation:                 # what runs
  seeds:
    - 1
    - 2

  # the list
  variants:
    - bigram

# Editing one
variants:
  bigram: &bigram {steps: 1}   # first
  head:
    <<: *bigram
"""
BRACKETS = "ablation: {variants: [bigram, head], seeds: [1]}  # short\nvariants: {bigram: {a: 1}, head: {a: null}}\n"


def test_a_list_changes_and_no_other_character() -> None:
    changed = with_list(with_list(BLOCK, "variants", ("bigram", "head")), "seeds", (1, 2, 3))
    assert changed == BLOCK.replace("- bigram\n", "- bigram\n    - head\n").replace("- 2\n", "- 2\n    - 3\n")


def test_brackets_stay_brackets() -> None:
    assert with_list(BRACKETS, "seeds", (1, 2, 3)) == BRACKETS.replace("[1]", "[1, 2, 3]")
    assert with_list(BRACKETS, "variants", ("bigram", "head")) == BRACKETS


def test_the_projects_own_params_take_every_variant() -> None:
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    before = yaml.safe_load(text)
    variants = list(before["variants"])
    changed = with_list(with_list(text, "variants", variants), "seeds", (1, 2, 3))
    assert yaml.safe_load(changed) == before | {"ablation": {"variants": variants, "seeds": [1, 2, 3]}}


@pytest.mark.parametrize("values", [("bigram",), ("bigram", "head")])
def test_what_is_there_already_changes_nothing(values: tuple[str, ...]) -> None:
    once = with_list(BLOCK, "variants", values)
    assert with_list(once, "variants", values) == once
