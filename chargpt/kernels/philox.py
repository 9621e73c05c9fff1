"""Philox 4x32-7, a counter-based random generator: four random words are a pure function of a counter and a key.

So every dropout decision can be computed anywhere, in any order, from the position it belongs to. J. Salmon,
M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: seven rounds are the fewest that
passed all their statistical tests (table 2).
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
ROUNDS = 7
LOW = 0xFFFFFFFF
UNIT = 2**16  # a weight survives or not by 16 bits, so probabilities are multiples of 1 / UNIT


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four 32-bit words for each counter.

    counter: four int64 tensors with values in [0, 2^32), of shapes that broadcast together
    key: two int64 tensors with values in [0, 2^32), likewise
    returns: four int64 tensors with values in [0, 2^32)

    torch has no full set of operators on uint32, so words live in int64. Their 64-bit products wrap modulo 2^64, and
    both halves are still right. Broadcasting is kept up for as long as a word depends on few counter words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(ROUNDS):
        if round_ > 0:
            k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ (c1 ^ k0), p1 & LOW, ((p0 >> 32) & LOW) ^ (c3 ^ k1), p0 & LOW
    return c0, c1, c2, c3


def dropout_keep_mask(
    seed: Tensor, p: float, batch_heads: int, queries: int, keys: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Which attention weights survive dropout: bool (batch_heads, queries, keys). The rule for all implementations:

    - seed: a 0-dimensional int64, on `device` or on the CPU; Philox's key is (seed mod 2^32, seed // 2^32).
    - Philox's counter is (key position // 8, query position, batch · H + head, 0), and its four output words are eight
      halves, the lower one of a word first: half j decides for the key position with remainder j modulo 8.
    - Positions are absolute: key s of the S keys has position s, query i of the T queries has position S − T + i.
      So a decision does not depend on T, on S, or on how the work is tiled.
    - A weight is dropped where its half is < p · 2^16, a whole number; the others are multiplied by 1 / (1 − p).

    Raises RuntimeError for a seed on the CPU and a mask on a GPU whose current stream is captured.
    """
    if torch.compiler.is_compiling():
        # inductor would read it on the host for every launch, and nothing would refuse to capture that. A copy is what
        # torch refuses to capture, and inductor leaves out of its own graphs. The host does not wait for it.
        seed = seed.to(device, non_blocking=True)
    elif seed.device.type == "cpu" and torch.device(device).type == "cuda":
        refuse_capture()

    def words(start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=device)

    blocks = (keys + 7) // 8
    counter = (
        words(0, blocks),  # (S/8)
        words(keys - queries, keys)[:, None],  # (T, 1)
        words(0, batch_heads)[:, None, None],  # (BH, 1, 1)
        words(0, 1),  # (1)
    )
    random = torch.stack(philox_4x32(counter, (seed & LOW, (seed >> 32) & LOW)), dim=-1)  # (BH, T, S/8, 4)
    halves = torch.stack((random % UNIT, random // UNIT), dim=-1)  # (BH, T, S/8, 4, 2)
    return (halves >= int(p * UNIT)).reshape(batch_heads, queries, 8 * blocks)[..., :keys]


def refuse_capture() -> None:
    """Raise RuntimeError while the current CUDA stream is captured: a graph would keep the seed that the host reads."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention with dropout cannot be captured in a CUDA graph while its seed lies on the CPU, because every "
            "replay would drop the same weights; let a generator of the GPU draw it, or capture with dropout_p=0"
        )
