"""Reading one token as one CUDA graph: the host launches it at once, in place of some dozen kernels a layer.

The one idea to know: a graph's kernels do the same work at the same places of memory every time. So the token and its
position are tensors that are written before each replay, and attention goes over the whole window's memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from chargpt.models import LanguageModel, Transformer
from chargpt.models.cache import Cache, TransformerCache

WARM_UP = 3  # runs before the recording: libraries choose their kernels
Read = Callable[[Tensor], Tensor]


def reader(model: LanguageModel, cache: Cache) -> Read:
    """A function that reads tokens (B, T) behind what `cache` has, and returns the logits (B, V) after them."""

    def read(tokens: Tensor) -> Tensor:
        return model.logits(model.hidden(tokens, cache)[:, -1])

    if isinstance(model, Transformer) and isinstance(cache, TransformerCache) and model.token_embedding.weight.is_cuda:
        return GraphedReader(cache, read, record)
    return read


class GraphedReader:
    """Reads single tokens as `record` recorded it, once something was read; several, and the first, as `read` does."""

    def __init__(
        self, cache: TransformerCache, read: Read, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
    ) -> None:
        self._cache, self._read, self._record = cache, read, record
        self._replay: Callable[[], Tensor] | None = None
        self._token = self._before = self._position = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        cache = self._cache
        if tokens.size(1) > 1 or cache.length == 0:
            return self._read(tokens)
        if self._replay is None or self._token.shape != tokens.shape:
            assert cache.last is not None
            self._token, self._before = tokens.clone(), cache.last.clone()
            self._position = torch.tensor([cache.length], device=tokens.device)
            self._replay = self._record(self._step)
        self._token.copy_(tokens)
        self._before.copy_(cache.last)  # type: ignore[arg-type]
        self._position.fill_(cache.length)
        logits = self._replay()
        cache.length, cache.last = cache.length + 1, tokens
        return logits

    def _step(self) -> Tensor:
        cache = self._cache
        held, cache.position, cache.last = cache.last, self._position, self._before
        try:
            return self._read(self._token)
        finally:
            cache.position, cache.last = None, held


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the kernels that a step launches; what is returned runs them."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # each writes the same at the same place
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits.clone()  # the next replay overwrites them

    return replay
