"""Tokens: files of them, and the order in which they are read.

shards.py   token files, their manifest, and the split
order.py    batches
"""

from chargpt.data.order import (
    Batch,
    Batches,
    BatchSource,
    BatchStream,
    EpochOrder,
    RandomOrder,
    build_batches,
    random_batch,
    windows,
)
from chargpt.data.shards import (
    MANIFEST,
    Splits,
    Tokens,
    byte_count,
    find_splits,
    keep_splits,
    load_splits,
    read_manifest,
    read_tokens,
    require_known,
    require_size,
    split_at,
    split_tokens,
    verify,
    write_splits,
    write_tokens,
)

__all__ = [
    "MANIFEST",
    "Batch",
    "BatchSource",
    "BatchStream",
    "Batches",
    "EpochOrder",
    "RandomOrder",
    "Splits",
    "Tokens",
    "build_batches",
    "byte_count",
    "find_splits",
    "keep_splits",
    "load_splits",
    "random_batch",
    "read_manifest",
    "read_tokens",
    "require_known",
    "require_size",
    "split_at",
    "split_tokens",
    "verify",
    "windows",
    "write_splits",
    "write_tokens",
]
