"""Sampling: from logits to tokens, against a naive reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.config import BigramConfig, SampleConfig, TransformerConfig
from chargpt.errors import ChargptError
from chargpt.generation import generate, next_token_probabilities, stream_tokens
from chargpt.generation.sampler import BLOCK, draw, uniforms
from chargpt.models import build_model
from generation.spy import SpyModel
from kernels.cases import naive_philox

SMALL = TransformerConfig(block_size=6, n_layer=1, n_head=2, n_embd=8)


# -------------------------------------------------------------------------------------------- logits to probabilities


def naive_probabilities(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """One row at a time in Python's floats: sort, cut, normalise. Ties are broken by the smaller id."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    order = order[:top_k]
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    if top_p is not None and top_p < 1:
        total, reached = sum(weights.values()), 0.0
        kept: dict[int, float] = {}
        for token in order:
            if reached / total >= top_p:
                break
            kept[token] = weights[token]
            reached += weights[token]
        weights = kept
    return [weights.get(token, 0.0) / sum(weights.values()) for token in range(len(logits))]


# Whole and half numbers make many ties. The odd top_p are never a sum of a few equal shares, where rounding decides.
@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.1, 0.8, 1.0, 3.0]),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.sampled_from([None, 0.0137, 0.3141, 0.7321, 0.9573, 1.0]),
)
def test_probabilities_are_those_of_the_naive_reference(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    got = next_token_probabilities(torch.tensor([logits, logits]), temperature, top_k, top_p)
    assert got.dtype == torch.float32
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got.sum(-1), torch.ones(2), atol=1e-6, rtol=0)
    wanted = torch.tensor(naive_probabilities(logits, temperature, top_k, top_p))
    torch.testing.assert_close(got[0], wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(got[0] > 0, wanted > 0)


def test_rows_are_cut_one_by_one() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
    probabilities = next_token_probabilities(logits, top_k=1)
    assert probabilities.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert next_token_probabilities(torch.tensor([[1.0, 3.0, 3.0]]), 0).tolist() == [[0, 1, 0]]


def test_top_k_keeps_exactly_k_and_of_equals_the_first() -> None:
    probabilities = next_token_probabilities(torch.tensor([[1.0, 1.0, 2.0, 1.0]]), top_k=2)
    assert (probabilities[0] > 0).tolist() == [True, False, True, False]
    assert torch.equal(
        next_token_probabilities(torch.zeros(1, 5), top_k=1), next_token_probabilities(torch.zeros(1, 5), 0)
    )


def test_of_many_equal_logits_the_first_are_kept() -> None:
    """From 17 values on an unstable sort mixes equal ones."""
    assert next_token_probabilities(torch.zeros(1, 65), top_k=3).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert next_token_probabilities(torch.zeros(1, 4), top_p=0.5).nonzero()[:, 1].tolist() == [0, 1]  # reached exactly


def test_top_p_keeps_at_least_one_and_just_enough() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {p: int((next_token_probabilities(logits, top_p=p) > 0).sum()) for p in (1e-9, 0.49, 0.51, 0.79, 0.81, 0.96)}
    assert kept == {1e-9: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.96: 4}


def test_top_p_one_changes_nothing_even_far_down_the_tail() -> None:
    logits = torch.cat([torch.zeros(1, 1000), torch.full((1, 1000), -15.0)], dim=1)
    probabilities = next_token_probabilities(logits, top_p=1.0)
    torch.testing.assert_close(probabilities, next_token_probabilities(logits), atol=0, rtol=1e-6)
    assert probabilities.min() > 0
    faint = torch.tensor([[0.0, -50.0]])  # 2e-22: lost in a running sum, even in float64
    assert next_token_probabilities(faint, top_p=1.0)[0, 1] > 0


def test_top_p_counts_what_top_k_left() -> None:
    # 0.4 and 0.3 of what four tokens share are 4/7 and 3/7 of what two of them share.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert (next_token_probabilities(logits, top_k=2, top_p=0.55)[0] > 0).sum() == 1
    assert (next_token_probabilities(logits, top_p=0.55)[0] > 0).sum() == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300, 5e-324])
def test_a_temperature_near_zero_is_nearly_greedy_and_never_nan(temperature: float) -> None:
    probabilities = next_token_probabilities(torch.tensor([[-2.0, 7.0, 5.0], [3.0, 3.0, 0.0]]), temperature)
    assert probabilities.tolist() == [[0, 1, 0], [0.5, 0.5, 0]]


