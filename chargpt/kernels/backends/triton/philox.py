"""The dropout decisions of `chargpt.kernels.philox` for one tile of the attention matrix.

Triton's `tl.philox` is the same generator, Philox 4x32-10, with the two halves of the seed as its key. One counter
decides for four neighbouring keys, so a quarter of a tile's columns is generated and its four words are interleaved.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-any-return"

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, threshold, batch_head, first_query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which weights survive: (QUERIES, KEYS) booleans.

    seed: int64; threshold: ⌊p · 2³²⌋ as uint32
    first_query, first_key: absolute positions of the tile's corner, first_key a multiple of 4
    """
    blocks = first_key // 4 + tl.arange(0, KEYS // 4)
    queries = first_query + tl.arange(0, QUERIES)
    words = tl.philox(seed, blocks[None, :], queries[:, None], batch_head, 0)  # four of (QUERIES, KEYS / 4)
    keep0, keep1, keep2, keep3 = (
        words[0] >= threshold,
        words[1] >= threshold,
        words[2] >= threshold,
        words[3] >= threshold,
    )
    return tl.interleave(tl.interleave(keep0, keep2), tl.interleave(keep1, keep3))
