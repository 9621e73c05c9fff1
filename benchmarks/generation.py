"""Generation with a cache against reading the whole window for every token, in tokens a second.

Run as `python -m benchmarks.generation [--threads 2]`. One sample goes on from a full window over the length of another
one, so that it holds what reading again costs when the window is full. Weights are random: they change no amount of
work.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.harness import compare, report
from chargpt.config import ModelConfig, TransformerConfig, load_params
from chargpt.generation import generate
from chargpt.models import build_model

VOCABULARY = 65
LARGE = TransformerConfig(block_size=256, n_layer=6, n_head=6, n_embd=384)  # nanoGPT's model for Shakespeare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    variants = load_params().variants
    models = {name: variants[name].model for name in ("nanogpt-cpu", "modern")} | {"10.65M": LARGE}
    measurements = []
    for name, config in models.items():
        tokens = config.block_size
        case = f"{name}: {tokens} tokens after a full window of {tokens}"
        functions = {"cache": generation(config, None), "whole window": generation(config, tokens)}
        found = compare(case, functions, [("whole window", "cache")], goal="5", seconds=8)
        speeds = ", ".join(f"{which} {1e3 * tokens / found.median[which]:,.0f}" for which in functions)
        print(f"{name}: tokens a second: {speeds}")
        measurements.append(found)
    report("generation", measurements)


def generation(config: ModelConfig, keep: int | None) -> Callable[[], object]:
    model = build_model(config, VOCABULARY, seed=1).eval()
    prompt = torch.randint(VOCABULARY, (1, config.block_size), generator=torch.Generator().manual_seed(2))
    return lambda: generate(model, prompt, config.block_size, keep=keep)


if __name__ == "__main__":
    main()
