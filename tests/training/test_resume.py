"""Exact resume: wherever a run is killed, and however often, it ends with the bits of one that was left alone."""

import random
from pathlib import Path

import pytest

import runs
from chargpt.checkpoint import load_model, load_state
from chargpt.config import override

SHORT = override(runs.BIGRAM, ["max_steps=2", "eval_interval=2", "log_interval=3"])


QUICK = ("transformer-adamw-random-accumulated-ema",)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in runs.CASES]
)
def test_resume_after_sigkill_at_random_moments_is_bitwise_identical(case: str, tmp_path: Path) -> None:
    config = runs.CASES[case]
    moments = runs.count_moments(tmp_path / "counted", config)
    assert runs.in_process(tmp_path / "whole", config) == 0
    rng = random.Random(case)
    for _ in range(4):
        if not (tmp_path / "killed" / "metrics.json").exists():
            runs.in_process(tmp_path / "killed", config, kill_at=rng.randint(1, 3 * moments // 4))
    if not (tmp_path / "killed" / "metrics.json").exists():
        assert runs.in_process(tmp_path / "killed", config) == 0
    assert runs.result(tmp_path / "killed") == runs.result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_moment_leaves_a_checkpoint_that_loads_and_goes_on_bitwise(tmp_path: Path) -> None:
    moments = runs.count_moments(tmp_path / "whole", SHORT)
    whole = runs.result(tmp_path / "whole")
    for moment in range(1, moments + 1):
        folder = tmp_path / f"killed-{moment}"
        assert runs.in_process(folder, SHORT, kill_at=moment) == -9, moment
        for name in ("last", "best"):
            if (folder / name).is_symlink():
                load_model(folder / name)
                load_state(folder / name)
        if not (folder / "metrics.json").exists():
            runs.train(folder, SHORT)
        assert runs.result(folder) == whole, moment
        # nothing half-written is left beside the results
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in (tmp_path / "whole").iterdir()
        )
