"""The C++ decoder: tokens a second of each engine, their share of what memory allows, and what precision costs in nats.

Run as `python -m benchmarks.decode [--models modern …] [RUN …]`. Speeds are those of one sample and of 32 together over
10,000 tokens (torch: one window), so rollover is part of them, with all threads and, in brackets, with one;
weights are random, which changes no work.

The share: a single sample reads all weights for every token, and all keys and values that it keeps. Their bytes, over
the speed at which torch.sum reads memory of that size here with as many threads, are the least time of a token; that
over the measured time is shown. Where matrices are multiplied from the first cache, more than 100 % may be reached.

For each RUN, a trained model, the validation tokens are scored through the decoder, window by window as the `full`
protocol does, once with each precision, and the difference to that protocol is shown. Both leave out a last window that
is not whole.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from chargpt.checkpoint import load_model, read_description
from chargpt.config import SampleConfig, TransformerConfig, load_params
from chargpt.config.presets import PRESETS
from chargpt.data import find_splits, load_splits
from chargpt.evaluation import full_loss
from chargpt.generation import NativeDecoder, stream_tokens
from chargpt.generation.native import Precision
from chargpt.models import LanguageModel, build_model

VOCABULARY = 65
TOKENS = 10_000
STREAMS = 32
LARGE = TransformerConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)  # nanoGPT's for Shakespeare
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 64}  # of a matrix, scales included
CACHE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 2.0}


def main() -> None:
    variants = load_params().variants
    configs: dict[str, Any] = {name: variants[name].model for name in ("nanogpt-cpu", "modern")}
    configs |= {"cpu-best": PRESETS["cpu-best"].model, "10.65M": LARGE}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="score these models too")
    parser.add_argument("--models", nargs="*", default=list(configs), choices=list(configs), help="(default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.models:
        print("| model | samples | torch | " + " | ".join(f"C++ {name}" for name in PRECISIONS) + " |")
        print("|---|---:|---:|" + "---:|" * len(PRECISIONS), flush=True)
    for name in options.models:
        for streams in (1, STREAMS):
            model = build_model(configs[name], VOCABULARY, seed=1).eval()
            cells = [f"{torch_speed(model, streams):,.0f}"]
            cells += [cell(model, streams, precision, options.threads) for precision in PRECISIONS]
            print(f"| {name} | {streams} | {' | '.join(cells)} |", flush=True)
    for run in options.runs:
        model, _ = load_model(run)
        folder = find_splits(run, read_description(run)["summary"]["data"])
        if folder is None:
            parser.error(f"the data of {run} is not here")
        tokens = load_splits(folder).val_with_context
        tokens = tokens[: 1 + (len(tokens) - 1) // model.block_size * model.block_size]  # whole windows
        exact = full_loss(model, tokens)
        found = {precision: decoded_loss(model, tokens, precision) for precision in PRECISIONS}
        differences = ", ".join(f"{precision} {loss - exact:+.6f}" for precision, loss in found.items())
        print(f"{run}: full {exact:.6f}; through the decoder {differences}", flush=True)


def torch_speed(model: LanguageModel, streams: int) -> float:
    """Tokens a second of all samples together: the best of three."""
    prompt = torch.zeros(streams, 1, dtype=torch.long)
    count = min(TOKENS // streams, model.block_size)
    config = SampleConfig(max_new_tokens=count, temperature=1.0)
    return count * streams / best_of_three(lambda: list(stream_tokens(model, prompt, config)))


def cell(model: LanguageModel, streams: int, precision: Precision, threads: int) -> str:
    shown = []
    for count in sorted({threads, 1}, reverse=True):
        tokens_a_second = speed(model, streams, precision, count)
        share = f", {tokens_a_second * least_seconds(model, precision, count):.0%}" if streams == 1 else ""
        shown.append(f"{tokens_a_second:,.0f}{share}")
    return " (".join(shown) + ")" * (len(shown) - 1)


def speed(model: LanguageModel, streams: int, precision: Precision, threads: int) -> float:
    decoder = NativeDecoder(model, streams, precision, threads)
    count, config = TOKENS // streams, SampleConfig(temperature=1.0)

    def run() -> None:
        decoder.begin([[0]] * streams, config)
        for _ in decoder.generate(count):
            pass

    return count * streams / best_of_three(run)


def best_of_three(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def least_seconds(model: LanguageModel, precision: Precision, threads: int) -> float:
    """The time that reading all weights, and the keys and values of 3/4 of a window, takes for one token."""
    config: Any = model.config
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    kept = 3 / 4 * config.block_size * config.n_layer * 2 * config.n_embd * (config.n_kv_head or config.n_head)
    size = WEIGHT_BYTES[precision] * weights + CACHE_BYTES[precision] * kept / config.n_head
    torch.set_num_threads(threads)
    memory, times = torch.zeros(round(size) // 4), 20
    again = memory.expand(times, -1)  # read as often, so that the call costs little
    return best_of_three(again.sum) / times


def decoded_loss(model: LanguageModel, tokens: Any, precision: Precision, streams: int = 64) -> float:
    """The `full` loss over `tokens` (N,), each token scored after the decoder read the ones before it in its window."""
    T = model.block_size
    starts = range(0, len(tokens) - 1, T)
    total = 0.0
    for first in range(0, len(starts), streams):
        rows = np.stack([tokens[start : start + T + 1] for start in starts[first : first + streams]]).astype(np.int64)
        decoder = NativeDecoder(model, len(rows), precision)
        decoder.begin(rows[:, :1].tolist())  # rows: (B, T + 1)
        for t in range(1, T + 1):
            logits = decoder.read().double().log_softmax(-1)  # (B, V)
            total -= logits.gather(1, torch.from_numpy(rows[:, t : t + 1])).sum().item()
            if t < T:
                decoder.append(rows[:, t].tolist())
    return total / (len(tokens) - 1)


if __name__ == "__main__":
    main()
