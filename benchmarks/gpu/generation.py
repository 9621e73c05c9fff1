"""Generation by the 10.65 M model and GPT-2's smallest shape: tokens per second, eager and as one CUDA graph a token.

Behind half a window as the prompt, for one sample and for 32, drawn at temperature 1, by the host's clock and with the
recording. Weights are random: they change no amount of work. Both ways draw the same tokens, but for sums in another
order.
"""

import dataclasses
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.program import Program
from benchmarks.gpu.training import MODEL, TINY
from benchmarks.harness import milliseconds
from chargpt.config import TransformerConfig
from chargpt.generation.graph import GraphedReader, record
from chargpt.generation.sampler import draw, next_token_probabilities, uniforms
from chargpt.models import LanguageModel, build_model
from chargpt.models.cache import TransformerCache

GPT2 = TransformerConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768, tied_head=True)
CASES = (("10.65M", dataclasses.replace(MODEL, dropout=0.0), 65), ("124M", GPT2, 50_257))
BATCHES = (1, 32)
MOST = 200  # tokens of a sample


def main() -> None:
    program = Program(__doc__)
    for name, config, vocabulary in CASES:
        if program.dry:
            config, vocabulary = dataclasses.replace(TINY, dropout=0.0), 65
        model = build_model(config, vocabulary, seed=1).to(program.device).eval()
        for batch in BATCHES:
            measure(program, f"{name}, {batch}", model, batch)
    program.finish()


def measure(program: Program, case: str, model: LanguageModel, batch: int) -> None:
    count = min(MOST, model.block_size // 2)
    prompt = torch.zeros(batch, model.block_size // 2, dtype=torch.long, device=program.device)
    ways = {way: partial(generate, model, prompt, count, way == "graph", program.dry) for way in ("eager", "graph")}

    def whole(function: partial[Tensor]) -> float:
        def run() -> None:
            function()
            program.synchronize()

        program.synchronize()
        return milliseconds(run)

    times = program.time(case, dict(ways), {}, seconds=4, timer=whole)  # type: ignore[arg-type]
    if times is not None:
        drawn = [way() for way in ways.values()]
        program.record(
            {
                "case": case,
                **times.summary(),
                "tokens_per_second": {name: 1e3 * batch * count / times.median(name) for name in times.times},
                "ratio": {"graph": {"eager": times.ratio("eager", "graph")}} if len(times.times) == 2 else {},
                "alike": (drawn[0] == drawn[1]).double().mean().item(),  # share of the tokens
            }
        )


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, count: int, graphed: bool, dry: bool) -> Tensor:
    """`count` tokens after `prompt` (B, T): (B, count)."""
    cache = model.new_cache()
    assert isinstance(cache, TransformerCache)

    def read(tokens: Tensor) -> Tensor:
        return model.logits(model.hidden(tokens, cache)[:, -1])

    reader = GraphedReader(cache, read, (lambda step: step) if dry else record) if graphed else read
    numbers = uniforms(1, len(prompt), 0).to(prompt.device)  # (BLOCK, B)
    tokens, drawn = prompt, []
    for position in range(count):
        tokens = draw(next_token_probabilities(reader(tokens)), numbers[position])
        drawn.append(tokens)
    return torch.cat(drawn, 1)


if __name__ == "__main__":
    main()
