"""Whether the C++ decoder is right and fast on the CPU at hand: what `chargpt info --check` asks beside the kernels."""

import dataclasses
from typing import cast

import torch

from chargpt.config import SampleConfig, TransformerConfig
from chargpt.config.presets import PRESETS
from chargpt.generation.native import PRECISIONS, NativeDecoder
from chargpt.generation.sampler import stream_tokens
from chargpt.kernels.check import Finding, ratio
from chargpt.models import Transformer

ALLOWED = {"fp32": 1e-4, "bf16": 0.02, "int8": 0.06}  # error of the logits, relative to their size
TOKENS = 48  # that are decoded, and timed
ROUNDS = 5  # of timing
VOCABULARY = 65
GPT = dataclasses.replace(cast(TransformerConfig, PRESETS["nanogpt-cpu"].model), bias=True)
MODERN = dataclasses.replace(cast(TransformerConfig, PRESETS["modern"].model), block_size=64, n_kv_head=2)


def check() -> Finding:
    """Logits of two small models in every precision against torch's in float64, and int8's speed against torch's."""
    problems = []
    for config in (GPT, MODERN):
        model = _model(config)
        tokens = torch.randint(VOCABULARY, (config.block_size,), generator=torch.Generator().manual_seed(1)).tolist()
        with torch.no_grad():
            truth = _model(config).double()
            expected = truth.logits(truth.hidden(torch.tensor([tokens])))[0]  # (T, V)
        for precision in PRECISIONS:
            decoder = NativeDecoder(model, 1, precision)
            decoder.begin([tokens[:TOKENS]])  # read at once, and the rest one by one
            got = [decoder.read()[0]]
            for token in tokens[TOKENS:]:
                decoder.append([token])
                got.append(decoder.read()[0])
            missed = torch.stack(got).double() - expected[TOKENS - 1 :]
            error = (missed.square().mean() / expected[TOKENS - 1 :].square().mean()).sqrt().item()
            if not error <= ALLOWED[precision]:
                problems.append(f"{precision} with {config.norm}: an error of {error:.2g} of the logits' size")
    return Finding(2 * len(PRECISIONS), problems, _speed(_model(GPT)))


def _model(config: TransformerConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, VOCABULARY, backend="torch").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)  # embeddings that begin at zero would hide theirs
    return model


def _speed(model: Transformer) -> float:
    config, decoder = SampleConfig(max_new_tokens=TOKENS, seed=1), NativeDecoder(model, 1, "int8")

    def by_torch() -> None:
        for _ in stream_tokens(model, torch.zeros(1, 1, dtype=torch.int64), config):
            pass

    def natively() -> None:
        decoder.begin([[0]], config)
        for _ in decoder.generate(TOKENS):
            pass

    return ratio(by_torch, natively, ROUNDS)
