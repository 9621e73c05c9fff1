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
    seed = _readable(seed, torch.device(device))
    rows = torch.arange(keys - queries, keys, device=device)  # (T)
    heads = torch.arange(batch_heads, device=device)[:, None, None]  # (BH, 1, 1)
    return _survivors(seed, p, keys, rows[:, None], heads)


def row_keep_mask(seed: Tensor, p: float, rows: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Which channels of rows survive dropout between layers: bool (rows, channels). The same rule, whose counter is
    (channel // 8, row mod 2^32, row // 2^32, 0).

    Raises RuntimeError as `dropout_keep_mask` does.
    """
    seed = _readable(seed, torch.device(device))
    numbers = torch.arange(rows, device=device)[:, None]  # (rows, 1)
    return _survivors(seed, p, channels, numbers & LOW, numbers >> 32)


def _readable(seed: Tensor, device: torch.device) -> Tensor:
    """The seed where computing on `device` may read it."""
    if torch.compiler.is_compiling():
        # inductor would read it on the host for every launch, and nothing would refuse to capture that. A copy is what
        # torch refuses to capture, and inductor leaves out of its own graphs. The host does not wait for it.
        return seed.to(device, non_blocking=True)
    if seed.device.type == "cpu" and device.type == "cuda":
        refuse_capture()
    return seed


def _survivors(seed: Tensor, p: float, columns: int, c1: Tensor, c2: Tensor) -> Tensor:
    """Bool (…, columns), of the counters (column // 8, c1, c2, 0); c1 and c2 are (…, 1)."""
    blocks = (columns + 7) // 8
    c0 = torch.arange(blocks, device=c1.device)
    random = torch.stack(
        philox_4x32((c0, c1, c2, torch.zeros_like(c0[:1])), (seed & LOW, (seed >> 32) & LOW)), dim=-1
    )  # (…, blocks, 4)
    halves = torch.stack((random % UNIT, random // UNIT), dim=-1)  # (…, blocks, 4, 2)
    return (halves >= int(p * UNIT)).flatten(-3)[..., :columns]


def refuse_capture() -> None:
    """Raise RuntimeError while the current CUDA stream is captured: a graph would keep the seed that the host reads."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout cannot be captured in a CUDA graph while its seed lies on the CPU, because every replay would "
            "drop the same elements; let a generator of the GPU draw it, or capture with dropout_p=0"
        )
