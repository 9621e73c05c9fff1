"""Token files on disk, and the split of a text into a part to train on and a part to validate on."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chargpt.errors import CorpusError
from chargpt.files import replaced_file, replaced_folder
from chargpt.tokenizers import Tokenizer, load_tokenizer

Tokens = npt.NDArray[Any]  # (N,) unsigned integers of any width


# --------------------------------------------------------------------------------------------------------------- files


def write_tokens(path: Path, ids: Tokens) -> None:
    """Write token ids (N,) as a .npy file, atomically: the dtype and the length stand in its header."""
    with replaced_file(path) as file:
        np.save(file, ids, allow_pickle=False)


def read_tokens(path: Path) -> Tokens:
    """Token ids (N,), memory-mapped. Raises CorpusError when the file is missing, cut short, or holds no tokens."""
    try:
        ids: Tokens = np.lib.format.open_memmap(path, mode="r")  # np.load would take zip archives for arrays too
    except FileNotFoundError:
        raise CorpusError(f"{path} does not exist; make it with `dvc repro split`") from None
    except Exception as error:  # of many types: damaged headers fail anywhere in NumPy's parser
        raise CorpusError(f"{path} is no token file, or is damaged ({error}); make it again") from None
    if ids.ndim != 1 or ids.dtype.kind != "u":
        raise CorpusError(f"{path} holds {ids.ndim}-d {ids.dtype}, not a list of token ids; make it again")
    return ids


@dataclass(frozen=True)
class Splits:
    """Training and validation tokens, and the tokenizer that made them."""

    train: Tokens  # (N_train,)
    val: Tokens  # (N_val,)
    tokenizer: Tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over both parts and the tokenizer: two runs with equal fingerprints saw the same data."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for part in (self.train, self.val):
            digest.update(f"{part.dtype.str}{len(part)}".encode())
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    @cached_property
    def text_sha256(self) -> str:
        """SHA-256 of the text that both parts make together, as UTF-8: the catalogue's own for its texts."""
        ids = np.concatenate([self.train, self.val])
        return hashlib.sha256(self.tokenizer.decode(ids).encode()).hexdigest()

    @cached_property
    def val_with_context(self) -> Tokens:
        """The last training token, then the validation part: each validation token has a predecessor to score it."""
        return np.concatenate([self.train[-1:], self.val])  # (1 + N_val,)


def split_tokens(ids: Tokens, tokenizer: Tokenizer, val_fraction: float) -> Splits:
    """The first part of `ids` (N,) to train on and the last `val_fraction` to validate on, by position.

    The lecture's rule: int((1 - val_fraction) · N) tokens to train. Raises CorpusError when a part would be too small.
    """
    n_train = int((1 - val_fraction) * len(ids))
    if n_train < 2 or n_train == len(ids):
        raise CorpusError(
            f"{len(ids)} tokens cannot be split with val_fraction {val_fraction}: "
            f"one part would be empty; use a longer text or another val_fraction"
        )
    return Splits(ids[:n_train], ids[n_train:], tokenizer)


def write_splits(folder: Path, splits: Splits) -> None:
    """Write train.npy, val.npy and tokenizer.json into `folder`, whole or not at all."""
    with replaced_folder(folder) as temporary:
        write_tokens(temporary / "train.npy", splits.train)
        write_tokens(temporary / "val.npy", splits.val)
        splits.tokenizer.save(temporary / "tokenizer.json")


def load_splits(folder: Path) -> Splits:
    """Open a folder that `write_splits` made. Raises CorpusError or TokenizerError when something is missing."""
    return Splits(
        train=read_tokens(folder / "train.npy"),
        val=read_tokens(folder / "val.npy"),
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
    )


def require_size(splits: Splits, block_size: int) -> None:
    """Raise CorpusError unless both parts hold a window of `block_size` tokens and its targets."""
    largest = min(len(splits.train) - 1, len(splits.val))  # validation borrows its first context from training
    if largest >= block_size:
        return
    n_train, n_val = len(splits.train), len(splits.val)
    total = n_train + n_val
    # The split was rounded, so val_fraction is only known to lie above (n_val − 1) / total: sure to be enough.
    needed = max(-(-block_size * total // max(n_val - 1, 1)), -(-(block_size + 1) * total // n_train))
    raise CorpusError(
        f"the text has {total:,} tokens ({n_train:,} to train, {n_val:,} to validate), too few for "
        f"block_size {block_size}: this split needs about {needed:,} tokens; or set block_size to at most {largest}"
    )
