"""Token files on disk: a folder of shards with a manifest, and the split of a text into two parts.

    manifest.json     the tokenizer's hash, and for each part its tokens, its bytes of text, and its shards
    train-00000.npy   token ids; dtype and count stand in the header
    val-00000.npy
    tokenizer.json

The one idea to know: data is named by the SHA-256 of its manifest, which has the SHA-256 of every shard. Equal names
mean equal tokens, and a run that names its data needs no copy of it. Parts may be larger than memory: shards are
memory-mapped, and nothing here reads all of one but the writing, and `verify`.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chargpt.errors import ChargptError, CorpusError, TokenizerError
from chargpt.files import replaced_file, replaced_folder
from chargpt.tokenizers import Tokenizer, load_tokenizer, token_dtype

FORMAT, VERSION = "chargpt-data", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
PARTS = ("train", "val")
SHARD_TOKENS = 1 << 28  # the most in one file
CHUNK = 1 << 24  # tokens looked at together, so that a large shard needs little memory


class ShardedTokens:
    """Token ids (N,) that lie in several files, read as one array is: by a slice, or by an array of positions."""

    def __init__(self, shards: Sequence[npt.NDArray[Any]]) -> None:
        self._shards, self.dtype = shards, shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        if isinstance(where, slice):
            where = np.arange(*where.indices(len(self)))
        found = np.empty(where.shape, self.dtype)
        shard_of = np.searchsorted(self._ends, where, side="right")
        for number in np.unique(shard_of):
            chosen = shard_of == number
            before = 0 if number == 0 else self._ends[number - 1]
            found[chosen] = self._shards[number][where[chosen] - before]
        return found


Tokens: TypeAlias = npt.NDArray[Any] | ShardedTokens  # (N,) unsigned integers of any width


@dataclass(frozen=True)
class Splits:
    """Training and validation tokens, and the tokenizer that made them."""

    train: Tokens  # (N_train,)
    val: Tokens  # (N_val,)
    tokenizer: Tokenizer
    written: Mapping[str, Any] | None = None  # the manifest, where they come from a folder

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What manifest.json says, or would say."""
        if self.written is not None:
            return self.written
        parts = {name: _described(name, part, self.tokenizer) for name, part in self._parts().items()}
        return {"format": FORMAT, "version": VERSION, "tokenizer": self.tokenizer.fingerprint, "parts": parts}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: two runs with equal fingerprints saw the same data."""
        return hashlib.sha256(_canonical(self.manifest)).hexdigest()

    @property
    def val_bytes_per_token(self) -> float:
        """Bytes of UTF-8 behind a token of the validation part, on average."""
        part = self.manifest["parts"]["val"]
        return float(part["bytes"] / part["tokens"])

    @cached_property
    def val_with_context(self) -> npt.NDArray[Any]:
        """The last training token, then the validation part: each validation token has a predecessor to score it."""
        return np.concatenate([self.train[-1:], self.val[:]])  # (1 + N_val,)

    def _parts(self) -> dict[str, Tokens]:
        return {"train": self.train, "val": self.val}


def split_tokens(ids: Tokens, tokenizer: Tokenizer, val_fraction: float) -> Splits:
    """The first part of `ids` (N,) to train on and the last `val_fraction` to validate on, by position.

    The lecture's rule: int((1 - val_fraction) · N) tokens to train. Raises CorpusError when a part would be too small.
    """
    return split_at(ids, tokenizer, int((1 - val_fraction) * len(ids)))


def split_at(ids: Tokens, tokenizer: Tokenizer, n_train: int) -> Splits:
    """The first `n_train` of `ids` (N,) to train on. Raises CorpusError when a part would be too small."""
    if not 2 <= n_train < len(ids):
        raise CorpusError(
            f"{len(ids)} tokens cannot be split into {n_train} to train on and the rest to validate on: one part would "
            f"be empty; use a longer text or another val_fraction"
        )
    return Splits(ids[:n_train], ids[n_train:], tokenizer)


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


def require_known(ids: Tokens, vocab_size: int) -> None:
    """Raise CorpusError unless every one of `ids` (N,) is below `vocab_size`."""
    largest = max((int(ids[start : start + CHUNK].max()) for start in range(0, len(ids), CHUNK)), default=0)
    if largest >= vocab_size:
        raise CorpusError(
            f"the data has the token id {largest}, and the model knows ids from 0 to {vocab_size - 1}: it is not the "
            f"data of this model, or was altered"
        )


# --------------------------------------------------------------------------------------------------------------- files


def write_splits(folder: Path, splits: Splits) -> None:
    """Write shards, manifest and tokenizer into `folder`, whole or not at all."""
    dtype = token_dtype(splits.tokenizer.vocab_size)
    with replaced_folder(folder) as temporary:
        for name, part in splits._parts().items():
            for number, shard in enumerate(_shards(part)):
                write_tokens(temporary / _shard_name(name, number), shard.astype(dtype))
        splits.tokenizer.save(temporary / TOKENIZER)
        (temporary / MANIFEST).write_bytes(json.dumps(splits.manifest, indent=1).encode() + b"\n")


def load_splits(folder: Path) -> Splits:
    """Open a folder that `write_splits` made; reads no tokens.

    Raises CorpusError or TokenizerError when something is missing, damaged, or does not belong together.
    """
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise CorpusError(f"{folder} holds the tokens of another tokenizer than lies beside them; make it again")
    parts = {}
    for name in PARTS:
        shards = []
        for shard in manifest["parts"][name]["shards"]:
            ids = read_tokens(folder / shard["file"])
            if len(ids) != shard["tokens"] or ids.dtype != token_dtype(tokenizer.vocab_size):
                raise CorpusError(
                    f"{folder / shard['file']} holds {len(ids)} tokens of {ids.dtype}, where the manifest says "
                    f"{shard['tokens']} of {token_dtype(tokenizer.vocab_size)}; make it again"
                )
            shards.append(ids)
        parts[name] = shards[0] if len(shards) == 1 else ShardedTokens(shards)
    return Splits(parts["train"], parts["val"], tokenizer, manifest)


def verify(folder: Path) -> None:
    """Raise CorpusError when a shard of the folder is not the one whose SHA-256 the manifest has. Reads all of them."""
    for part in read_manifest(folder)["parts"].values():
        for shard in part["shards"]:
            with (folder / shard["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise CorpusError(f"{folder / shard['file']} was altered after it was written; make it again")


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The checked content of a folder's manifest. Raises CorpusError when there is none, or it is none."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise CorpusError(
                f"{path} is of format {manifest['format']} {manifest['version']}; this version reads {FORMAT} {VERSION}"
            )
        digests = [manifest["tokenizer"]]
        for name in PARTS:
            part = manifest["parts"][name]
            shards = part["shards"]
            digests += [shard["sha256"] for shard in shards]
            safe = [shard["file"] == _shard_name(name, number) for number, shard in enumerate(shards)]
            if not (shards and all(safe) and sum(int(shard["tokens"]) for shard in shards) == part["tokens"] >= 1):
                raise ValueError(f"the shards of {name} do not make up its tokens")
            if not part["bytes"] >= 1:
                raise ValueError(f"{name} has {part['bytes']} bytes")
        if not all(isinstance(digest, str) for digest in digests):
            raise ValueError("a SHA-256 is no text")
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{folder} holds no {MANIFEST}; make it with `dvc repro split`, or train on a text") from None
    except ChargptError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorpusError(f"{path} is damaged ({type(error).__name__}: {error}); make it again") from None
    return manifest


def write_tokens(path: Path, ids: npt.NDArray[Any]) -> None:
    """Write token ids (N,) as a .npy file, atomically: the dtype and the length stand in its header."""
    with replaced_file(path) as file:
        np.save(file, ids, allow_pickle=False)


def read_tokens(path: Path) -> npt.NDArray[Any]:
    """Token ids (N,), memory-mapped. Raises CorpusError when the file is missing, cut short, or holds no tokens."""
    try:
        ids: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")  # np.load would take zip archives for arrays
    except FileNotFoundError:
        raise CorpusError(f"{path} does not exist; make it with `dvc repro split`") from None
    except Exception as error:  # of many types: damaged headers fail anywhere in NumPy's parser
        raise CorpusError(f"{path} is no token file, or is damaged ({error}); make it again") from None
    if ids.ndim != 1 or ids.dtype.kind != "u":
        raise CorpusError(f"{path} holds {ids.ndim}-d {ids.dtype}, not a list of token ids; make it again")
    return ids


def find_splits(near: Path, fingerprint: str) -> Path | None:
    """The folder of the data with this fingerprint: data/<fingerprint> or data/splits beside `near` or above it."""
    for folder in (near.resolve(), *near.resolve().parents):
        for candidate in (folder / "data" / fingerprint, folder / "data" / "splits"):
            with contextlib.suppress(CorpusError):  # none there, or of another version: looked at by chance
                if hashlib.sha256(_canonical(read_manifest(candidate))).hexdigest() == fingerprint:
                    return candidate
    return None


def keep_splits(folder: Path, splits: Splits) -> Path:
    """Write the data into `folder`/<fingerprint>, where runs find it, unless it lies there whole; that folder."""
    target = folder / splits.fingerprint
    try:
        load_splits(target)
    except (CorpusError, TokenizerError):
        write_splits(target, splits)
    return target


# -------------------------------------------------------------------------------------------------------------- shards


def _shards(part: Tokens) -> Iterator[npt.NDArray[Any]]:
    return (part[start : start + SHARD_TOKENS] for start in range(0, len(part), SHARD_TOKENS))


def _shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05}.npy"


def _described(name: str, part: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
    shards, n_bytes = [], 0
    for number, shard in enumerate(_shards(part)):
        file = io.BytesIO()
        np.save(file, shard.astype(token_dtype(tokenizer.vocab_size)), allow_pickle=False)
        digest = hashlib.sha256(file.getbuffer()).hexdigest()
        shards.append({"file": _shard_name(name, number), "tokens": len(shard), "sha256": digest})
        n_bytes += byte_count(shard, tokenizer)
    return {"tokens": len(part), "bytes": n_bytes, "shards": shards}


def byte_count(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 behind token ids (N,)."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(ids), CHUNK):
        counts += np.bincount(ids[start : start + CHUNK], minlength=tokenizer.vocab_size)
    return int(counts @ tokenizer.token_bytes)


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
