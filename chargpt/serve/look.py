"""What a model thinks at one place of a text: the likeliest next tokens, and what each head looks at.

The one idea to know: a generated token was predicted from the window that the model held then, which after a rollover
is shorter than block_size. So a place is named by the prompt and by the tokens that were written since.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from chargpt.models import LanguageModel, Transformer
from chargpt.models.cache import LayerCache, TransformerCache


@dataclass(frozen=True)
class Place:
    """What lies behind a place, and what may follow."""

    window: list[int]  # the tokens that the model sees there
    logprobs: Tensor  # (V,), float32, on the CPU: ln p of each next token
    attention: Tensor | None  # (n_layer, n_head, T), float32, on the CPU: what the last token's query weighs


def held(prompt: int, written: int, block_size: int) -> int:
    """Length of the window behind `prompt` and `written` tokens, as `stream_tokens` rolls over."""
    length, keep = min(prompt, block_size), max(1, block_size // 2)
    free = block_size - length
    return length + written if written <= free else keep + (written - free - 1) % (block_size - keep + 1)


@torch.no_grad()
def look(model: LanguageModel, tokens: list[int], written: int = 0, device: torch.device | str = "cpu") -> Place:
    """What `model` thinks behind `tokens`, of which the last `written` are its own.

    Attention is that of one Transformer alone; of other models it is None.
    Raises ValueError for no tokens.
    """
    if not tokens:
        raise ValueError("there is nothing to look at: no tokens")
    window = tokens[-held(len(tokens) - written, written, model.block_size) :]
    idx = torch.tensor([window], device=device)  # (1, T)
    if not isinstance(model, Transformer):
        logits, attention = model.logits(model.hidden(idx)[:, -1]), None
    else:
        cache = TransformerCache(0, model.block_size)
        layers = [WatchedLayerCache(model.block_size) for _ in model.blocks]
        cache.layers = list(layers)
        if len(window) > 1:
            model.hidden(idx[:, :-1], cache)
        # Read at a position that is a tensor, the last token comes to the cache with its queries.
        cache.position = torch.tensor([len(window) - 1], device=device)
        logits = model.logits(model.hidden(idx[:, -1:], cache)[:, -1])
        attention = torch.stack([layer.weights for layer in layers]).mT.cpu()
    return Place(window, logits[0].float().log_softmax(-1).cpu(), attention)


class WatchedLayerCache(LayerCache):
    """Keeps the weights of the token that was read last."""

    weights: Tensor  # (T, n_head), float32

    def attend_at(self, position: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._held is None:  # nothing lies before it
            self.extend(0, k, v)
        y = super().attend_at(position, q, k, v)
        assert self._held is not None
        keys = self._held[0].float().repeat_interleave(q.size(1) // k.size(1), 1)  # (1, H, block_size, D)
        scores = (q.float() @ keys.mT)[0, :, 0] / q.size(-1) ** 0.5  # (H, block_size)
        self.weights = scores[:, : int(position) + 1].softmax(-1).T
        return y
