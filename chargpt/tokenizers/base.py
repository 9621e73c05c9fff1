"""What all tokenizers share: the protocol, the width of ids, and the one JSON form that is saved and fingerprinted.

The one idea to know: a tokenizer is its JSON. Equal JSON means equal ids for every text.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from chargpt.errors import TokenizerError
from chargpt.files import replaced_file

FORMAT = "chargpt-tokenizer"
VERSION = 1

Ids = npt.NDArray[np.unsignedinteger[Any]]  # (N,) in the smallest dtype that holds the vocabulary
Errors = Literal["strict", "replace", "skip"]  # what to do with text that the vocabulary does not cover


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def kind(self) -> str:
        """The name under which `params.yaml` chooses this tokenizer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the canonical JSON: equal exactly when two tokenizers are the same."""
        ...

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 (V,) that each id stands for."""
        ...

    def encode(self, text: str, errors: Errors = "strict") -> Ids:
        """Ids (N,) of a text. Raises TokenizerError under "strict" when the vocabulary does not cover the text."""
        ...

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids (N,). Raises TokenizerError for ids that are no whole numbers, or not in the vocabulary."""
        ...

    def decoder(self) -> Callable[[npt.ArrayLike], str]:
        """A function that decodes one text piece by piece: what it gains with more ids (N,), maybe nothing yet.

        Tokens may end inside a character, which then comes with the ids that complete it.
        """
        ...

    def save(self, path: Path) -> None:
        """Write the JSON that `load_tokenizer` reads, atomically."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest unsigned dtype that holds the ids 0 to vocab_size - 1."""
    return np.min_scalar_type(vocab_size - 1)


def require_errors(errors: str) -> None:
    """Raise ValueError unless `errors` is one of the three."""
    if errors not in ("strict", "replace", "skip"):
        raise ValueError(f'errors must be "strict", "replace" or "skip", got {errors!r}')


def require_ids(ids: npt.ArrayLike, vocab_size: int) -> npt.NDArray[Any]:
    """`ids` as an array (N,). Raises TokenizerError unless they are whole numbers from 0 to vocab_size - 1."""
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError) as error:
        raise TokenizerError(f"ids must be a flat list of whole numbers: {error}") from None
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TokenizerError(f"ids must be a flat list of whole numbers, got {array.ndim}-d {array.dtype}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise TokenizerError(
            f"id {array[position]} at position {position} is outside this vocabulary, whose ids run from 0 to "
            f"{vocab_size - 1}; decode with the tokenizer that made the ids"
        )
    return array


def canonical_json(kind: str, content: dict[str, Any]) -> bytes:
    """A tokenizer as bytes: keys sorted, no spaces, ASCII only, so that equal content gives equal bytes."""
    record = {"format": FORMAT, "version": VERSION, "kind": kind, **content}
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def fingerprint_of(canonical: bytes) -> str:
    """SHA-256 (hexadecimal) of a tokenizer's canonical JSON."""
    return hashlib.sha256(canonical).hexdigest()


def save_canonical(path: Path, canonical: bytes) -> None:
    """Write a tokenizer's canonical JSON, atomically."""
    with replaced_file(path) as file:
        file.write(canonical)