def test_a_high_temperature_is_nearly_uniform() -> None:
    probabilities = next_token_probabilities(torch.tensor([[-2.0, 7.0, 5.0]]), 1e9)
    torch.testing.assert_close(probabilities, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, math.inf], [math.inf, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_without_a_softmax_are_an_error_for_the_user(row: list[float], temperature: float) -> None:
    with pytest.raises(ChargptError, match="weights are broken"):
        next_token_probabilities(torch.tensor([[0.0, 1.0], row]), temperature)


def test_a_forbidden_token_is_never_drawn() -> None:
    assert next_token_probabilities(torch.tensor([[-math.inf, 0.0, 0.0]])).tolist() == [[0, 0.5, 0.5]]


def test_half_precision_logits_give_float32_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(next_token_probabilities(logits), logits.float().softmax(-1))


def test_the_logits_are_left_alone() -> None:
    logits = torch.randn(2, 7)
    before = logits.clone()
    next_token_probabilities(logits, 0.7, 3, 0.5)
    assert torch.equal(logits, before)


# ------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])  # below, at and above block_size
@pytest.mark.parametrize("new", [0, 1, 20])
@pytest.mark.parametrize("keep", [None, 1, 2, 5, 6, 9])
def test_generate_appends_and_reads_each_token_once_until_the_window_is_full(
    length: int, new: int, keep: int | None
) -> None:
    model = SpyModel(block_size=6)
    idx = torch.randint(10, (3, length))
    out = generate(model, idx, new, temperature=0, keep=keep)
    assert out.shape == (3, length + new)
    assert torch.equal(out[:, :length], idx)
    assert len(model.fed) == new
    held = min(length, 6)
    for step, fed in enumerate(model.fed):
        read = held if step == 0 else 1
        if step > 0 and held == 6:
            read = held = min(keep or 3, 6)
        elif step > 0:
            held += 1
        assert fed == out[:, length + step - read : length + step].tolist()
    assert all((a + 1) % 10 == b for row in out.tolist() for a, b in itertools.pairwise(row[length - 1 :]))


@pytest.mark.parametrize("config", [BigramConfig(), SMALL, TransformerConfig(block_size=1, n_layer=1, n_embd=8)])
def test_real_models_generate_from_a_single_token(config: BigramConfig | TransformerConfig) -> None:
    model = build_model(config, vocab_size=10, seed=0).eval()
    out = generate(model, torch.zeros(2, 1, dtype=torch.long), 15)
    assert out.shape == (2, 16)
    assert out.dtype == torch.int64
    assert int(out.max()) < 10
    assert not out.requires_grad


def test_frequencies_follow_the_probabilities() -> None:
    model = build_model(BigramConfig(), vocab_size=5, seed=0)
    idx = torch.full((20_000, 1), 2)
    drawn = generate(model, idx, 1, seed=0, temperature=1.0)[:, 1]
    frequencies = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(frequencies, model.token_table.weight[2].softmax(-1).detach(), atol=0.015, rtol=0)


def naive_uniform(seed: int, sample: int, position: int) -> float:
    high, low, _, _ = naive_philox((position, sample, 0, 1), (seed % 2**32, seed // 2**32))
    return (high * 2**21 + low // 2**11) / 2**53


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**62 + 12345])
def test_random_numbers_are_a_function_of_seed_sample_and_position(seed: int) -> None:
    numbers = torch.cat([uniforms(seed, 3, 0), uniforms(seed, 3, BLOCK)])
    for sample, position in ((0, 0), (2, 0), (1, 7), (0, BLOCK - 1), (2, BLOCK), (1, 2 * BLOCK - 1)):
        assert numbers[position, sample].item() == naive_uniform(seed, sample, position)
    assert torch.equal(uniforms(seed, 2, 0), uniforms(seed, 3, 0)[:, :2])
    assert 0.45 < numbers.mean() < 0.55


def test_a_draw_is_where_the_running_sum_passes_the_number() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    below_1 = 1 - 2.0**-53
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9, 3), (below_1, 3)):
        assert draw(probabilities, torch.tensor([number], dtype=torch.float64)).tolist() == [[token]]
    spread = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0)) * (torch.arange(1000) < 900)
    assert draw(spread, torch.tensor([below_1], dtype=torch.float64)).item() < 900  # never one that cannot be


def test_a_sample_is_the_same_alone_and_beside_others_and_however_much_of_it() -> None:
    model = build_model(SMALL, vocab_size=10, seed=0).double().eval()
    idx = torch.zeros(1, 1, dtype=torch.long)
    alone = generate(model, idx, 600, seed=3)
    assert torch.equal(generate(model, idx.expand(4, -1), 600, seed=3)[:1], alone)
    assert torch.equal(generate(model, idx, 20, seed=3), alone[:, :21])


def test_streaming_computes_only_what_is_asked_for() -> None:
    model = SpyModel(block_size=4)
    stream = stream_tokens(model, torch.zeros(1, 1, dtype=torch.long), SampleConfig(max_new_tokens=1000))
    next(stream)
    next(stream)
    assert len(model.fed) == 2


def test_min_p_drops_what_is_far_less_likely_than_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for min_p, wanted in ((None, 4), (0.0, 4), (0.2, 3), (0.55, 2), (1.0, 1)):
        probabilities = next_token_probabilities(logits, min_p=min_p)[0]
        assert int((probabilities > 0).sum()) == wanted
        assert probabilities.sum().item() == pytest.approx(1)
    assert next_token_probabilities(logits, min_p=0.55).tolist()[0] == pytest.approx([0.625, 0.375, 0, 0])
