"""What a model has read of a batch of windows, so that it reads no token twice.

The one idea to know: what a layer keeps of a token depends on the tokens before it and on its place in the window. So a
cache may only grow at its end. A window that slides needs a new one: what a deeper layer kept still carries tokens that
the window has lost (Xiao et al. 2023, arXiv 2309.17453, keep it all the same; here it is read again).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """How many tokens were read. Enough for a model that looks at the last one alone."""

    def __init__(self) -> None:
        self.length = 0

    def clear(self) -> None:
        """Forget all; the memory stays."""
        self.length = 0

    def spread(self, rows: int) -> None:
        """The one window that was read becomes the beginning of `rows` windows."""


class LayerCache:
    """Keys and values of one layer in memory for a whole window: (B, H_kv, block_size, D), made when the first come."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._held: tuple[Tensor, Tensor] | None = None

    def extend(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, H_kv, T, D) at positions `start` to start + T; returns all of (B, H_kv, start + T, D)."""
        B, H, T, D = k.shape
        if self._held is None or self._held[0].shape[0] != B:  # zeros, since `attend_at` reads all of it
            self._held = k.new_zeros(B, H, self.block_size, D), v.new_zeros(B, H, self.block_size, D)
        for held, new in zip(self._held, (k, v), strict=True):
            held[:, :, start : start + T] = new
        keys, values = self._held
        return keys[:, :, : start + T], values[:, :, : start + T]

    def attend_at(self, position: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v (B, H_kv, 1, D) at `position` (1,), and attend there with q (B, H, 1, D): (B, H, 1, D).

        For a CUDA graph, whose kernels do the same work at the same places every time: `position` is a tensor, and what
        lies behind it is read and weighs nothing.
        """
        assert self._held is not None, "what comes first is read with `extend`"
        keys, values = self._held
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        B, H, _, D = q.shape
        grouped = q.view(B, keys.size(1), -1, D)  # (B, H_kv, H / H_kv, D)
        scores = grouped @ keys.mT / D**0.5  # (B, H_kv, H / H_kv, block_size)
        behind = torch.arange(self.block_size, device=q.device) > position
        y: Tensor = scores.masked_fill(behind, -torch.inf).softmax(-1) @ values
        return y.view(B, H, 1, D)

    def spread(self, rows: int) -> None:
        if self._held is not None:
            keys, values = self._held
            self._held = keys.repeat(rows, 1, 1, 1), values.repeat(rows, 1, 1, 1)


class TransformerCache(Cache):
    """The layers' keys and values, and the last token, which the next one's pair begins with."""

    def __init__(self, n_layer: int, block_size: int) -> None:
        super().__init__()
        self.layers = [LayerCache(block_size) for _ in range(n_layer)]
        self.last: Tensor | None = None  # (B, 1)
        self.position: Tensor | None = None  # (1,): where the one token that is read stands, in place of `length`

    def clear(self) -> None:
        super().clear()
        self.last = None

    def spread(self, rows: int) -> None:
        for layer in self.layers:
            layer.spread(rows)
        self.last = None if self.last is None else self.last.repeat(rows, 1)


class EnsembleCache(Cache):
    """One for each member."""

    def __init__(self, members: Sequence[Cache]) -> None:
        super().__init__()
        self.members = members

    def clear(self) -> None:
        super().clear()
        for member in self.members:
            member.clear()

    def spread(self, rows: int) -> None:
        for member in self.members:
            member.spread(rows)
