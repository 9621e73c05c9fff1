from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="the server needs chargpt[serve]")

from chargpt.config import BigramConfig
from chargpt.models import Ensemble
from chargpt.serve.engine import ModelEngine
from chargpt.tokenizers.byte import ByteTokenizer
from serving import TOKENIZER, Running, Served, made


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    small, other = made(TOKENIZER.vocab_size, 1), made(TOKENIZER.vocab_size, 2)
    bytes_ = ByteTokenizer()
    running = Running(
        {
            "small": ModelEngine(small, TOKENIZER, slots=4, most_waiting=64),
            "two": ModelEngine(Ensemble([small, other]).eval(), TOKENIZER),
            "bigram": ModelEngine(made(TOKENIZER.vocab_size, 3, BigramConfig()), TOKENIZER),
            "bytes": ModelEngine(made(256, 4), bytes_),
        }
    )
    yield running.served
    running.stop()
