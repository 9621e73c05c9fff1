"""Evaluation: which tokens are scored, from how much context, and that nothing else moves."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chargpt.config import BigramConfig, EvaluationConfig, TokenizerConfig, TransformerConfig
from chargpt.data import Splits, Tokens, split_tokens
from chargpt.errors import CorpusError
from chargpt.evaluation import (
    PROTOCOLS,
    baselines,
    dynamic_loss,
    evaluate,
    evaluating,
    full_loss,
    guess_losses,
    nanogpt_loss,
    protocols,
    sliding_loss,
)
from chargpt.evaluation.dynamic import DYNAMIC_LEARNING_RATE
from chargpt.models import Ensemble, Model, build_model
from chargpt.tokenizers import build_tokenizer

V = 11
TRANSFORMER = TransformerConfig(block_size=6, n_layer=2, n_head=2, n_embd=8, dropout=0.5)


def text(n: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(V, size=n).astype(np.uint8)


def model_of(config: BigramConfig | TransformerConfig) -> Model:
    """Weights far from their start, so that contexts matter."""
    model = build_model(config, V, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


class SpyModel(nn.Module):
    """Reads tokens that are their own positions; remembers what it was asked to score."""

    def __init__(self, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.block_size, self.vocab_size = block_size, vocab_size
        self.seen: list[tuple[int, int]] = []

    def forward(self, idx: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        for window, row in zip(idx.tolist(), targets.tolist(), strict=True):
            for place, target in enumerate(row):
                if target != -100:
                    assert target == window[place] + 1  # tokens are positions: the target is the next one
                    self.seen.append((target, place + 1))
        return torch.zeros(targets.shape)


def scored(block_size: int, n: int, stride: int) -> list[tuple[int, int]]:
    """(token, length of its context) for every token that is scored, in the order of scoring."""
    model = SpyModel(block_size, n)
    sliding_loss(model, np.arange(n, dtype=np.uint16), stride)  # type: ignore[arg-type]
    return model.seen


def naive_loss(model: Model, tokens: Tokens, stride: int) -> float:
    """Token by token in float64, each from the first window that reaches it."""
    model = copy.deepcopy(model).double().eval()
    n = len(tokens) - 1
    length = min(model.block_size, n)
    losses = []
    for token in range(1, n + 1):
        start = min(math.ceil(max(0, token - length) / stride) * stride, n - length)
        context = torch.from_numpy(tokens[start:token].astype(np.int64))[None]
        with torch.no_grad():
            log_p = model.logits(model.hidden(context)[0, -1]).log_softmax(-1)
        losses.append(-log_p[int(tokens[token])].item())
    return math.fsum(losses) / n


# --------------------------------------------------------------------------------------------- which tokens are scored


@pytest.mark.parametrize("per_pass", [1, 8_192])
@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 8, 64])
def test_every_token_is_scored_exactly_once_with_enough_context(
    monkeypatch: pytest.MonkeyPatch, block_size: int, stride: int, per_pass: int
) -> None:
    monkeypatch.setattr(protocols, "TOKENS_PER_PASS", per_pass)
    for n in range(2, 4 * block_size + 3):
        seen = scored(block_size, n, stride)
        assert [token for token, _ in seen] == list(range(1, n))  # the first has nothing before it
        for token, context in seen:
            assert context <= block_size
            assert context >= min(token, block_size - min(stride, block_size) + 1)  # the token before it included


def test_full_shows_each_token_once_apart_from_the_last_window() -> None:
    seen = scored(4, 13, stride=4)  # 12 targets: three windows
    assert [context for _, context in seen] == [1, 2, 3, 4] * 3
    seen = scored(4, 15, stride=4)  # 14 targets: the fourth window moves back and scores its last two
    assert [context for _, context in seen] == [1, 2, 3, 4] * 3 + [3, 4]


# ------------------------------------------------------------------------------------------------------ what they score


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 26), stride=st.integers(1, 9), transformer=st.booleans())
def test_the_loss_is_that_of_a_naive_computation(n: int, stride: int, transformer: bool) -> None:
    model = model_of(TRANSFORMER if transformer else BigramConfig(block_size=5))
    tokens = text(n)
    assert sliding_loss(model, tokens, stride) == pytest.approx(
        naive_loss(model, tokens, min(stride, model.block_size)), rel=1e-5
    )
    assert full_loss(model, tokens) == pytest.approx(naive_loss(model, tokens, model.block_size), rel=1e-5)


def test_a_stride_of_a_block_or_more_is_full_and_a_smaller_one_is_not() -> None:
    model, tokens = model_of(TRANSFORMER), text(50)
    full = full_loss(model, tokens)
    assert sliding_loss(model, tokens, 6) == sliding_loss(model, tokens, 1000) == full
    assert sliding_loss(model, tokens, 2) != full


def test_a_bigram_has_one_loss_whatever_the_windows() -> None:
    model, tokens = model_of(BigramConfig(block_size=5)), text(101)
    for stride in (1, 2, 5):
        assert sliding_loss(model, tokens, stride) == pytest.approx(full_loss(model, tokens), rel=1e-6)


def test_the_size_of_a_pass_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(TRANSFORMER), text(200)
    whole = [full_loss(model, tokens), sliding_loss(model, tokens, 2)]
    for tokens_per_pass in (1, 6, 25):
        monkeypatch.setattr(protocols, "TOKENS_PER_PASS", tokens_per_pass)
        assert [full_loss(model, tokens), sliding_loss(model, tokens, 2)] == pytest.approx(whole, rel=1e-6)


def test_one_token_leaves_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        full_loss(model_of(TRANSFORMER), text(1))


def test_nanogpts_protocol_is_the_mean_over_its_own_random_windows() -> None:
    model, tokens = model_of(TRANSFORMER).eval(), text(40)
    config = EvaluationConfig(nanogpt_batches=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(5):
        starts = torch.randint(40 - 6, (4,), generator=generator).tolist()
        x = torch.tensor([tokens[i : i + 6].tolist() for i in starts])
        y = torch.tensor([tokens[i + 1 : i + 7].tolist() for i in starts])
        losses.append(model(x, y).item())
    assert nanogpt_loss(model, tokens, config, batch_size=4) == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert nanogpt_loss(model, tokens, EvaluationConfig(nanogpt_batches=5, seed=4), 4) != sum(losses) / 5


def test_nanogpts_protocol_needs_one_window() -> None:
    model, config = model_of(TRANSFORMER), EvaluationConfig(nanogpt_batches=2)
    assert math.isfinite(nanogpt_loss(model, text(7), config, 2))
    with pytest.raises(CorpusError, match="at least 7, got 6; choose the protocol full"):
        nanogpt_loss(model, text(6), config, 2)


# ------------------------------------------------------------------------------------------------- nothing else moves


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "dynamic"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluating_is_repeatable_and_touches_neither_randomness_nor_mode(protocol: str, training: bool) -> None:
    model, tokens = model_of(TRANSFORMER).train(training), text(100)  # with dropout, which must be off
    config = EvaluationConfig(nanogpt_batches=4, sliding_stride=2)
    torch.manual_seed(0)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    first = evaluate(model, tokens, config, batch_size=3, protocols=[protocol])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate(model, tokens, config, batch_size=3, protocols=[protocol]) == first
    assert list(first) == [protocol]


def test_the_mode_comes_back_after_a_failure() -> None:
    model = model_of(TRANSFORMER).train()
    with pytest.raises(KeyboardInterrupt), evaluating(model):  # noqa: PT012
        assert not model.training
        raise KeyboardInterrupt
    assert model.training


def test_all_protocols_at_once_are_the_same_as_one_by_one() -> None:
    model, tokens, config = model_of(TRANSFORMER), text(100), EvaluationConfig(nanogpt_batches=3, sliding_stride=2)
    together = evaluate(model, tokens, config, batch_size=3)
    assert list(together) == list(PROTOCOLS)
    for protocol in PROTOCOLS:
        assert evaluate(model, tokens, config, 3, protocols=[protocol]) == {protocol: together[protocol]}


def test_a_softcap_counts_once() -> None:
    model = model_of(TransformerConfig(block_size=6, n_layer=1, n_head=2, n_embd=8, logit_softcap=1.5)).eval()
    tokens = text(7)
    x, y = (torch.from_numpy(part.astype(np.int64))[None] for part in (tokens[:-1], tokens[1:]))
    assert full_loss(model, tokens) == pytest.approx(model(x, y).item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------- the bigram's floor


def discounted_bigram(train: Tokens, vocab_size: int, discount: float) -> torch.Tensor:
    """Interpolated absolute discounting (Ney, Essen and Kneser 1994) on a uniform base: probabilities (V, V)."""
    probabilities = np.full(vocab_size, 1 / vocab_size)
    pairs = np.bincount(train[:-1].astype(np.int64) * vocab_size + train[1:], minlength=vocab_size**2)
    for counts in (np.bincount(train, minlength=vocab_size)[None], pairs.reshape(vocab_size, vocab_size)):
        total = counts.sum(1, keepdims=True).clip(1)
        left_over = 1 - np.maximum(counts - discount, 0).sum(1, keepdims=True) / total
        probabilities = np.maximum(counts - discount, 0) / total + left_over * probabilities
    return torch.from_numpy(np.broadcast_to(probabilities, (vocab_size, vocab_size)).copy())


def test_the_best_bigram_on_the_lectures_validation_split(shakespeare_splits: Splits) -> None:
    train, tokens, v = shakespeare_splits.train, shakespeare_splits.val_with_context, 65
    model = build_model(BigramConfig(), v, seed=0)
    losses = {}
    for discount in (0.0, 0.5, 0.75):
        probabilities = discounted_bigram(train, v, discount)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(v, dtype=torch.float64))
        with torch.no_grad():
            model.token_table.weight.copy_(probabilities.clamp(min=1e-9).log())
        losses[discount] = full_loss(model, tokens)
        wanted = -probabilities.clamp(min=1e-9).log()[tokens[:-1].astype(int), tokens[1:].astype(int)].mean().item()
        assert losses[discount] == pytest.approx(wanted, abs=1e-5)
    assert losses[0.75] == pytest.approx(2.487, abs=1e-3)
    assert losses[0.0] == pytest.approx(
        2.5005, abs=1e-3
    )  # pairs that training never shows cost the table without smoothing
    # With hindsight, from the counts of the validation part itself, no table of pairs goes below this.
    pairs = np.bincount(tokens[:-1].astype(np.int64) * v + tokens[1:], minlength=v * v).reshape(v, v)
    share = pairs / pairs.sum(1, keepdims=True).clip(1)
    hindsight = -(pairs[pairs > 0] * np.log(share[pairs > 0])).sum() / pairs.sum()
    assert hindsight == pytest.approx(2.3735, abs=1e-3)


# --------------------------------------------------------------------------------------------------- guesses that count


def test_guesses_lose_what_their_probabilities_say() -> None:
    """On abab…: a and b are equally frequent, and each is always followed by the other."""
    tokenizer = build_tokenizer(TokenizerConfig(), "ab")
    splits = split_tokens(tokenizer.encode("ab" * 500), tokenizer, 0.1)
    blind, single, pairs = guess_losses(splits).values()
    assert blind == math.log(2)
    assert single == pytest.approx(math.log(2), abs=1e-6)
    # 450 times ab, and 1 follower to share with the frequencies: (450 + 1/2) / 451; of ba there are 449
    assert pairs == pytest.approx(-math.log(450.5 / 451), abs=1e-5)


def test_of_a_long_text_the_pairs_of_its_end_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "COUNTED_TOKENS", 900)
    tokenizer = build_tokenizer(TokenizerConfig(), "abcd")
    long, end = (split_tokens(tokenizer.encode(text), tokenizer, 0.1) for text in ("cd" * 500 + "ab" * 500, "ab" * 500))
    long = dataclasses.replace(long, train=np.concatenate([long.train[:400], end.train]), val=end.val)
    assert guess_losses(long) == pytest.approx(guess_losses(end))


def test_a_guess_by_pairs_gives_all_characters_together_a_probability_of_one() -> None:
    """Whatever came before, and also where a pair, or a character, never occurred in the training part."""
    tokenizer = build_tokenizer(TokenizerConfig(), "abcd")
    train = tokenizer.encode("abacabaabcacbbac" * 3)
    for first in "abcd":
        total = 0.0
        for second in "abcd":
            one = Splits(np.concatenate([train, tokenizer.encode(first)]), tokenizer.encode(second), tokenizer)
            total += math.exp(-list(guess_losses(one).values())[2])
        assert total == pytest.approx(1.0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- dynamic


@pytest.mark.parametrize("n", [2, 7, 8, 13, 40])
def test_dynamic_evaluation_scores_each_window_before_it_learns_from_it(n: int) -> None:
    model, tokens = model_of(TRANSFORMER).eval(), text(n).astype(np.int64)
    adapted, total = copy.deepcopy(model), 0.0
    for start in range(0, n - 1, 6):
        window = torch.from_numpy(tokens[start : start + 7])[None]
        logits = adapted.logits(adapted.hidden(window[:, :-1]))
        losses = logits.logsumexp(-1) - logits.gather(-1, window[:, 1:, None])[..., 0]
        total += losses.sum().item()
        gradients = torch.autograd.grad(losses.mean(), list(adapted.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(adapted.parameters(), gradients, strict=True):
                parameter -= DYNAMIC_LEARNING_RATE * gradient
    assert dynamic_loss(model, tokens) == pytest.approx(total / (n - 1), rel=1e-5)


def test_dynamic_evaluation_of_one_window_has_nothing_to_learn_from_yet() -> None:
    model, tokens = model_of(TRANSFORMER), text(7)
    assert dynamic_loss(model, tokens) == pytest.approx(full_loss(model, tokens), rel=1e-6)


def test_dynamic_evaluation_profits_from_what_repeats() -> None:
    model, tokens = build_model(TRANSFORMER, V, seed=0), np.tile(text(5), 400)
    assert dynamic_loss(model, tokens) < full_loss(model, tokens) - 0.3


def test_twins_learn_together_as_one_does_alone() -> None:
    model, tokens = model_of(TRANSFORMER), text(60)
    twins = Ensemble([model, copy.deepcopy(model)])
    assert dynamic_loss(twins, tokens) == pytest.approx(dynamic_loss(model, tokens), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- ensemble


def test_an_ensemble_predicts_with_the_mean_of_the_probabilities() -> None:
    models = [model_of(config).eval() for config in (BigramConfig(block_size=9), TRANSFORMER)]
    idx, targets = (torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    ensemble = Ensemble(models).eval()
    assert ensemble.block_size == 6
    probabilities = sum(model.logits(model.hidden(idx)).double().softmax(-1) for model in models) / 2
    logits, loss = ensemble.logits(ensemble.hidden(idx)), ensemble(idx, targets)
    torch.testing.assert_close(logits.double().softmax(-1), probabilities, rtol=1e-5, atol=1e-7)
    expected = -probabilities.gather(-1, targets[..., None]).log().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_an_ensemble_loses_less_than_its_members_on_average_and_one_alone_as_much_as_alone() -> None:
    models, tokens = [model_of(config) for config in (BigramConfig(block_size=6), TRANSFORMER)], text(200)
    alone = [full_loss(model, tokens) for model in models]
    assert full_loss(Ensemble(models), tokens) < sum(alone) / 2
    assert full_loss(Ensemble(models[1:]), tokens) == pytest.approx(alone[1], rel=1e-6)


def test_an_ensemble_is_sure_where_its_members_are() -> None:
    """Logits of ±1e4: probabilities of 0 and 1, and nothing infinite or not a number but log 0."""
    model = build_model(BigramConfig(block_size=4), V, seed=0)
    with torch.no_grad():
        next(model.parameters()).copy_(2e4 * torch.eye(V) - 1e4)
    idx = torch.arange(4)[None]
    twins = Ensemble([model, model])
    assert torch.equal(twins.logits(twins.hidden(idx)).argmax(-1), idx)
    assert twins(idx, idx) == 0
