"""A minute of the fuzz suite, from a fixed seed. `make fuzz` goes on for an hour, from another each time."""

from pathlib import Path

import pytest
import torch

from fuzz.targets import TARGETS
from fuzz.worker import rng_of

PIECES = {
    "checkpoints": 60,
    "knobs": 150,
    "texts": 200,
    "tokenizers": 400,
    "data": 200,
    "commands": 60,
    "kernels": 600,
    "decoder": 60,
    "requests": 400,
    "kills": 2,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[pytest.mark.slow] if name == "kills" else []) for name in TARGETS]
)
def test_every_piece_is_taken_or_refused(target: str, tmp_path: Path) -> None:
    made = TARGETS[target](tmp_path)
    outcomes = set()
    for number in range(PIECES[target]):
        torch.manual_seed(number)
        try:
            outcomes.add(made.once(rng_of(1, target, number)))
        except Exception as error:
            raise AssertionError(f"python -m tests.fuzz --targets {target} --seed 1 --only {number}") from error
    assert outcomes == ({"taken"} if target in ("decoder", "kills") else {"taken", "refused"})
