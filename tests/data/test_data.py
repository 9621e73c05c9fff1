"""Token files, the split, and the order of batches: the lecture's numbers, and each window once per epoch."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chargpt.data import (
    EpochBatches,
    RandomBatches,
    Splits,
    Tokens,
    load_splits,
    random_batch,
    read_tokens,
    require_size,
    split_tokens,
    windows,
    write_splits,
    write_tokens,
)
from chargpt.errors import CorpusError
from chargpt.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz")


def count(n: int) -> Tokens:
    """Tokens 0 … n − 1, so that a token names its own position."""
    return np.arange(n, dtype=np.uint32)


def split(n: int, val_fraction: float) -> Splits:
    return split_tokens(count(n), TOKENIZER, val_fraction)


# -------------------------------------------------------------------------------------------------- the lecture's facts


def test_the_lectures_split(shakespeare_splits: Splits) -> None:
    assert (len(shakespeare_splits.train), len(shakespeare_splits.val)) == (1_003_854, 111_540)
    assert shakespeare_splits.val_with_context.tolist()[:2] == [
        shakespeare_splits.train[-1],
        shakespeare_splits.val[0],
    ]
    assert len(shakespeare_splits.val_with_context) == 111_541


def test_the_lectures_first_batch(shakespeare_splits: Splits) -> None:
    torch.manual_seed(1337)
    x, y = random_batch(shakespeare_splits.train, batch_size=4, block_size=8, generator=None)
    assert x.tolist() == [
        [24, 43, 58, 5, 57, 1, 46, 43],
        [44, 53, 56, 1, 58, 46, 39, 58],
        [52, 58, 1, 58, 46, 39, 58, 1],
        [25, 17, 27, 10, 0, 21, 1, 54],
    ]
    assert y[0].tolist()[:3] == [43, 58, 5]
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.dtype == y.dtype == torch.int64


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("length", [0, 1, 7, 1000])
def test_token_files_survive_the_round_trip(tmp_path: Path, dtype: str, length: int) -> None:
    ids = np.arange(length).astype(dtype)
    write_tokens(tmp_path / "ids.npy", ids)
    read = read_tokens(tmp_path / "ids.npy")
    assert read.dtype == ids.dtype
    assert np.array_equal(read, ids)
    assert not read.flags.writeable
    if length:
        assert isinstance(read, np.memmap)


def test_a_missing_token_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"ids\.npy does not exist; make it"):
        read_tokens(tmp_path / "ids.npy")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"plain text, no token file",
        b"PK\x03\x04 looks like a zip archive",
        b"PK\x05\x06" + bytes(18),  # an empty zip archive
        b"\x80\x04]\x94.",  # a pickle
        bytes(300),
    ],
)
def test_a_file_that_is_no_token_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(CorpusError, match=r"ids\.npy is no token file, or is damaged"):
        read_tokens(tmp_path / "ids.npy")


def test_a_folder_in_place_of_a_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError):
        read_tokens(tmp_path)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), np.uint8), np.zeros(3, np.int64), np.zeros(3, np.float32), np.array("text"), np.zeros(3, "O")],
)
def test_arrays_that_are_no_list_of_ids_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(CorpusError):
        read_tokens(tmp_path / "ids.npy")


def test_a_zip_of_arrays_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "ids.npy").open("wb") as file:
        np.savez(file, ids=count(5))
    with pytest.raises(CorpusError):
        read_tokens(tmp_path / "ids.npy")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    write_tokens(path, count(50))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CorpusError):
            read_tokens(path)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 127), byte=st.integers(0, 255))
def test_a_damaged_header_is_an_error_or_still_a_list_of_ids(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    write_tokens(path, count(50))
    content = bytearray(path.read_bytes())
    content[place] = byte
    path.write_bytes(content)
    try:
        ids = read_tokens(path)
    except CorpusError:
        return
    assert ids.ndim == 1
    assert ids.dtype.kind == "u"


# ---------------------------------------------------------------------------------------------------------------- split


@given(n=st.integers(0, 3000), percent=st.integers(1, 99))
def test_a_split_is_by_position_and_loses_nothing(n: int, percent: int) -> None:
    if int((1 - percent / 100) * n) < 2:
        with pytest.raises(CorpusError, match=f"^{n} tokens cannot be split"):
            split(n, percent / 100)
        return
    splits = split(n, percent / 100)
    assert np.concatenate([splits.train, splits.val]).tolist() == list(range(n))
    assert len(splits.train) == int((1 - percent / 100) * n)
    assert len(splits.val) >= 1
    assert splits.val_with_context.tolist() == list(range(len(splits.train) - 1, n))


def test_splits_survive_the_round_trip(tmp_path: Path) -> None:
    splits = split_tokens(TOKENIZER.encode("thequickbrownfox"), TOKENIZER, 0.25)
    write_splits(tmp_path / "splits", splits)
    again = load_splits(tmp_path / "splits")
    assert np.array_equal(again.train, splits.train)
    assert np.array_equal(again.val, splits.val)
    assert again.fingerprint == splits.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["splits"]


def test_the_fingerprint_notices_every_token_the_cut_the_width_and_the_tokenizer() -> None:
    base = split(20, 0.25)
    seen = {base.fingerprint}
    for part, length in (("train", 15), ("val", 5)):
        for position in range(length):
            changed = {"train": base.train.copy(), "val": base.val.copy()}
            changed[part][position] += 1
            seen.add(Splits(**changed, tokenizer=TOKENIZER).fingerprint)
    seen.add(split(20, 0.3).fingerprint)  # the same tokens, cut elsewhere
    seen.add(split(21, 0.25).fingerprint)
    seen.add(Splits(base.train, base.val, CharacterTokenizer("abc")).fingerprint)
    seen.add(Splits(base.train.astype(np.uint8), base.val.astype(np.uint8), TOKENIZER).fingerprint)
    assert len(seen) == 1 + 20 + 4
    assert split(20, 0.25).fingerprint == base.fingerprint


# ----------------------------------------------------------------------------------------------------------------- size


@settings(max_examples=400, deadline=None)
@given(n=st.integers(2, 2000), percent=st.integers(1, 99), block_size=st.integers(1, 300))
def test_the_sizes_that_the_error_names_are_enough(n: int, percent: int, block_size: int) -> None:
    val_fraction = percent / 100
    try:
        splits = split(n, val_fraction)
    except CorpusError:
        assume(False)
    largest = min(len(splits.train) - 1, len(splits.val))
    if block_size <= largest:
        require_size(splits, block_size)
        return
    with pytest.raises(CorpusError) as caught:
        require_size(splits, block_size)
    message = str(caught.value)
    require_size(splits, int(re.search(r"block_size to at most (\d+)$", message)[1]))  # type: ignore[index]
    with pytest.raises(CorpusError):
        require_size(splits, largest + 1)
    needed = int(re.search(r"needs about ([\d,]+) tokens", message)[1].replace(",", ""))  # type: ignore[index]
    assert needed > n
    if len(splits.val) > 1:  # a single token says too little about the fraction
        require_size(split(needed, val_fraction), block_size)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_a_text_that_is_just_large_enough_gives_batches(block_size: int) -> None:
    splits = Splits(count(block_size + 1), count(block_size), TOKENIZER)
    require_size(splits, block_size)
    for source in (EpochBatches(splits.train, 2, block_size, 0), RandomBatches(splits.train, 2, block_size, 0)):
        x, y = source.next()
        assert x.tolist() == [list(range(block_size))] * 2
        assert y.tolist() == [list(range(1, block_size + 1))] * 2


# --------------------------------------------------------------------------------------------------------------- epochs


def test_targets_are_the_inputs_one_token_later() -> None:
    x, y = windows(count(100).astype(np.uint8), np.array([0, 90]), 9)
    assert x.tolist() == [list(range(9)), list(range(90, 99))]
    assert torch.equal(y, x + 1)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()


# One window more and one less than whole numbers of blocks, texts of one and two windows, blocks of one token.
@settings(max_examples=200, deadline=None)
@given(block_size=st.integers(1, 9), extra=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_an_epoch_sees_each_of_its_windows_once_and_they_do_not_overlap(
    block_size: int, extra: int, seed: int, epoch: int
) -> None:
    n = block_size + extra
    batches = EpochBatches(count(n), 1, block_size, seed)
    batches.position = epoch * batches.windows_per_epoch
    drawn = [batches.next() for _ in range(batches.windows_per_epoch)]
    seen = sorted(token for x, _ in drawn for token in x[0].tolist())
    assert seen == list(range(seen[0], seen[0] + len(seen)))  # side by side, each once
    assert len(seen) == batches.windows_per_epoch * block_size
    assert seen[-1] + 1 <= n - 1  # the last target exists
    assert n - 1 - len(seen) < 2 * block_size  # nothing that would have made another window at every phase


def test_phase_and_order_change_from_epoch_to_epoch_and_reach_every_token() -> None:
    batches = EpochBatches(count(1000), 4, 8, seed=3)
    starts = [batches.epoch_starts(epoch) for epoch in range(200)]
    phases = {int(s.min()) for s in starts}
    assert phases == set(range(8))
    assert len({tuple(s) for s in starts}) == 200
    covered = np.zeros(1000, bool)
    for start in itertools.chain.from_iterable(starts):
        covered[start : start + 9] = True
    assert covered.all()


def test_the_seed_alone_decides_the_batches() -> None:
    def drawn(seed: int, n: int = 12) -> list[list[list[int]]]:
        batches = EpochBatches(count(200), 6, 8, seed)
        return [batches.next()[0].tolist() for _ in range(n)]

    torch.manual_seed(1)
    np.random.seed(1)
    first = drawn(5)
    torch.manual_seed(2)
    np.random.seed(2)
    assert drawn(5) == first
    assert drawn(6) != first


@pytest.mark.parametrize("source", [EpochBatches, RandomBatches])
@pytest.mark.parametrize("drawn", [0, 1, 7, 30])  # in the first epoch of 24 windows, across its end, and later
def test_a_saved_position_goes_on_identically(source: type[EpochBatches | RandomBatches], drawn: int) -> None:
    original = source(count(200), 7, 8, 11)
    for _ in range(drawn):
        original.next()
    state = {key: value.clone() for key, value in original.state_dict().items()}
    rest = [original.next() for _ in range(10)]
    again = source(count(200), 7, 8, 11)
    again.next()
    again.load_state_dict(state)
    for x, y in rest:
        x_again, y_again = again.next()
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_one_global_batch(world_size: int) -> None:
    whole = EpochBatches(count(200), 6, 8, seed=2)
    ranks = [EpochBatches(count(200), 6, 8, seed=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(10):  # crosses epochs of 24 windows
        x, y = whole.next()
        parts = [rank.next() for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_a_batch_that_ranks_cannot_share_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="does not divide among 4 ranks"):
        EpochBatches(count(200), 6, 8, seed=2, world_size=4)


def test_two_small_batches_are_one_large_batch() -> None:
    small, large = EpochBatches(count(500), 6, 8, seed=9), EpochBatches(count(500), 12, 8, seed=9)
    for _ in range(12):
        assert torch.equal(torch.cat([small.next()[0], small.next()[0]]), large.next()[0])


def test_a_batch_may_hold_several_epochs_of_a_tiny_text() -> None:
    batches = EpochBatches(count(20), 10, 8, seed=0)  # one window an epoch
    assert batches.windows_per_epoch == 1
    x, _ = batches.next()
    assert len({row[0] for row in x.tolist()}) > 1  # at several phases


# --------------------------------------------------------------------------------------------------------------- random


def test_random_batches_have_a_generator_of_their_own() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    source = RandomBatches(count(100), 4, 8, seed=5)
    x, y = source.next()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(y, x + 1)
    assert torch.equal(RandomBatches(count(100), 4, 8, seed=5).next()[0], x)


def test_random_windows_reach_both_ends() -> None:
    source = RandomBatches(count(12), 200, 8, seed=0)
    x, y = source.next()
    assert {row[0] for row in x.tolist()} == {0, 1, 2, 3}
    assert int(y.max()) == 11
