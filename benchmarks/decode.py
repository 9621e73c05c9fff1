"""The C++ decoder: tokens a second with each engine, and what weights in bfloat16 cost in nats.

Run as `python -m benchmarks.decode [--threads 2] [RUN …]`. Speeds are those of one sample and of 32 together over
10,000 tokens (torch: two windows at most), so rollover is part of them; weights are random, which changes no work.

For each RUN, a trained model, the validation tokens are scored through the decoder, window by window as the `full`
protocol does, once with each precision, and the difference to that protocol is shown. Both leave out a last window that
is not whole.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chargpt.checkpoint import load_model, read_description
from chargpt.config import SampleConfig, TransformerConfig, load_params
from chargpt.data import find_splits, load_splits
from chargpt.evaluation import full_loss
from chargpt.generation import NativeDecoder, stream_tokens
from chargpt.models import LanguageModel, build_model

VOCABULARY = 65
TOKENS = 10_000
STREAMS = 32
LARGE = TransformerConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)  # nanoGPT's for Shakespeare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="score these models too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants = load_params().variants
    models: dict[str, Any] = {name: variants[name].model for name in ("nanogpt-cpu", "modern")}
    print("| model | samples | torch | C++ fp32 | C++ bf16 |\n|---|---:|---:|---:|---:|", flush=True)
    for name, config in (models | {"10.65M": LARGE}).items():
        for streams in (1, STREAMS):
            model = build_model(config, VOCABULARY, seed=1).eval()
            speeds = [f"{speed(model, streams, engine):,.0f}" for engine in ("torch", "fp32", "bf16")]
            print(f"| {name} | {streams} | {' | '.join(speeds)} |", flush=True)
    for run in options.runs:
        model, _ = load_model(run)
        folder = find_splits(run, read_description(run)["summary"]["data"])
        if folder is None:
            parser.error(f"the data of {run} is not here")
        tokens = load_splits(folder).val_with_context
        tokens = tokens[: 1 + (len(tokens) - 1) // model.block_size * model.block_size]  # whole windows
        exact = full_loss(model, tokens)
        found = {precision: decoded_loss(model, tokens, precision) for precision in ("fp32", "bf16")}
        differences = ", ".join(f"{precision} {loss - exact:+.6f}" for precision, loss in found.items())
        print(f"{run}: full {exact:.6f}; through the decoder {differences}", flush=True)


def speed(model: LanguageModel, streams: int, engine: Any) -> float:
    """Tokens a second of all samples together: the best of three."""
    prompt = torch.zeros(streams, 1, dtype=torch.long)
    count = TOKENS // streams if engine != "torch" else min(TOKENS // streams, 2 * model.block_size)
    config, seconds = SampleConfig(max_new_tokens=count, temperature=1.0), []
    for _ in range(3):
        start = time.perf_counter()
        if engine == "torch":
            made = sum(len(step.tokens) for step in stream_tokens(model, prompt, config))
        else:
            decoder = NativeDecoder(model, streams, engine)
            decoder.begin(prompt.tolist())
            made = sum(len(burst.tokens) for burst in decoder.generate(config))
        seconds.append(time.perf_counter() - start)
    return made * streams / min(seconds)


def decoded_loss(model: LanguageModel, tokens: Any, precision: Any, streams: int = 64) -> float:
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
