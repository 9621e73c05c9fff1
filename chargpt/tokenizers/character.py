"""The character tokenizer: one id for each Unicode code point, in the order of the code points.

The one idea to know: UTF-32 makes a text an array of numbers, so encoding and decoding are table look-ups.
"""

from collections.abc import Callable, Iterable
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
    token_dtype,
)

UTF32 = np.dtype("<u4")
CODE_POINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)  # halves of UTF-16 pairs: no characters, and not allowed in UTF-8
CHUNK = 1 << 20  # characters encoded at a time, so that a long text needs little memory beyond its ids
UNKNOWN = -1


class CharacterTokenizer:
    """Ids 0, 1, … for the distinct characters of `symbols`, sorted by code point.

    `symbols` may be a whole text, or a list of characters in any order. Under errors="replace" an unknown character
    becomes U+FFFD when the vocabulary has it, else a space, else the first symbol. Raises TokenizerError when there
    is no symbol, or one is half of a surrogate pair.
    """

    kind: Literal["character"] = "character"

    def __init__(self, symbols: str | Iterable[str]) -> None:
        text = symbols if isinstance(symbols, str) else "".join(symbols)
        seen = np.zeros(CODE_POINTS, dtype=bool)
        for start in range(0, len(text), CHUNK):
            seen[_code_points(text[start : start + CHUNK])] = True
        if not seen.any():
            raise TokenizerError("a character tokenizer needs at least one symbol; give it a text that is not empty")
        if seen[SURROGATES].any():
            code = SURROGATES.start + int(seen[SURROGATES].argmax())
            raise TokenizerError(f"U+{code:04X} is half of a surrogate pair, not a character; mend the text's encoding")
        self._codes: npt.NDArray[np.uint32] = np.flatnonzero(seen).astype(UTF32)  # (V,) id → code point
        # (largest code point + 2,) code point → id; the last entry stands for all code points beyond the largest.
        self._ids = np.full(int(self._codes[-1]) + 2, UNKNOWN, dtype=np.int32)
        self._ids[self._codes] = np.arange(len(self._codes))

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "CharacterTokenizer":
        """From the fields of the JSON that `save` wrote. Raises TokenizerError when they are not that."""
        symbols = content.get("symbols")
        if content.keys() != {"symbols"} or not isinstance(symbols, str):
            raise TokenizerError("a character tokenizer has exactly one more field, the text `symbols`")
        tokenizer = cls(symbols)
        if tokenizer.symbols != symbols:
            raise TokenizerError("`symbols` must be sorted by code point, each once")
        return tokenizer

    @cached_property
    def symbols(self) -> str:
        """The vocabulary: the symbol of id i stands at position i."""
        return self._codes.tobytes().decode("utf-32-le")

    @property
    def vocab_size(self) -> int:
        return len(self._codes)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self._canonical)

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 (V,) of each symbol."""
        return 1 + np.sum(self._codes[:, None] >= [0x80, 0x800, 0x10000], axis=1)  # type: ignore[no-any-return]

    @property
    def replacement(self) -> str:
        """The symbol that errors="replace" writes for an unknown character."""
        return next((symbol for symbol in "\ufffd " if symbol in self.symbols), self.symbols[0])

    def encode(self, text: str, errors: Errors = "strict") -> Ids:
        """Ids (N,) of a text, N its characters (fewer under "skip"), in the smallest unsigned dtype.

        Raises TokenizerError under "strict" for characters outside the vocabulary, with their positions.
        """
        require_errors(errors)
        dtype = token_dtype(self.vocab_size)
        parts = [np.empty(0, dtype)]
        for start in range(0, len(text), CHUNK):
            codes = _code_points(text[start : start + CHUNK])
            ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
            unknown = ids == UNKNOWN
            if unknown.any():
                if errors == "strict":
                    raise TokenizerError(self._describe_unknown(codes, np.flatnonzero(unknown), start))
                if errors == "replace":
                    ids[unknown] = self.symbols.index(self.replacement)
                else:
                    ids = ids[~unknown]
            parts.append(ids.astype(dtype))
        return np.concatenate(parts)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids (N,), of any integer dtype. Raises TokenizerError for anything else, or ids out of range."""
        array = require_ids(ids, self.vocab_size)
        return str(self._codes[array], "utf-32-le")

    def decoder(self) -> Callable[[npt.ArrayLike], str]:
        """`decode` itself: every id is a whole character."""
        return self.decode

    def save(self, path: Path) -> None:
        """Write the JSON that `load_tokenizer` reads, atomically."""
        save_canonical(path, self._canonical)

    @property
    def _canonical(self) -> bytes:
        return canonical_json(self.kind, {"symbols": self.symbols})

    def _describe_unknown(
        self, codes: npt.NDArray[np.uint32], unknown: npt.NDArray[np.intp], start: int, shown: int = 5
    ) -> str:
        """Names the characters at the places `unknown` of `codes`, which begin at `start` in the text."""
        places: dict[int, list[int]] = {}
        for place in unknown[:1000].tolist():
            places.setdefault(int(codes[place]), []).append(start + place)
        listed = [
            f"{chr(code)!r} (U+{code:04X}) at {', '.join(map(str, at[:3]))}{', …' if len(at) > 3 else ''}"
            for code, at in list(places.items())[:shown]
        ]
        more = " and others" if len(places) > shown else ""
        return (
            f"the vocabulary of {self.vocab_size} symbols has no {'; '.join(listed)}{more} (positions count from 0); "
            f"leave them out, or have them replaced or skipped (--unknown replace or skip on the command line, "
            f"`unknown` in params.yaml, `errors` in the library)"
        )


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points (N,) of a text; surrogates pass, to be refused later with their names."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=UTF32)


build, from_content = CharacterTokenizer, CharacterTokenizer.from_content
