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
    MANIFEST,
    Batches,
    EpochOrder,
    RandomOrder,
    Splits,
    byte_count,
    find_splits,
    keep_splits,
    load_splits,
    random_batch,
    read_tokens,
    require_size,
    shards,
    split_tokens,
    verify,
    windows,
    write_splits,
    write_tokens,
)
from chargpt.data.order import permuted
from chargpt.data.shards import ShardedTokens
from chargpt.errors import CorpusError
from chargpt.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz")


def count(n: int) -> np.ndarray:
    """Tokens 0 … n − 1, so that a token names its own position."""
    return np.arange(n, dtype=np.uint32)


def source(tokens, batch_size, block_size, seed, order=EpochOrder) -> Batches:  # type: ignore[no-untyped-def]
    return Batches(tokens, order(len(tokens), batch_size, block_size, seed), block_size)


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


# --------------------------------------------------------------------------------------------------- shards, manifest


@pytest.fixture
def written(tmp_path: Path) -> Path:
    text = "to be, or not to be, that is the question: " * 9
    tokenizer = CharacterTokenizer(text)
    write_splits(tmp_path / "splits", split_tokens(tokenizer.encode(text), tokenizer, 0.2))
    return tmp_path / "splits"


def test_a_part_in_many_shards_reads_as_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 7)
    splits = split_tokens(count(100) % 26, TOKENIZER, 0.25)
    write_splits(tmp_path / "many", splits)
    assert len(list((tmp_path / "many").glob("train-*.npy"))) == 11
    many = load_splits(tmp_path / "many")
    assert isinstance(many.train, ShardedTokens)
    assert many.fingerprint == splits.fingerprint
    verify(tmp_path / "many")
    assert len(many.train) == 75
    for where in (slice(None), slice(3, 40), slice(-1, None), slice(60, 5, -3), slice(0, 0)):
        assert many.train[where].tolist() == splits.train[where].tolist()
    assert many.val_with_context.tolist() == splits.val_with_context.tolist()
    ours, whole = (source(part, 5, 9, seed=1) for part in (many.train, splits.train))
    for _ in range(8):
        assert torch.equal(ours.next()[0], whole.next()[0])


def test_data_is_found_by_its_hash_beside_a_run_and_above_it(written: Path, tmp_path: Path) -> None:
    splits = load_splits(written)
    run = tmp_path / "project" / "runs" / "my"
    run.mkdir(parents=True)
    assert find_splits(run, splits.fingerprint) is None
    kept = keep_splits(tmp_path / "project" / "runs" / "data", splits)
    assert kept.name == splits.fingerprint
    before = (kept / MANIFEST).stat().st_mtime_ns
    assert keep_splits(tmp_path / "project" / "runs" / "data", splits) == kept
    assert (kept / MANIFEST).stat().st_mtime_ns == before  # not written twice
    for near in (run, run / "best" / "deeper", tmp_path / "project" / "runs"):
        assert find_splits(near, splits.fingerprint) == kept
    assert find_splits(run, "0" * 64) is None
    (kept / "train-00000.npy").unlink()
    assert keep_splits(tmp_path / "project" / "runs" / "data", splits) == kept  # mended
    verify(kept)
    (tmp_path / "project" / "runs" / "my" / "data" / "splits").mkdir(parents=True)
    (tmp_path / "project" / "runs" / "my" / "data" / "splits" / MANIFEST).write_text("of another version")
    assert find_splits(run, splits.fingerprint) == kept
    write_splits(tmp_path / "project" / "data" / "splits", splits)
    (tmp_path / "project" / "models" / "a").mkdir(parents=True)
    assert find_splits(tmp_path / "project" / "models" / "a", splits.fingerprint).name == "splits"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), seed=st.integers(0, 9))
def test_bytes_are_those_of_the_text(text: str, seed: int) -> None:
    tokenizer = CharacterTokenizer(text)
    assert byte_count(tokenizer.encode(text), tokenizer) == len(text.encode())


