"""What a model has read of a batch of windows, so that it reads no token twice.

The one idea to know: what a layer keeps of a token depends on the tokens before it and on its place in the window. So a
cache may only grow at its end. A window that slides needs a new one: what a deeper layer kept still carries tokens that
the window has lost (Xiao et al. 2023, arXiv 2309.17453, keep it all the same; here it is read again).
"""

from collections.abc import Sequence

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
        if self._held is None or self._held[0].shape[0] != B:
            self._held = k.new_empty(B, H, self.block_size, D), v.new_empty(B, H, self.block_size, D)
        for held, new in zip(self._held, (k, v), strict=True):
            held[:, :, start : start + T] = new
        keys, values = self._held
        return keys[:, :, : start + T], values[:, :, : start + T]

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
