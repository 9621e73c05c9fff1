"""Tokenizers: the lecture's ids, round trips in every script, and what a user or a foreign file can get wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chargpt.config import TokenizerConfig
from chargpt.errors import TokenizerError
from chargpt.tokenizers import CharacterTokenizer, build_tokenizer, load_tokenizer, token_dtype
from chargpt.tokenizers import character as character_module

# -------------------------------------------------------------------------------------------------- the lecture's facts


def test_tiny_shakespeare_has_the_lectures_vocabulary_and_ids(tiny_shakespeare: Path) -> None:
    text = tiny_shakespeare.read_text(encoding="utf-8")
    tokenizer = build_tokenizer(TokenizerConfig(), text)
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    assert tokenizer.decode([46, 47, 47, 1, 58, 46, 43, 56, 43]) == "hii there"
    ids = tokenizer.encode(text)
    assert ids[:9].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58]
    assert len(ids) == 1_115_394
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == text


# ------------------------------------------------------------------------------------------------------------- encoding


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_every_text_survives_the_round_trip(text: str) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(), text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["日本語のテキスト", "שלום", "नमस्ते", "👩‍👩‍👧 🏳️‍🌈 é e\u0301", "\x00\x7f\U0010ffff", "\r\n\t\u2028"]
)
def test_scripts_emoji_and_combining_marks_survive(text: str, tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer(text)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").decode(tokenizer.encode(text)) == text


def test_ids_follow_the_order_of_code_points() -> None:
    tokenizer = CharacterTokenizer(["😀", "b", "é", "a"])
    assert tokenizer.symbols == "abé😀"
    assert tokenizer.encode("😀ab").tolist() == [3, 0, 1]


def test_a_text_longer_than_a_chunk_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(character_module, "CHUNK", 7)
    text = "abc😀defgh" * 5  # 45 characters: the last chunk is not full
    tokenizer = CharacterTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(TokenizerError, match=r"'€' \(U\+20AC\) at 45"):
        tokenizer.encode(text + "€")
    assert tokenizer.decode(tokenizer.encode("€" + text + "€a", errors="skip")) == text + "a"


# 256 and 65,536 symbols are the last that fit into one and two bytes.
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_ids_take_the_smallest_unsigned_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    symbols = "".join(map(chr, range(0x10000, 0x10000 + vocab_size)))
    ids = CharacterTokenizer(symbols).encode(symbols)
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == list(range(vocab_size))


def test_an_empty_text_is_no_ids() -> None:
    tokenizer = CharacterTokenizer("ab")
    ids = tokenizer.encode("")
    assert ids.shape == (0,)
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == ""
    assert tokenizer.decode([]) == ""


# --------------------------------------------------------------------------------------------------- unknown characters


def test_unknown_characters_are_named_with_their_positions() -> None:
    with pytest.raises(TokenizerError) as caught:
        CharacterTokenizer("abc").encode("a€b😀c€")
    message = str(caught.value)
    assert "'€' (U+20AC) at 1, 5" in message
    assert "'😀' (U+1F600) at 3" in message
    assert "3 symbols" in message


def test_only_the_first_few_unknown_characters_are_listed() -> None:
    with pytest.raises(TokenizerError, match="and others") as caught:
        CharacterTokenizer("a").encode("0123456789" * 1000)
    assert len(str(caught.value)) < 500


def test_half_of_a_surrogate_pair_is_an_unknown_character_like_any_other() -> None:
    tokenizer = CharacterTokenizer("abc")
    with pytest.raises(TokenizerError, match=r"U\+D83D\) at 1"):
        tokenizer.encode("a\ud83d")
    assert tokenizer.decode(tokenizer.encode("a\ud83db", errors="skip")) == "ab"


def test_skip_leaves_unknown_characters_out() -> None:
    tokenizer = CharacterTokenizer("abc")
    assert tokenizer.decode(tokenizer.encode("a€b€c", errors="skip")) == "abc"
    assert tokenizer.encode("€€", errors="skip").shape == (0,)


@pytest.mark.parametrize(("symbols", "expected"), [("!ab", "!"), ("!ab ", " "), ("!ab \ufffd", "\ufffd")])
def test_replace_writes_the_documented_symbol(symbols: str, expected: str) -> None:
    tokenizer = CharacterTokenizer(symbols)
    assert tokenizer.replacement == expected
    assert tokenizer.decode(tokenizer.encode("a€b", errors="replace")) == f"a{expected}b"


def test_another_way_to_treat_errors_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="ignore"):
        CharacterTokenizer("a").encode("a", errors="ignore")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "ids", [[0, 2, 1], (0, 2, 1), np.array([0, 2, 1], np.int8), np.array([0, 2, 1], np.uint64), torch.tensor([0, 2, 1])]
)
def test_decode_takes_any_list_of_whole_numbers(ids: object) -> None:
    assert CharacterTokenizer("abc").decode(ids) == "acb"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([0, 3], "id 3 at position 1"),
        ([0, 0, -1], "id -1 at position 2"),
        ([0.0, 1.0], "whole numbers"),
        ([True, False], "whole numbers"),
        (["a"], "whole numbers"),
        ([[0, 1], [1, 2]], "flat list"),
        ([[0, 1], [1]], "flat list"),
        ([2**70], "whole numbers"),
        (5, "flat list"),
        (None, "flat list"),
    ],
)
def test_ids_that_are_none_are_refused(ids: object, complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        CharacterTokenizer("abc").decode(ids)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- vocabulary, JSON


@pytest.mark.parametrize("symbols", ["", [], "a\ud800b"])
def test_a_vocabulary_of_nothing_or_of_surrogates_is_refused(symbols: str | list[str]) -> None:
    with pytest.raises(TokenizerError, match=r"at least one symbol|surrogate"):
        CharacterTokenizer(symbols)


def test_saved_and_loaded_tokenizers_are_the_same(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer("hello wörld 😀\n")
    path = tmp_path / "new folder" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert isinstance(loaded, CharacterTokenizer)
    assert loaded.symbols == tokenizer.symbols
    assert loaded.fingerprint == tokenizer.fingerprint
    assert json.loads(path.read_text())["symbols"] == "\n dehlorwö😀"
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_the_fingerprint_depends_on_the_vocabulary_alone() -> None:
    assert CharacterTokenizer("abc").fingerprint == CharacterTokenizer("ccbbaa").fingerprint
    assert CharacterTokenizer("abc").fingerprint != CharacterTokenizer("abd").fingerprint
    # Written down so that a change of the format, which orphans all saved runs, is noticed. By hand:
    # printf '{"format":"chargpt-tokenizer","kind":"character","symbols":"abc","version":1}' | sha256sum
    assert CharacterTokenizer("abc").fingerprint == "4534c9e07865c85ee1598d84060a5099d96ccd6871fae42356746ac0d2937d5e"


GOOD = {"format": "chargpt-tokenizer", "version": 1, "kind": "character", "symbols": "abc"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "damaged or no tokenizer"),
        (json.dumps(GOOD).encode()[:-5], "damaged or no tokenizer"),
        (b"\x80\x04\x95pickle", "damaged or no tokenizer"),
        (b"[" * 200_000, "damaged or no tokenizer"),
        (b"[1, 2]", "no tokenizer of chargpt"),
        (b'{"model": {"type": "BPE"}}', "no tokenizer of chargpt"),
        (GOOD | {"format": ["chargpt-tokenizer"]}, "no tokenizer of chargpt"),
        (GOOD | {"version": 2}, "version 2"),
        (GOOD | {"kind": "bpe"}, "kind 'bpe'"),
        (GOOD | {"kind": ["character"]}, "kind \\['character'\\]"),
        (GOOD | {"symbols": ["a", "b"]}, "symbols"),
        (GOOD | {"symbols": 3}, "symbols"),
        (GOOD | {"symbols": ""}, "at least one symbol"),
        (GOOD | {"symbols": "ba"}, "sorted"),
        (GOOD | {"symbols": "aab"}, "sorted"),
        (GOOD | {"symbols": "ab\ud800"}, "surrogate"),
        (GOOD | {"extra": 1}, "exactly one more field"),
        ({key: GOOD[key] for key in ("format", "version", "kind")}, "exactly one more field"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    content: bytes | dict[str, object], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(TokenizerError, match=complaint) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)  # a folder
