"""The dropout decisions of `chargpt.kernels.philox` for one tile of the attention matrix.

Triton's `tl.philox` is the same generator, Philox 4x32, with the two halves of the seed as its key. One counter decides
for eight neighbouring keys, so an eighth of a tile's columns is generated, and the halves of its words are interleaved.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-any-return"

import triton
import triton.language as tl

from chargpt.kernels import philox

ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def keep_tile(seed, threshold, batch_head, first_query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which weights survive: (QUERIES, KEYS) booleans.

    seed: int64; threshold: p · 2¹⁶ as uint32
    first_query, first_key: absolute positions of the tile's corner, first_key a multiple of 8
    """
    blocks = first_key // 8 + tl.arange(0, KEYS // 8)
    queries = first_query + tl.arange(0, QUERIES)
    word0, word1, word2, word3 = tl.philox(
        seed, blocks[None, :], queries[:, None], batch_head, 0, n_rounds=ROUNDS
    )  # (QUERIES, KEYS / 8)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))  # (QUERIES, KEYS / 2), in order
    return tl.interleave((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
