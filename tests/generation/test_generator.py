"""From a prompt to text: the same whoever draws the tokens, and however they come."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chargpt.config import BigramConfig, SampleConfig, TransformerConfig
from chargpt.errors import ChargptError, ConfigError, TokenizerError
from chargpt.generation import Generator, generate_text, native, prompt_tokens
from chargpt.generation.generator import Until, token_bias
from chargpt.models import build_model
from chargpt.tokenizers import CharacterTokenizer
from chargpt.tokenizers.byte import ByteTokenizer
from generation.spy import SpyModel

TOKENIZER = CharacterTokenizer("\nabcdefgh ")
SMALL = TransformerConfig(block_size=6, n_layer=1, n_head=2, n_embd=8)


def test_sampling_has_a_generator_of_its_own() -> None:
    model = build_model(SMALL, vocab_size=TOKENIZER.vocab_size, seed=0).eval()
    before = torch.get_rng_state()
    config = SampleConfig(max_new_tokens=30, temperature=1.0, num_samples=2)
    first = generate_text(model, TOKENIZER, "abc", config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert generate_text(model, TOKENIZER, "abc", config) == first
    assert first[0] != first[1]
    other = SampleConfig(max_new_tokens=30, temperature=1.0, num_samples=2, seed=7)
    assert generate_text(model, TOKENIZER, "abc", other) != first


# ----------------------------------------------------------------------------------------------------- prompts and text


def test_a_prompt_and_its_continuations() -> None:
    model = SpyModel(block_size=4, vocab_size=TOKENIZER.vocab_size)
    texts = generate_text(model, TOKENIZER, "ab", SampleConfig(num_samples=3, max_new_tokens=4, temperature=0))
    assert texts == ["abcdef"] * 3
    assert [len(fed) for fed in model.fed] == [1, 3, 3, 3]  # the prompt once, then all samples in one batch


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_streamed_pieces_are_the_completion(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BURST_SECONDS", 1e9)  # so that a busy machine cuts no burst short
    model = build_model(SMALL, vocab_size=TOKENIZER.vocab_size, seed=0).eval()
    config = SampleConfig(max_new_tokens=25, num_samples=2, engine=engine)
    steps = list(Generator(model, TOKENIZER).stream("ab", config))
    assert [len(step[0].tokens) for step in steps][:3] == ([1, 1, 1] if engine == "torch" else [1, 2, 4])
    completions = Generator(model, TOKENIZER).generate("ab", config)
    for i, whole in enumerate(completions):
        assert whole.text == "".join(step[i].text for step in steps) == TOKENIZER.decode(whole.tokens)
        assert whole.tokens == [token for step in steps for token in step[i].tokens]
        assert [step[i].finish_reason for step in steps] == [None] * (len(steps) - 1) + ["length"]
        assert whole.finish_reason == "length"
    assert generate_text(model, TOKENIZER, "ab", config) == ["ab" + whole.text for whole in completions]


@pytest.mark.parametrize("engine", ["torch", "fp32"])
def test_logprobs_are_the_models_own_whatever_is_cut(engine: Any) -> None:
    model = build_model(SMALL, vocab_size=TOKENIZER.vocab_size, seed=0).eval()
    config = SampleConfig(max_new_tokens=5, temperature=0.3, top_k=3, ban="a", engine=engine)
    (found,) = Generator(model, TOKENIZER).generate("b", config)
    idx = torch.tensor([prompt_tokens(TOKENIZER, "b")[0].tolist() + found.tokens])
    with torch.no_grad():
        wanted = model.logits(model.hidden(idx[:, :-1])).log_softmax(-1).gather(-1, idx[:, 1:, None])
    assert found.logprobs == pytest.approx(wanted.flatten().tolist(), abs=1e-5)


def test_streams_of_one_generator_do_not_disturb_each_other() -> None:
    model = build_model(SMALL, vocab_size=TOKENIZER.vocab_size, seed=0).eval()
    generator, config = Generator(model, TOKENIZER), SampleConfig(max_new_tokens=40)
    (wanted,) = generator.generate("ab", config)
    first, second = generator.stream("ab", config), generator.stream("ab", config)
    texts = ["", ""]
    for pair in itertools.zip_longest(first, second):  # how much comes at once is a matter of time
        for i, step in enumerate(pair):
            texts[i] += "" if step is None else step[0].text
    assert texts == [wanted.text] * 2
    next(generator.stream("hg", config))  # and left
    assert generator.generate("ab", config) == [wanted]


# -------------------------------------------------------------------------------------------------- what may not come


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_banned_characters_do_not_come_and_allowed_ones_alone_do(engine: Any) -> None:
    model = build_model(SMALL, vocab_size=TOKENIZER.vocab_size, seed=0).eval()
    config = SampleConfig(max_new_tokens=200, temperature=5.0, engine=engine)
    free, banned, allowed = (
        set(Generator(model, TOKENIZER).generate("ab", dataclasses.replace(config, **limits))[0].text)
        for limits in ({}, {"ban": "a\nh"}, {"allow": "fad"})
    )
    assert free == set("\nabcdefgh ")
    assert banned == free - set("a\nh")
    assert allowed == set("fad")


def test_limits_that_cannot_be_are_errors() -> None:
    generator = Generator(SpyModel(4), TOKENIZER)
    for limits, error, words in (
        ({"ban": "xé"}, TokenizerError, r"has the character 'x'; leave it out of ban"),
        ({"allow": "aé"}, TokenizerError, r"has the character 'é'; leave it out of allow"),
        ({"ban": "\nabcdefgh "}, ConfigError, "leave no token"),
    ):
        with pytest.raises(error, match=words):
            generator.stream("a", SampleConfig(**limits))
    for limits, words in (({"allow": ""}, "allow must be"), ({"allow": "ab", "ban": "bc"}, "not 'b'")):
        with pytest.raises(ConfigError, match=words):
            SampleConfig(**limits)


def test_a_byte_of_a_character_is_no_character() -> None:
    tokenizer = ByteTokenizer()
    bias = token_bias(tokenizer, "ab", "")
    assert bias is not None
    assert tokenizer.decode((bias == 0).nonzero()[:, 0].numpy()) == "ab"
    with pytest.raises(TokenizerError, match="no token of this model has the character 'é'"):
        token_bias(tokenizer, None, "é")


def test_no_new_tokens_give_the_prompt_back() -> None:
    assert generate_text(SpyModel(4), TOKENIZER, "ab", SampleConfig(max_new_tokens=0, num_samples=2)) == ["ab", "ab"]


def test_an_empty_prompt_starts_from_a_newline_or_the_first_symbol() -> None:
    assert prompt_tokens(CharacterTokenizer("\tz\n"), "").tolist() == [[1]]
    assert prompt_tokens(CharacterTokenizer("xyz"), "").tolist() == [[0]]
    texts = generate_text(SpyModel(4), TOKENIZER, "", SampleConfig(max_new_tokens=3, temperature=0))
    assert texts == [" ab"]  # the newline that it started from is no part of the text


@pytest.mark.parametrize("unknown", ["strict", "replace", "skip"])
def test_a_known_prompt_is_encoded_alike_in_every_mode(unknown: str) -> None:
    assert prompt_tokens(TOKENIZER, "bad", unknown).tolist() == [[3, 2, 5]]


def test_unknown_characters_of_a_prompt() -> None:
    with pytest.raises(TokenizerError, match=r"'é' \(U\+00E9\) at 1"):
        prompt_tokens(TOKENIZER, "aéb")
    assert prompt_tokens(TOKENIZER, "aéb", "skip").tolist() == [[2, 3]]
    space = int(TOKENIZER.encode(" ")[0])
    assert prompt_tokens(TOKENIZER, "aéb", "replace").tolist() == [[2, space, 3]]


def test_a_prompt_of_unknown_characters_alone() -> None:
    for unknown in ("strict", "skip"):
        with pytest.raises(TokenizerError, match=r"日|prompt"):
            prompt_tokens(TOKENIZER, "日本", unknown)
    assert prompt_tokens(TOKENIZER, "日本", "replace").shape == (1, 2)


def test_the_error_of_a_prompt_comes_before_the_first_token() -> None:
    model = SpyModel(4)
    with pytest.raises(TokenizerError):
        generate_text(model, TOKENIZER, "é", SampleConfig())
    assert model.fed == []


def test_broken_weights_are_an_error_for_the_user() -> None:
    model = build_model(BigramConfig(), vocab_size=TOKENIZER.vocab_size, seed=0)
    with torch.no_grad():
        model.token_table.weight.fill_(np.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ChargptError, match="weights are broken"):
            generate_text(model, TOKENIZER, "a", SampleConfig(temperature=temperature))


# --------------------------------------------------------------------------------------------------------- stop texts


CUT = (
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=30),
)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(*CUT)
def test_no_stop_text_leaks_in_ten_thousand_cases(text: str, stops: list[str], cuts: list[int]) -> None:
    passes_up_to_the_first_stop_text(text, stops, cuts)


@example("baa", ["a", "baa"], [1, 1])
@given(*CUT)
def test_text_passes_up_to_the_first_stop_text_however_it_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    passes_up_to_the_first_stop_text(text, stops, cuts)


def passes_up_to_the_first_stop_text(text: str, stops: list[str], cuts: list[int]) -> None:
    until, passed, rest = Until(stops), "", text
    for cut in [*cuts, len(text)]:
        piece, rest = rest[:cut], rest[cut:]
        passed += until(piece)
        assert text.startswith(passed)
        assert not any(stop in passed for stop in stops)
        assert len(until.held) < max(map(len, stops), default=1)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]  # one character at a time
    assert until.reached == bool(ends)
    length = max((len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)), default=0)
    assert passed + until.held == (text[: ends[0] - length] if ends else text)


def test_a_sample_ends_at_its_stop_text_and_all_of_them_end_the_work() -> None:
    model = SpyModel(block_size=4, vocab_size=TOKENIZER.vocab_size)
    config = SampleConfig(num_samples=2, max_new_tokens=50, temperature=0, stop=("gh", "ef"))
    assert generate_text(model, TOKENIZER, "ab", config) == ["abcd"] * 2
    assert len(model.fed) == 4  # c, d, e, f
    assert generate_text(model, TOKENIZER, "ab", dataclasses.replace(config, stop=("e",))) == ["abcd"] * 2
    whole = Generator(model, TOKENIZER).generate("ab", config)[0]
    assert (whole.text, TOKENIZER.decode(whole.tokens), whole.finish_reason) == ("cd", "cdef", "stop")
    assert len(whole.logprobs) == 4
    short = dataclasses.replace(config, stop=("deX",), max_new_tokens=3)
    steps = list(Generator(model, TOKENIZER).stream("ab", short))
    assert [[piece.text for piece in step] for step in steps] == [["c"] * 2, [""] * 2, ["de"] * 2]


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_one_sample_ends_before_the_others(engine: Any) -> None:
    model = build_model(SMALL, vocab_size=TOKENIZER.vocab_size, seed=0).eval()
    config = SampleConfig(max_new_tokens=60, num_samples=4, temperature=2.0, engine=engine)
    free = Generator(model, TOKENIZER).generate("ab", config)
    found = Generator(model, TOKENIZER).generate("ab", dataclasses.replace(config, stop=("g",)))
    assert {whole.text.partition("g")[1] for whole in free} == {"g"}
    for with_stop, without in zip(found, free, strict=True):
        assert with_stop.text == without.text.partition("g")[0]
        assert with_stop.finish_reason == "stop"
        assert with_stop.tokens == without.tokens[: len(with_stop.text) + 1]
