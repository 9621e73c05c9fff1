"""Tokens: files of them, and the order in which they are read.

shards.py   token files and splits
order.py    batches
"""

from chargpt.data.order import Batch, BatchSource, EpochBatches, RandomBatches, random_batch, windows
from chargpt.data.shards import (
    Splits,
    Tokens,
    load_splits,
    read_tokens,
    require_size,
    split_tokens,
    write_splits,
    write_tokens,
)

__all__ = [
    "Batch",
    "BatchSource",
    "EpochBatches",
    "RandomBatches",
    "Splits",
    "Tokens",
    "load_splits",
    "random_batch",
    "read_tokens",
    "require_size",
    "split_tokens",
    "windows",
    "write_splits",
    "write_tokens",
]
