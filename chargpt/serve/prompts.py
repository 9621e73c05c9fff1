"""Prompts as tokens, and what a vocabulary does not have."""

from chargpt.errors import ChargptError
from chargpt.generation import prompt_tokens
from chargpt.serve.engine import ModelEngine
from chargpt.tokenizers import Tokenizer


def known_tokens(engine: ModelEngine, prompt: str | list[int], unknown: str = "strict") -> list[int]:
    """A prompt as tokens. Raises ChargptError for what the vocabulary does not have."""
    if isinstance(prompt, str):
        if unknown == "strict" and (missing := sorted(set(prompt) - known_characters(engine.tokenizer, prompt))):
            others = f", nor {len(missing) - 1} other characters of the prompt" if len(missing) > 1 else ""
            raise ChargptError(f"the vocabulary of this model has no {missing[0]!r}{others}: leave them out")
        return prompt_tokens(engine.tokenizer, prompt, unknown)[0].tolist()
    require_known(engine, prompt)
    return prompt


def require_known(engine: ModelEngine, tokens: list[int]) -> None:
    last = engine.model.vocab_size - 1
    if not tokens or not all(0 <= token <= last for token in tokens):
        raise ChargptError(f"a prompt of tokens has at least one, each from 0 to {last}")


def known_characters(tokenizer: Tokenizer, text: str) -> set[str]:
    """Those of a text that a vocabulary has."""
    return set(tokenizer.decode(tokenizer.encode("".join(set(text)), errors="skip")))


def unknown_characters(tokenizer: Tokenizer, text: str) -> int:
    """How many characters of a text a vocabulary does not have."""
    known = known_characters(tokenizer, text)
    return sum(character not in known for character in text)
