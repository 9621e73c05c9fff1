"""What a training step costs, by size: from 1M to 124M parameters, T from 64 to 2048, V of 65 and 50,257.

Run as `python -m benchmarks.cost [--threads 2]`; it takes some minutes and 5 GiB, writes benchmarks/results/cost.json
and draws docs/cost.png. A step reads 2048 tokens, in bfloat16 where the CPU multiplies it, without dropout.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.harness import compare, report
from benchmarks.training_step import step
from chargpt.config import TransformerConfig
from chargpt.files import replaced_file
from chargpt.models import build_model, parameter_count

TOKENS = 2048  # in a step
SIZES = ((4, 4, 144), (5, 4, 256), (6, 6, 384), (9, 9, 576), (12, 12, 768))  # layers, heads, channels
LENGTHS = (64, 256, 1024, 2048)
VOCABULARIES = (65, 50257)
PICTURE = Path("docs/cost.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    torch.set_num_threads(parser.parse_args().threads)
    measured, seconds = [], {}
    for V, (n_layer, n_head, n_embd) in itertools.product(VOCABULARIES, SIZES):
        for T in LENGTHS:
            model = TransformerConfig(block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
            one = compare(
                f"{n_layer} layers of {n_embd} channels, T = {T}, V = {V}",
                {"step": step(model, TOKENS // T, "auto", "bf16", False, V)},
                [],
                seconds=3,
                warm_up=1,
            )
            count = parameter_count(build_model(model, V, seed=0))
            seconds[V, T, count] = one.median["step"] / TOKENS
            measured.append(one)
            print(f"{one.case}: {one.median['step']:.0f} ms", flush=True)
    report("cost", measured)
    draw(seconds)


def draw(milliseconds: Mapping[tuple[int, int, int], float]) -> None:
    """milliseconds: of a token, by vocabulary, length and number of parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, V in zip(figure.subplots(1, 2, sharey=True), VOCABULARIES, strict=True):
        for T in LENGTHS:
            points = [(count, cost) for (v, t, count), cost in milliseconds.items() if (v, t) == (V, T)]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"T = {T}")
        axes.set(xscale="log", yscale="log", xlabel="parameters", title=f"V = {V:,}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.axes[0].set_ylabel("milliseconds of training a token")
    with replaced_file(PICTURE) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
