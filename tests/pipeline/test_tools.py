"""What `make repro` prints before and after: how long it will take, and whether the runs are the published ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chargpt.config import load_params, override
from chargpt.data import Splits
from chargpt.tokenizers import CharacterTokenizer
from chargpt.tracking.timing import Moment
from pipelines import train
from pipelines.tools import expected
from pipelines.tools.published import against_published

ROOT = Path(__file__).parents[2]


def run(loss: float, weights: str = "a" * 64, **more: Any) -> dict[str, Any]:
    machine = {"device": "AMD EPYC", "threads": 2, "precision": "bf16", "backend": "cpp", "torch": "2.13.0"}
    return {"val_full": loss, "weights_sha256": weights, **machine} | more


def test_runs_are_compared_with_the_published_ones_by_bits_then_by_loss() -> None:
    published = {"a-s1": run(1.5), "b-s1": run(1.6), "c-s1": run(1.7), "gone-s1": run(1.8)}
    found = {"a-s1": run(1.5), "b-s1": run(1.61, "b" * 64, device="Intel", torch="2.14"), "c-s1": run(1.7, "c" * 64)}
    assert list(against_published(found | {"new-s1": run(1.0)}, published)) == [
        "1 of 3 runs came out bit for bit as published",
        "  b-s1: loss 1.6100, published 1.6000 (+0.0100), with device AMD EPYC, torch 2.13.0",
        "  c-s1: loss 1.7000, published 1.7000 (+0.0000)",
    ]
    assert list(against_published({"new-s1": run(1.0)}, published)) == []


def test_a_run_is_expected_to_take_longer_with_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(20_000, dtype=np.uint8) % 65
    splits = Splits(ids[:16_000], ids[16_000:], CharacterTokenizer([chr(32 + i) for i in range(65)]))
    params = load_params(ROOT / "params.yaml")
    monkeypatch.setattr(expected, "TRIAL_SECONDS", 0.05)
    short = expected.run_seconds(params, "head", splits)
    params.variants["head"] = override(params.variants["head"], ["max_steps=500000"])
    assert short < 60 < expected.run_seconds(params, "head", splits)


def test_times_of_runs_are_kept_in_one_file_and_replaced_run_by_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "TIMINGS", tmp_path / "reports" / "timing.json")

    def record(name: str, scale: float, steps: int) -> None:
        monkeypatch.setattr(
            "chargpt.tracking.read_timing", lambda path: {s: Moment(s * scale, 0.0) for s in range(0, steps, 10)}
        )
        train.record_timing(name, tmp_path / "unused")

    record("a-s1", 0.1, 5001)
    record("b-s1", 0.5, 11)
    record("a-s1", 0.2, 5001)
    times = train.recorded_times()
    assert times["b-s1"] == {0: 0.0, 10: 5.0}
    assert len(times["a-s1"]) == train.MOMENTS + 1
    assert (min(times["a-s1"]), max(times["a-s1"]), times["a-s1"][5000]) == (0, 5000, 1000.0)
    train.TIMINGS.write_text("damaged", encoding="utf-8")
    assert train.recorded_times() == {}
