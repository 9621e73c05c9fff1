"""The C++ decoder says what the model says, whatever its parts, and its bits depend on nothing but the stream."""

import copy
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from chargpt.config import BigramConfig, SampleConfig, TransformerConfig
from chargpt.errors import ChargptError, ConfigError
from chargpt.generation import NativeDecoder, choose_engine, generate_text, native, stream_tokens, why_not
from chargpt.kernels import native as modules
from chargpt.kernels.ops.packed_attention import split
from chargpt.models import Ensemble, LanguageModel, Transformer, build_model, transformer
from chargpt.tokenizers import CharacterTokenizer

pytestmark = pytest.mark.skipif(modules.load().module is None, reason="the native module is not here")

V = 13
BASE = TransformerConfig(block_size=16, n_layer=2, n_head=4, n_embd=24)
MODERN = {"position": "rotary", "qk_norm": True, "norm": "rmsnorm", "mlp": "relu2", "bigram_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {**MODERN, "value_embeddings": True, "logit_softcap": 5.0},
    "llama": {"n_kv_head": 2, "mlp": "swiglu", "bias": False, "tied_head": True, "position": "rotary"},
    "bare": {"norm": "none", "mlp": "none", "position": "none"},
    "one kv head": {"mlp": "relu", "n_kv_head": 1, "n_embd": 36, "value_embeddings": True},
    "odd": {"mlp_width": 1.3, "n_embd": 15, "n_head": 3, "n_layer": 3, "block_size": 21},
    "long": {"block_size": 150, "n_head": 1, "n_embd": 34},  # several blocks of keys, and rows that straddle passes
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def made(name: str, seed: int = 3) -> Transformer:
    """With weights so large that every part matters, biases and gains too."""
    model = build_model(dataclasses.replace(BASE, **CONFIGS[name]), V, seed, "torch").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    assert isinstance(model, Transformer)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def windows(lengths: Sequence[int]) -> list[list[int]]:
    return [tokens(length, seed) for seed, length in enumerate(lengths)]


@torch.no_grad()
def recomputed(model: LanguageModel, held: list[list[int]]) -> torch.Tensor:
    """The logits (streams, V) after each window, from all of it."""
    return torch.stack([model.logits(model.hidden(torch.tensor([window]))[0, -1]) for window in held])


@EVERY
@pytest.mark.parametrize("keep", [None, 1, 7, 1000])
def test_the_logits_are_those_of_the_held_window_at_every_step(name: str, keep: int | None) -> None:
    """Over three windows and with prompts of different lengths; the truth is in float64."""
    model, exact = made(name), made(name).double()
    size = model.block_size
    kept = size // 2 if keep is None else min(keep, size)
    held = windows([1, size // 2, size])
    decoder = NativeDecoder(model, 3, threads=1)
    decoder.begin(held, SampleConfig(keep=keep))
    for step in range(3 * size if keep is None and size < 100 else 20):
        got, wanted = decoder.read(), recomputed(exact, held)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)
        new = tokens(3, seed=100 + step)
        decoder.append(new)
        for window, token in zip(held, new, strict=True):
            window.append(token)
            if len(window) > size:
                del window[:-kept]


def half(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x)


def whole(x: torch.Tensor) -> torch.Tensor:
    """In steps of a 127th of the largest magnitude of each 64 along the last dimension."""
    groups = x.split(64, -1)
    steps = [group.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127 for group in groups]
    return torch.cat([(group / step).round() * step for group, step in zip(groups, steps, strict=True)], -1)


def rounded(
    model: Transformer, held: list[list[int]], precision: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (streams, V) of a model that rounds what the decoder's precision rounds, the exact ones), in float64."""
    exact = copy.deepcopy(model).double()
    wanted = recomputed(exact, held)
    reduced = half if precision == "bf16" else whole
    if exact.head is None:
        exact.head = nn.Linear(model.width, V, bias=False).double()
        exact.head.weight = nn.Parameter(exact.token_embedding.weight.detach().clone())
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(reduced(module.weight.detach()))
            module.register_forward_pre_hook(lambda _, given: (reduced(given[0]),))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        q, k, v = half(q), *(half(x).repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~torch.ones(2 * q.shape[-2:-1]).tril().bool(), -torch.inf)
        weights = half((scores - scores.amax(-1, keepdim=True)).exp())
        return weights @ v / weights.sum(-1, keepdim=True)

    def packed(qkv: torch.Tensor, n_head: int, n_kv_head: int, **_: Any) -> torch.Tensor:
        return attention(*split(qkv, n_head, n_kv_head)).transpose(1, 2).flatten(2)

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "causal_attention", attention)
        patch.setattr(transformer, "packed_causal_attention", packed)
        return recomputed(exact, held), wanted


@EVERY
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_lower_precision_is_the_model_with_what_it_multiplies_rounded(
    name: str, precision: native.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what lies in the middle between two roundings: so the error left is far below that of rounding itself."""
    model, left, made_by_rounding = made(name), 0.0, 0.0
    for lengths in ([3, 9], [1, 14], [16, 8], [5, 11]):
        held = windows(lengths)
        decoder = NativeDecoder(model, 2, precision)
        decoder.begin(held)
        wanted, exact = rounded(model, held, precision, monkeypatch)
        left += (decoder.read() - wanted).square().sum().item()
        made_by_rounding += (wanted - exact).square().sum().item()
    assert 0 < left < 0.05 * made_by_rounding


@EVERY
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_bits_depend_on_the_stream_alone(name: str, precision: native.Precision) -> None:
    """Not on threads, on neighbours, or on how many tokens were read together."""
    model = made(name)
    size = model.block_size
    held = windows([size, 2, size // 2])
    alone = []
    for window in held:
        decoder = NativeDecoder(model, 1, precision, threads=1)
        decoder.begin([window[:1]])
        for token in window[1:]:
            decoder.read()
            decoder.append([token])
        alone.append(decoder.read()[0])
    for threads in (1, 2, 3):
        for chosen in ([0, 1, 2], [2, 0], [1], [0] * 9):
            decoder = NativeDecoder(model, len(chosen), precision, threads)
            decoder.begin([held[number] for number in chosen])
            assert torch.equal(decoder.read(), torch.stack([alone[number] for number in chosen]))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1e-12},
    {"temperature": 50.0, "top_p": 0.3},
    {"top_k": 1},
    {"top_k": 10**30, "top_p": 1.0, "min_p": 1.0},
    {"keep": 3, "temperature": 2.0, "seed": 2**63 - 1},
]


@EVERY
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_draws_are_those_of_torch(name: str, options: dict[str, Any], biased: bool) -> None:
    model, count = made(name), 70
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1)) if biased else None
    if bias is not None:
        bias[[2, 7]] = -torch.inf
    prompt = torch.tensor([tokens(5)]).expand(3, -1)
    config = SampleConfig(**{"max_new_tokens": count, "temperature": 1.0, "seed": 5} | options)
    wanted = list(stream_tokens(model, prompt, config, bias))
    decoder = NativeDecoder(model, 3, threads=1)
    decoder.begin(prompt.tolist(), config, bias)
    got = list(decoder.generate(count))
    assert [len(burst.tokens) for burst in got[:3]] == [1, 2, 4]
    assert torch.equal(torch.cat([burst.tokens for burst in got]), torch.cat([step.tokens for step in wanted]))
    logprobs = torch.cat([burst.logprobs for burst in got])
    torch.testing.assert_close(logprobs, torch.cat([step.logprobs for step in wanted]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_streams_come_and_go_and_none_notices(precision: native.Precision) -> None:
    """A thousand schedules, half of them here: whoever else runs, a stream writes what it writes alone."""
    model, generator = made("modern"), torch.Generator().manual_seed(1)
    requests = []
    for number in range(8):
        config = SampleConfig(
            temperature=(1.0, 0.5, 3.0)[number % 3],
            top_k=(None, 3)[number % 2],
            min_p=(None, 0.1)[number // 4],
            keep=(None, 3)[number // 2 % 2],
            seed=number // 3,
        )
        bias = torch.randn(V, generator=generator) if number % 4 == 1 else None
        requests.append((tokens(1 + 5 * (number % 4), seed=number % 2), config, number, bias))
    length, wanted = 20, []
    for request in requests:
        decoder = NativeDecoder(model, 1, precision, threads=1)
        decoder.join(0, *request)
        drawn = decoder.burst(length, 1)
        wanted.append((drawn.tokens[:, 0].tolist(), drawn.logprobs[:, 0].tolist()))
    decoder = NativeDecoder(model, 5, precision, threads=2)

    def chance(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for _ in range(500):
        waiting = torch.randperm(len(requests), generator=generator).tolist()[: 1 + chance(8)]
        running: dict[int, tuple[int, list[int], list[float]]] = {}  # by slot: the request, what it got
        while waiting or running:
            free = [slot for slot in range(5) if slot not in running]
            while waiting and free and chance(3):
                slot = free.pop(chance(len(free)))
                running[slot] = (waiting.pop(), [], [])
                decoder.join(slot, *requests[running[slot][0]])
            if not running:
                continue
            drawn = decoder.burst(1 + chance(9), 1 + (chance(10) == 0))
            assert decoder.running == sorted(running)
            for column, slot in enumerate(sorted(running)):
                number, got, logprobs = running[slot]
                got += drawn.tokens[:, column].tolist()
                logprobs += drawn.logprobs[:, column].tolist()
                left = chance(20) == 0  # a client that goes away
                if left or len(got) >= length:
                    count = min(len(got), length)
                    assert (got[:count], logprobs[:count]) == (wanted[number][0][:count], wanted[number][1][:count])
                    decoder.leave(slot)
                    del running[slot]


def test_one_thread_or_all_whichever_is_faster_now() -> None:
    team, used = native.Team(4), []

    def decode(slow: int, threads: int) -> None:
        used.append(threads)
        if threads == slow:
            time.sleep(0.002)

    def run(slow: int, bursts: int) -> list[int]:
        used.clear()
        for _ in range(bursts):
            team.timed(64, partial(decode, slow))
        return used.copy()

    trial = [4] * team.TRIAL + [1] * team.TRIAL
    rest = team.FIRST - len(trial)
    assert run(4, team.SHORT) == [4] * team.SHORT  # all, until bursts are long enough
    assert run(4, team.FIRST) == trial + [1] * rest
    assert run(4, 2 * team.FIRST) == trial + [1] * (rest + team.FIRST)  # tried ever more seldom
    assert run(1, team.FIRST) == trial + [4] * rest  # until it changes
    assert [team.tried for team in (native.Team(1), native.Team(4, alone=False))] == [None, None]
    team = native.Team(4, alone=False)
    assert run(4, 2 * team.FIRST) == [4] * 2 * team.FIRST
    assert native.Team(1).timed(1, lambda threads: threads)[0] == 1


def test_trials_are_short_so_that_they_cost_little() -> None:
    team, lengths = native.Team(2), []
    for _ in range(team.SHORT + team.FIRST):
        lengths.append(team.most())
        team.timed(lengths[-1], lambda threads: threads)
    trial = [team.TOKENS] * 2 * team.TRIAL
    assert lengths[team.SHORT :] == trial + [native.MOST_AT_ONCE] * (team.FIRST - len(trial))


@pytest.mark.parametrize("engine", ["torch", "fp32", "bf16", "int8", "auto"])
def test_every_engine_writes_text(engine: Any) -> None:
    tokenizer = CharacterTokenizer("abcdefghijklm")
    config = SampleConfig(num_samples=2, max_new_tokens=100, engine=engine, stop=("zz",))
    texts = generate_text(made("modern"), tokenizer, "ab", config)
    assert [len(text) for text in texts] == [102, 102]
    if engine in ("torch", "fp32"):
        other = dataclasses.replace(config, engine="torch")
        assert texts == generate_text(made("modern"), tokenizer, "ab", other)


def test_what_cpp_cannot_decode_goes_to_torch_and_says_why() -> None:
    model = made("gpt2")
    asked: tuple[Any, ...] = ("auto", "fp32", "bf16", "int8", "torch")
    assert [choose_engine(model, engine).engine for engine in asked] == ["int8", *asked[1:]]
    without = build_model(dataclasses.replace(BASE, residual=False, norm="none", mlp="none", n_layer=1), V, 1)
    quantised = made("gpt2")
    quantised.head = nn.Identity()  # type: ignore[assignment]
    for other, reason in (
        (build_model(BigramConfig(), V, 1), "not BigramLanguageModel"),
        (Ensemble([model, model]), "not Ensemble"),
        (without, "with a residual stream"),
        (quantised, "the head is a Identity"),
        (copy.deepcopy(model).to("meta"), "not on the CPU"),
    ):
        assert reason in str(why_not(other))
        assert choose_engine(other).engine == "torch"
        assert reason in choose_engine(other).why
        with pytest.raises(ConfigError, match="engine fp32 cannot generate here"):
            choose_engine(other, "fp32")
        with pytest.raises(ChargptError, match=reason):
            NativeDecoder(other, 1)


def test_broken_weights_are_one_sentence() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        model = made("gpt2")
        with torch.no_grad():
            model.norm.weight.fill_(value)
        decoder = NativeDecoder(model, 2)
        decoder.begin([[1], [2]])
        with pytest.raises(ChargptError, match="not finite numbers"):
            list(decoder.generate(3))


def test_nonsense_is_refused_and_reads_no_memory() -> None:
    decoder = NativeDecoder(made("gpt2"), 2)
    with pytest.raises(ValueError, match="no stream runs"):
        decoder.read()
    for wrong in ([[1], [2], [3]], [[1], []], [[1], [V]], [[1], [-1]]):
        with pytest.raises(ValueError, match=r"slot|window|vocabulary"):
            decoder.begin(wrong)
    for slot in (-1, 2, 2**62):
        with pytest.raises(ValueError, match="slot that is not there"):
            decoder.join(slot, [1], SampleConfig(), 0)
        with pytest.raises(ValueError, match="slot that is not there"):
            decoder.leave(slot)
    for bias in (torch.zeros(V - 1), torch.zeros(V).double(), torch.zeros(2 * V)[::2]):
        with pytest.raises(ValueError, match="bias is"):
            decoder.join(0, [1], SampleConfig(), 0, bias)
    decoder.begin([[1], [2] * 1000])  # the last block_size of them
    assert decoder.read().isfinite().all()
    for wrong_tokens in ([1], [1, 2, 3], [1, V], [-1, 1], [2**40, 1]):
        with pytest.raises((ValueError, TypeError)):
            decoder.append(wrong_tokens)
    with pytest.raises(ValueError, match="nothing to read"):
        decoder.read()


def test_weights_are_taken_as_they_are_when_it_is_made() -> None:
    model = made("gpt2")
    decoder = NativeDecoder(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    decoder.begin([[1, 2, 3]])
    torch.testing.assert_close(decoder.read(), recomputed(made("gpt2"), [[1, 2, 3]]), rtol=1e-4, atol=1e-4)


def test_more_streams_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    model = build_model(config, 11, 1).eval()
    stream = 2 * 2 * 2 * 8 * 32 * 4  # keys and values, layers, kv heads, their channels, positions, bytes
    monkeypatch.setattr("chargpt.generation.native.available_memory", lambda device: 3 * stream)
    for precision, most in (("fp32", 3), ("bf16", 6), ("int8", 6)):
        NativeDecoder(model, most, precision)  # type: ignore[arg-type]
        with pytest.raises(ChargptError, match=f"{most + 1} streams take .* --slots"):
            NativeDecoder(model, most + 1, precision)  # type: ignore[arg-type]
