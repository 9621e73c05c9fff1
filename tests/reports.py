"""Runs as `pipelines.compare` reads them, made up for the tests of the page that compares them."""

import math
from datetime import UTC, datetime
from typing import Any

from chargpt.report import CurvePoint, Provenance, Row, Variant

SHA256 = "0123456789abcdef" * 4
PROVENANCE = Provenance("shakespeare", SHA256, "c0ffee" * 6 + "beef", False, datetime(2026, 11, 25, 1, 2, tzinfo=UTC))
Points = list[CurvePoint]


def row(variant: str, seed: int, loss: float, **more: Any) -> Row:
    return {
        "variant": variant,
        "seed": seed,
        "parameters": 804_096,
        "steps": 2000,
        "tokens": 1_536_000,
        "seconds": 70.25,
        "tokens_per_second": 21_868.4,
        "val_full": loss,
        "bits_per_byte": loss / math.log(2),
        "val_sliding": loss - 0.01,
        "val_nanogpt": loss + 0.01,
        "weights_sha256": SHA256,
        "backend": "cpp",
        "device": "AMD EPYC",
        "threads": 2,
        "precision": "fp32",
        "torch": "2.13.0+cpu",
    } | more


def points(end: float, steps: int = 1000, tokens: int = 100, seconds: float = 50.0, interval: int = 100) -> Points:
    """A curve that falls from 4 to `end`, evaluated every `interval` steps, with a training loss every 10."""
    curve: Points = [CurvePoint(0, 0, 0.0, None, 4.0)]
    for step in range(10, steps + 1, 10):
        loss = end + (4 - end) * math.exp(-8 * step / steps)
        val = loss if step % interval == 0 else None
        curve.append(CurvePoint(step, step * tokens, seconds * step / steps, loss - 0.1, val))
    return curve


def variant(name: str, losses: list[float], curves: list[Points] | None = None, **more: Any) -> Variant:
    return Variant(
        name=name,
        rows=[row(name, seed, loss, **more) for seed, loss in enumerate(losses, 1)],
        curves=curves or [points(loss) for loss in losses],
        sample=f"{name} says: what light",
        sample_settings="no prompt, temperature 0.8",
        command=f"dvc repro train@{name}-1",
    )