def test_an_altered_shard_is_found_by_verify_and_by_its_length(written: Path) -> None:
    shard = written / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    load_splits(written)  # reads no tokens
    with pytest.raises(CorpusError, match=r"train-00000\.npy was altered"):
        verify(written)
    write_tokens(shard, count(5).astype(np.uint8))
    with pytest.raises(CorpusError, match="holds 5 tokens of uint8, where the manifest says"):
        load_splits(written)
    shard.unlink()
    with pytest.raises(CorpusError, match="does not exist"):
        load_splits(written)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_an_error_or_still_the_same_shards(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "manifest"
    write_splits(folder, split_tokens(TOKENIZER.encode("thequickbrownfox"), TOKENIZER, 0.25))
    content = bytearray((folder / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    (folder / MANIFEST).write_bytes(content)
    try:
        splits = load_splits(folder)
    except CorpusError:
        return
    assert (len(splits.train), len(splits.val)) == (12, 4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"train-00000.npy"', '"../train-00000.npy"'),
        ('"train-00000.npy"', '"/etc/passwd"'),
        ('"version": 1', '"version": 2'),
        ('"chargpt-data"', '"something"'),
        ('"tokens": 12', '"tokens": 13'),
        ('"tokens": 12', '"tokens": 1e999'),
        ('"bytes": 12', '"bytes": 0'),
        ('"shards": [', '"shards": 3, "rest": ['),
    ],
)
def test_a_manifest_that_lies_is_refused(old: str, new: str, tmp_path: Path) -> None:
    write_splits(tmp_path / "splits", split_tokens(TOKENIZER.encode("thequickbrownfox"), TOKENIZER, 0.25))
    path = tmp_path / "splits" / MANIFEST
    text = path.read_text(encoding="utf-8")
    assert old in text
    for times in (1, 2):  # the part's number, and its shard's
        path.write_text(text.replace(old, new, times), encoding="utf-8")
        with pytest.raises(CorpusError):
            load_splits(tmp_path / "splits")


def test_a_tokenizer_that_does_not_belong_to_the_tokens_is_refused(written: Path) -> None:
    CharacterTokenizer("xyz").save(written / "tokenizer.json")
    with pytest.raises(CorpusError, match="tokens of another tokenizer"):
        load_splits(written)


# --------------------------------------------------------------------------------------------------------- permutation


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**32))
def test_permuted_is_a_permutation(size: int, seed: int) -> None:
    keys = list(np.random.default_rng(seed).integers(2**64, size=6, dtype=np.uint64))
    places = np.arange(size)
    taken = permuted(places, size, keys)
    assert sorted(taken.tolist()) == list(range(size))
    assert [int(permuted(places[i : i + 1], size, keys)[0]) for i in (0, size // 2)] == taken[[0, size // 2]].tolist()


def test_permutations_are_as_even_as_shuffles() -> None:
    """Where each of 5 places goes, over many keys; and how often neighbours stay neighbours."""
    generator = np.random.default_rng(0)
    counts, neighbours = np.zeros((5, 5)), 0
    for _ in range(4000):
        taken = permuted(np.arange(5), 5, list(generator.integers(2**64, size=6, dtype=np.uint64)))
        counts[np.arange(5), taken] += 1
        neighbours += int((np.diff(taken) == 1).sum())
    assert ((counts - 800) ** 2 / 800).sum() < 40  # 16 degrees of freedom: one in a thousand is above 39
    assert 0.75 < neighbours / 4000 < 0.85  # 4 pairs, each with probability 4/20


def test_memory_does_not_grow_with_the_text() -> None:
    order = EpochOrder(10**15, 4, 256, seed=1)
    starts = np.concatenate([order.starts(number) for number in (0, 10**6, 10**11)])
    assert len(set(starts.tolist())) == 12
    assert (starts >= 0).all()
    assert (starts < 10**15 - 256).all()


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
    assert again.written is not None  # so nothing was hashed again
    verify(tmp_path / "splits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["splits"]


def test_the_fingerprint_notices_every_token_the_cut_and_the_tokenizer_and_not_the_width() -> None:
    base = split(20, 0.25)
    seen = {base.fingerprint}
    for part, length in (("train", 15), ("val", 5)):
        for position in range(length):
            changed = {"train": base.train.copy(), "val": base.val.copy()}
            changed[part][position] += 1
            seen.add(Splits(**changed, tokenizer=TOKENIZER).fingerprint)
    seen.add(split(20, 0.3).fingerprint)  # the same tokens, cut elsewhere
    seen.add(split(21, 0.25).fingerprint)
    seen.add(Splits(base.train, base.val, CharacterTokenizer("bcdefghijklmnopqrstuvwxyzA")).fingerprint)
    assert len(seen) == 1 + 20 + 3
    assert Splits(base.train.astype(np.uint8), base.val.astype(np.uint8), TOKENIZER).fingerprint == base.fingerprint
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
    for order in (EpochOrder, RandomOrder):
        x, y = source(splits.train, 2, block_size, 0, order).next()
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
    batches = source(count(n), 1, block_size, seed)
    per_epoch = batches.order.windows_per_epoch
    batches.position = epoch * per_epoch
    drawn = [batches.next() for _ in range(per_epoch)]
    seen = sorted(token for x, _ in drawn for token in x[0].tolist())
    assert seen == list(range(seen[0], seen[0] + len(seen)))  # side by side, each once
    assert len(seen) == per_epoch * block_size
    assert seen[-1] + 1 <= n - 1  # the last target exists
    assert n - 1 - len(seen) < 2 * block_size  # nothing that would have made another window at every phase


def test_phase_and_order_change_from_epoch_to_epoch_and_reach_every_token() -> None:
    windows_per_epoch = EpochOrder(1000, 1, 8, seed=3).windows_per_epoch
    order = EpochOrder(1000, windows_per_epoch, 8, seed=3)  # a batch is an epoch
    starts = [order.starts(epoch) for epoch in range(200)]
    phases = {int(s.min()) for s in starts}
    assert phases == set(range(8))
    assert len({tuple(s) for s in starts}) == 200
    covered = np.zeros(1000, bool)
    for start in itertools.chain.from_iterable(starts):
        covered[start : start + 9] = True
    assert covered.all()


def test_the_seed_alone_decides_the_batches() -> None:
    def drawn(seed: int, n: int = 12) -> list[list[list[int]]]:
        batches = source(count(200), 6, 8, seed)
        return [batches.next()[0].tolist() for _ in range(n)]

    torch.manual_seed(1)
    np.random.seed(1)
    first = drawn(5)
    torch.manual_seed(2)
    np.random.seed(2)
    assert drawn(5) == first
    assert drawn(6) != first


@pytest.mark.parametrize("order", [EpochOrder, RandomOrder])
@pytest.mark.parametrize("drawn", [0, 1, 7, 30])  # in the first epoch of 24 windows, across its end, and later
def test_a_saved_position_goes_on_identically(order: type[EpochOrder | RandomOrder], drawn: int) -> None:
    original = source(count(200), 7, 8, 11, order)
    for _ in range(drawn):
        original.next()
    state = {key: value.clone() for key, value in original.state_dict().items()}
    rest = [original.next() for _ in range(10)]
    again = source(count(200), 7, 8, 11, order)
    again.next()
    again.load_state_dict(state)
    for x, y in rest:
        x_again, y_again = again.next()
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_one_global_batch(world_size: int) -> None:
    whole = source(count(200), 6, 8, seed=2)
    ranks = [Batches(count(200), whole.order, 8, rank, world_size) for rank in range(world_size)]
    for _ in range(10):  # crosses epochs of 24 windows
        x, y = whole.next()
        parts = [rank.next() for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_a_batch_that_ranks_cannot_share_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="does not divide among 4 ranks"):
        Batches(count(200), EpochOrder(200, 6, 8, seed=2), 8, world_size=4).next()


def test_two_small_batches_are_one_large_batch() -> None:
    small, large = source(count(500), 6, 8, seed=9), source(count(500), 12, 8, seed=9)
    for _ in range(12):
        assert torch.equal(torch.cat([small.next()[0], small.next()[0]]), large.next()[0])


def test_a_batch_may_hold_several_epochs_of_a_tiny_text() -> None:
    batches = source(count(20), 10, 8, seed=0)  # one window an epoch
    assert batches.order.windows_per_epoch == 1
    x, _ = batches.next()
    assert len({row[0] for row in x.tolist()}) > 1  # at several phases


# --------------------------------------------------------------------------------------------------------------- random


def test_random_batches_are_a_function_of_seed_and_number_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = source(count(100), 4, 8, 5, RandomOrder)
    drawn = [batches.next()[0] for _ in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    for number in (7, 19, 0):
        assert batches.order.starts(number).tolist() == drawn[number][:, 0].tolist()
    assert len({tuple(x[:, 0].tolist()) for x in drawn}) == 20
    assert source(count(100), 4, 8, 6, RandomOrder).next()[0].tolist() != drawn[0].tolist()


def test_random_windows_reach_both_ends() -> None:
    x, y = source(count(12), 200, 8, 0, RandomOrder).next()
    assert {row[0] for row in x.tolist()} == {0, 1, 2, 3}
    assert int(y.max()) == 11
