"""Tokenizers: text to ids and back. `build_tokenizer` makes one from a text, `load_tokenizer` reads one from its JSON.

The one idea to know: a saved tokenizer is plain JSON, checked field by field when it is read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chargpt.config import TokenizerConfig
from chargpt.errors import TokenizerError
from chargpt.tokenizers.base import FORMAT, VERSION, Errors, Ids, Tokenizer, token_dtype
from chargpt.tokenizers.character import CharacterTokenizer

__all__ = ["CharacterTokenizer", "Errors", "Ids", "Tokenizer", "build_tokenizer", "load_tokenizer", "token_dtype"]

KINDS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {"character": CharacterTokenizer.from_content}


def build_tokenizer(config: TokenizerConfig, text: str) -> Tokenizer:
    """The tokenizer that `config` asks for, with a vocabulary that covers `text`. Raises TokenizerError."""
    match config.kind:
        case "character":
            return CharacterTokenizer(text)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read the JSON that a tokenizer's `save` wrote. Raises TokenizerError when it is missing, damaged or foreign."""
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise TokenizerError(f"{path} is damaged or no tokenizer ({error}); make it again") from None
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise TokenizerError(f"{path} is no tokenizer of chargpt: its field `format` is not {FORMAT!r}")
    version, kind = record.pop("version", None), record.pop("kind", None)
    if version != VERSION:
        raise TokenizerError(f"{path} has format version {version!r}; this chargpt reads version {VERSION}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise TokenizerError(f"{path} has the kind {kind!r}; this chargpt knows {', '.join(KINDS)}")
    try:
        return KINDS[kind](record)
    except TokenizerError as error:
        raise TokenizerError(f"{path} is damaged: {error}; make it again") from None
