"""Whole training steps, as `chargpt.training` makes them: tokens per second of the same model on different kernels.

Run as `python -m benchmarks.training_step [--threads 2] [--compile]`. Tokens are random: they change no amount of work.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import torch

from benchmarks.harness import Measurement, compare, report
from chargpt.config import OptimizerConfig, TrainConfig, TransformerConfig, override
from chargpt.data import build_batches
from chargpt.models import LanguageModel, build_model, parameter_count
from chargpt.runtime import Runtime
from chargpt.training import training_step
from chargpt.training.optim import build_optimizers

VOCABULARY = 65
SMALL = TransformerConfig(block_size=64, n_layer=4, n_head=4, n_embd=128)  # nanogpt-cpu in params.yaml
MIDDLE = TransformerConfig(block_size=256, n_layer=6, n_head=6, n_embd=384)  # nanoGPT's train_shakespeare_char
MODELS = (("nanogpt-cpu", SMALL, 12, 1.8), ("10.65M", MIDDLE, 16, 2.2))  # name, model, batch size, goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes to start")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measurements = [
        measure(*model, compiled) for model in MODELS for compiled in ([False, True][: 1 + options.compile])
    ]
    report("training_step", measurements)


def measure(name: str, model: TransformerConfig, batch_size: int, goal: float, compiled: bool) -> Measurement:
    steps = {
        "torch fp32": step(model, batch_size, "torch", "fp32", False),
        "auto fp32": step(model, batch_size, "auto", "fp32", False),
        "auto bf16": step(model, batch_size, "auto", "bf16", False),
    }
    if compiled:
        steps |= {
            "torch fp32 compiled": step(model, batch_size, "torch", "fp32", True),
            "auto fp32 compiled": step(model, batch_size, "auto", "fp32", True),
            "auto bf16 compiled": step(model, batch_size, "auto", "bf16", True),
        }
    pairs = [("torch fp32", other) for other in list(steps)[1:]]
    measured = compare(f"{name} step", steps, pairs, goal=f"{goal}", seconds=20, warm_up=3)
    tokens = batch_size * model.block_size
    speeds = ", ".join(f"{variant} {1e3 * tokens / ms:,.0f}" for variant, ms in measured.median.items())
    count = parameter_count(build_model(model, VOCABULARY, seed=0))
    case = f"{name} ({count / 1e6:.2f} M parameters, {batch_size} x {model.block_size}); tokens/s: {speeds}"
    return dataclasses.replace(measured, case=case)


def step(
    model: TransformerConfig,
    batch_size: int,
    backend: str,
    precision: str,
    compiled: bool,
    vocabulary: int = VOCABULARY,
) -> Callable[[], object]:
    config = TrainConfig(model=model, max_steps=1, batch_size=batch_size, optimizer=OptimizerConfig(), grad_clip=1.0)
    config = override(config, [f"precision={precision}", f"backend={backend}"])
    network = build_model(model, vocabulary, seed=1, backend=backend)
    tokens = np.random.default_rng(2).integers(vocabulary, size=1_000_000, dtype=np.uint16)
    batches = build_batches("random", tokens, batch_size, model.block_size, seed=3)
    runtime = Runtime(torch.device("cpu"), precision, compiled, False, backend, ())
    optimizers = build_optimizers(network, config.optimizer)
    trained = cast(LanguageModel, torch.compile(network)) if compiled else network
    return partial(training_step, trained, optimizers, batches, config, runtime)


if __name__ == "__main__":
    main()
