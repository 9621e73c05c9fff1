"""Tokenizers: text to ids and back. `build_tokenizer` makes one from a text, `load_tokenizer` reads one from its JSON.

The one idea to know: a saved tokenizer is plain JSON, checked field by field when it is read.

base.py        what all of them share
character.py   one id for each character of the text
byte.py        the 256 bytes

Each kind is the module of its name, with `build(text)` and `from_content(fields)`: to add one, write the module and
name it in `TokenizerConfig`.
"""

import importlib
import json
import typing
from pathlib import Path
from types import ModuleType

from chargpt.config import TokenizerConfig
from chargpt.errors import TokenizerError
from chargpt.files import read_regular
from chargpt.tokenizers.base import FORMAT, VERSION, Errors, Ids, Tokenizer, token_dtype
from chargpt.tokenizers.character import CharacterTokenizer

__all__ = [
    "KINDS",
    "CharacterTokenizer",
    "Errors",
    "Ids",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "parse_tokenizer",
    "token_dtype",
]

MOST_BYTES = 2**28  # of a tokenizer's file
KINDS: tuple[str, ...] = typing.get_args(typing.get_type_hints(TokenizerConfig)["kind"])


def build_tokenizer(config: TokenizerConfig, text: str) -> Tokenizer:
    """The tokenizer that `config` asks for, with a vocabulary that covers `text`. Raises TokenizerError."""
    return typing.cast(Tokenizer, _module(config.kind).build(text))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read the JSON that a tokenizer's `save` wrote. Raises TokenizerError when it is missing, damaged or foreign."""
    try:
        data = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise TokenizerError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TokenizerError(f"{path} is no tokenizer: {error}") from None
    return parse_tokenizer(data, path)


def parse_tokenizer(data: bytes, path: Path) -> Tokenizer:
    """The tokenizer whose file at `path` has these bytes. Raises TokenizerError when they are damaged or foreign."""
    try:
        record = json.loads(data)
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
        return typing.cast(Tokenizer, _module(kind).from_content(record))
    except TokenizerError as error:
        raise TokenizerError(f"{path} is damaged: {error}; make it again") from None


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"chargpt.tokenizers.{kind}")
