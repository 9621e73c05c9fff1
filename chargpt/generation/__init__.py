"""Text from a model: logits to probabilities, probabilities to a token, tokens to text.

sampler.py   all of it, as small pure functions
"""

from chargpt.generation.sampler import (
    generate,
    generate_text,
    next_token_probabilities,
    prompt_tokens,
    stream_text,
    stream_tokens,
)

__all__ = [
    "generate",
    "generate_text",
    "next_token_probabilities",
    "prompt_tokens",
    "stream_text",
    "stream_tokens",
]
