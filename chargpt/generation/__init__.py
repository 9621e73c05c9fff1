"""Text from a model: logits to probabilities, probabilities to a token, tokens to text.

generator.py   a prompt in, samples out, in pieces or whole
sampler.py     drawing tokens in torch, as small pure functions
native.py      the same in C++, for one Transformer on a CPU
"""

from chargpt.generation.generator import (
    Completion,
    Generator,
    Piece,
    SampleText,
    choose_engine,
    generate_text,
    prompt_tokens,
)
from chargpt.generation.native import NativeDecoder, why_not
from chargpt.generation.sampler import generate, next_token_probabilities, stream_tokens

__all__ = [
    "Completion",
    "Generator",
    "NativeDecoder",
    "Piece",
    "SampleText",
    "choose_engine",
    "generate",
    "generate_text",
    "next_token_probabilities",
    "prompt_tokens",
    "stream_tokens",
    "why_not",
]
