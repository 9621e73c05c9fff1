"""The byte tokenizer: a text as its bytes of UTF-8, whatever its alphabet, with 256 ids and nothing to learn.

The one idea to know: a character beyond ASCII is two to four tokens, so a model may stop inside one. A piece that is no
UTF-8 decodes to U+FFFD.
"""

import codecs
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chargpt.errors import TokenizerError
from chargpt.tokenizers.base import (
    Errors,
    Ids,
    canonical_json,
    fingerprint_of,
    require_errors,
    require_ids,
    save_canonical,
)


class ByteTokenizer:
    """Ids 0 to 255, the bytes themselves. No text is unknown to it but halves of surrogate pairs, which are no text."""

    kind: Literal["byte"] = "byte"
    vocab_size = 256
    token_bytes = np.ones(256, np.int64)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(canonical_json(self.kind, {}))

    def encode(self, text: str, errors: Errors = "strict") -> Ids:
        """Ids (N,), N the bytes of the text in UTF-8. Raises TokenizerError under "strict" for half a surrogate pair.

        "replace" writes a question mark in its place, as Python does.
        """
        require_errors(errors)
        try:
            data = text.encode("utf-8", "ignore" if errors == "skip" else errors)
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"U+{ord(text[error.start]):04X} at {error.start} is half of a surrogate pair, not a character; "
                f"mend the text's encoding"
            ) from None
        return np.frombuffer(data, np.uint8).copy()

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids (N,), U+FFFD for what is no UTF-8. Raises TokenizerError for ids that are no bytes."""
        return require_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def decoder(self) -> Callable[[npt.ArrayLike], str]:
        """Decodes piece by piece: a character comes with its last byte."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda ids: decode(require_ids(ids, self.vocab_size).astype(np.uint8).tobytes())

    def save(self, path: Path) -> None:
        """Write the JSON that `load_tokenizer` reads, atomically."""
        save_canonical(path, canonical_json(self.kind, {}))


def build(text: str) -> ByteTokenizer:
    return ByteTokenizer()


def from_content(content: dict[str, Any]) -> ByteTokenizer:
    """From the fields of the JSON that `save` wrote, which has none of its own. Raises TokenizerError."""
    if content:
        raise TokenizerError(f"a byte tokenizer has no fields of its own, and this one has {', '.join(content)}")
    return ByteTokenizer()
