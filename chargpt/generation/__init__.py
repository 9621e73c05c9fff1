"""Text from a model: logits to probabilities, probabilities to a token, tokens to text.

sampler.py   all of it, as small pure functions
native.py    the same in C++, for one Transformer on a CPU
"""

from chargpt.generation.native import NativeDecoder, why_not
from chargpt.generation.sampler import (
    choose_engine,
    generate,
    generate_text,
    next_token_probabilities,
    prompt_tokens,
    stream_text,
    stream_tokens,
)

__all__ = [
    "NativeDecoder",
    "choose_engine",
    "generate",
    "generate_text",
    "next_token_probabilities",
    "prompt_tokens",
    "stream_text",
    "stream_tokens",
    "why_not",
]
