"""A training step beside nanoGPT's, in one process, with the model file that its authors ship.

Run as `python -m benchmarks.against_nanogpt FOLDER [--threads 2] [--only NAME]`, where FOLDER is a checkout of nanoGPT:
its model.py is imported from there. Both train the same shapes on the same random tokens: forward, backward, clipping
to a norm of 1, AdamW. nanoGPT's step is what its train.py does, in float32 on a CPU, and under bfloat16 autocast.

A step's share: its floating-point operations over those that torch's bfloat16 products of (4096, C, 4 C) do in the
time.
"""

import argparse
import dataclasses
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Measurement, compare, milliseconds, report
from benchmarks.training_step import MIDDLE, SMALL, step
from chargpt.config import TransformerConfig

GPT2 = TransformerConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """vocabulary: tokens; goal: times faster than nanoGPT in float32."""

    name: str
    model: TransformerConfig
    vocabulary: int
    batch_size: int
    goal: str
    precision: str = "bf16"  # of ours


CASES = (
    Case("CPU configuration", SMALL, 65, 12, "4"),
    Case("10.65M", MIDDLE, 65, 16, "4.4"),
    Case("10.65M, dropout 0.2", dataclasses.replace(MIDDLE, dropout=0.2), 65, 16, "5"),
    Case("10.65M, dropout 0.2, float32", dataclasses.replace(MIDDLE, dropout=0.2), 65, 16, "1.8", "fp32"),
    Case("GPT-2 124M, T = 1024", GPT2, 50257, 1, "3.8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--only", help="cases whose name holds this (default: all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each case (default: %(default)s)")
    options = parser.parse_args()
    if not (options.folder / "model.py").is_file():
        sys.exit(f"{options.folder} has no model.py: give a checkout of nanoGPT")
    torch.set_num_threads(options.threads)
    chosen = [case for case in CASES if options.only is None or options.only in case.name]
    measured = [measure(case, options.folder, options.seconds) for case in chosen]
    memory = {
        f"memory of {case.name}": ", ".join(
            f"{who} {peak(case, options.folder, who, options.threads) / 2**30:.2f} GiB" for who in ("nanoGPT", "ours")
        )
        for case in chosen
        if case.model is GPT2
    }
    report("against_nanogpt", measured, memory)


def measure(case: Case, folder: Path, seconds: float) -> Measurement:
    ours = our_step(case)
    steps = {
        "nanoGPT": their_step(case, folder, "fp32"),
        "nanoGPT bf16": their_step(case, folder, "bf16"),
        "ours": ours,
    }
    pairs = [("nanoGPT", "ours"), ("nanoGPT bf16", "ours")]
    found = compare(case.name, steps, pairs, goal=f"{case.goal} of the first", seconds=seconds, warm_up=2)
    rate = product_rate(case.model.n_embd)
    with FlopCounterMode(display=False) as counter:
        ours()
    reached = counter.get_total_flops() / found.median["ours"] * 1e3
    share = f"ours: {reached / 1e9:.0f} GF/s, {reached / rate:.0%} of bfloat16 products"
    return dataclasses.replace(found, case=f"{case.name} ({share})")


def our_step(case: Case) -> Callable[[], object]:
    return step(case.model, case.batch_size, "auto", case.precision, False, case.vocabulary)


def their_step(case: Case, folder: Path, precision: str) -> Callable[[], object]:
    """What train.py does in a step, with its defaults: the betas, the decay, the norm."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    config = case.model
    torch.manual_seed(1)
    model = module.GPT(
        module.GPTConfig(
            block_size=config.block_size,
            vocab_size=case.vocabulary,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
            bias=config.bias,
        )
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    return partial(one_step, model, optimizer, case, precision)


def one_step(model: Any, optimizer: torch.optim.Optimizer, case: Case, precision: str) -> None:
    tokens = torch.randint(case.vocabulary, (case.batch_size, case.model.block_size + 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        _, loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def product_rate(C: int) -> float:
    """Floating-point operations a second of torch's bfloat16 products, the best of several."""
    a, b = torch.randn(4096, C).bfloat16(), torch.randn(C, 4 * C).bfloat16()
    best = min(milliseconds(lambda: a @ b) for _ in range(20))
    return 2 * 4096 * C * 4 * C / best * 1e3


def peak(case: Case, folder: Path, who: str, threads: int) -> int:
    """Bytes of memory that a process of its own takes at most in three steps, in float32 for nanoGPT."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_here, (case, folder, who, threads))


def peak_here(case: Case, folder: Path, who: str, threads: int) -> int:
    torch.set_num_threads(threads)
    one = our_step(case) if who == "ours" else their_step(case, folder, "fp32")
    for _ in range(3):
        one()
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage would count the parent's memory too
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
