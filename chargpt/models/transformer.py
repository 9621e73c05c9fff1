"""A decoder-only Transformer whose config chooses its parts, from the lecture's first attention head to modern blocks.

Norm, positions, attention, MLP, block, model: read from top to bottom. Shapes: B batch, T time, C = n_embd channels,
H query heads, H_kv key and value heads, D = C / H, V vocabulary.
"""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from chargpt.config import TransformerConfig
from chargpt.kernels import (
    activation,
    add_norm,
    by_reference,
    causal_attention,
    linear_cross_entropy,
    packed_causal_attention,
    qkv_heads,
)
from chargpt.models.base import LanguageModel
from chargpt.models.cache import Cache, LayerCache, TransformerCache
from chargpt.models.tied import embed_and_keep, pays

BIGRAM_ROWS = 2**16  # the most that a table of token pairs takes


class AddNorm(nn.Module):
    """Adds a branch, after its dropout, to the residual stream and normalises the sum for the next branch:
    `norm(x + dropout(f(x)))` reads once. Without a residual stream, and at the start, the branch takes its place.

    LayerNorm (Ba et al. 2016, arXiv 1607.06450); RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), which has no gain
    here: the linear layer behind it can hold one.
    """

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.kind, self.residual, self.dropout, self.backend = config.norm, config.residual, config.dropout, backend
        layernorm = config.norm == "layernorm"
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if layernorm else None
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if layernorm and config.bias else None

    def forward(
        self, x: torch.Tensor | None, branch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T, C) each
        p = self.dropout if self.training else 0.0
        stream = x if self.residual else None
        if p > 0 and not branch.is_cpu:  # the reference makes a mask in many passes, torch's own dropout in one
            dtype = branch.dtype if stream is None else stream.dtype
            if by_reference("add_norm", branch.device.type, dtype, self.backend):
                branch, p = F.dropout(branch, p), 0.0
        return add_norm(stream, branch, self.weight, self.bias, norm=self.kind, dropout_p=p, impl=self.backend)


class RotaryPositions(nn.Module):
    """The angles by which rotary positions turn queries and keys (Su et al. 2021, arXiv 2104.09864, eq. 15 and 34).

    Channels i and i + D/2 of position t turn by t · 10000^(-2i/D).
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, block_size: int, head_size: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)  # (D/2,)
        angles = torch.outer(torch.arange(block_size), frequencies)  # (T, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (block_size, D/2) in float32, whatever dtype the model was moved to."""
        return self.cos.float(), self.sin.float()


def rows_from(table: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
    """The rows of a table (N, …) from a number on, or the one (1, …) that a tensor (1,) names."""
    return table[start:] if isinstance(start, int) else table.index_select(0, start)


class CausalSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) over the past, with optional grouped kv heads."""

    def __init__(self, config: TransformerConfig, vocab_size: int, backend: str) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        self.qk_norm, self.dropout, self.backend = config.qk_norm, config.dropout, backend
        kv_channels = self.n_kv_head * self.head_size
        self.qkv = nn.Linear(config.n_embd, config.n_embd + 2 * kv_channels, bias=config.bias)
        self.rotary = RotaryPositions(config.block_size, self.head_size) if config.position == "rotary" else None
        self.value_embedding = nn.Embedding(vocab_size, kv_channels) if config.value_embeddings else None
        self.projection = (
            nn.Linear(config.n_embd, config.n_embd, bias=config.bias) if config.residual else nn.Identity()
        )

    def forward(
        self, x: torch.Tensor, idx: torch.Tensor, cache: LayerCache | None = None, start: int | torch.Tensor = 0
    ) -> torch.Tensor:  # (B, T, C), (B, T); start: the first token's position, as a tensor (1,) that of the only one
        B, T, C = x.shape
        dropout_p = self.dropout if self.training else 0.0
        if cache is None and self.value_embedding is None and self.rotary is None and not self.qk_norm:
            y = packed_causal_attention(
                self.qkv(x), n_head=self.n_head, n_kv_head=self.n_kv_head, dropout_p=dropout_p, impl=self.backend
            )
            return self.projection(y)  # type: ignore[no-any-return]
        rows = None if self.value_embedding is None else self.value_embedding(idx)  # (B, T, H_kv · D)
        cos, sin = (None, None) if self.rotary is None else (rows_from(table, start) for table in self.rotary.angles())
        q, k, v = qkv_heads(
            self.qkv(x),
            rows,
            cos,
            sin,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            qk_norm=self.qk_norm,
            impl=self.backend,
        )  # (B, H or H_kv, T, D)
        if isinstance(start, torch.Tensor):
            assert cache is not None
            y = cache.attend_at(start, q, k, v)
        else:
            if cache is not None:
                k, v = cache.extend(start, k, v)  # (B, H_kv, S, D)
            y = causal_attention(q, k, v, dropout_p=dropout_p, impl=self.backend)
        return self.projection(y.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]  # heads side by side


class MLP(nn.Module):
    """One hidden layer per token."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.activation, self.backend = config.mlp, backend
        hidden = round(config.mlp_width * config.n_embd)
        self.expand = nn.Linear(config.n_embd, hidden * (2 if config.mlp == "swiglu" else 1), bias=config.bias)
        self.projection = nn.Linear(hidden, config.n_embd, bias=config.bias) if config.residual else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C)
        h = self.expand(x)  # (B, T, hidden), twice that for SwiGLU
        return self.projection(activation(h, self.activation, impl=self.backend))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Communication, then computation: attention between tokens, an MLP on each; both read the normalised stream.

    What a branch returns is dropped out and added to the stream by the next norm, so a block takes and gives both.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, backend: str) -> None:
        super().__init__()
        self.attention_norm = AddNorm(config, backend)
        self.attention = CausalSelfAttention(config, vocab_size, backend)
        self.mlp_norm = AddNorm(config, backend) if config.mlp != "none" else None
        self.mlp = MLP(config, backend) if config.mlp != "none" else None

    def forward(
        self,
        x: torch.Tensor | None,
        branch: torch.Tensor,
        idx: torch.Tensor,
        cache: LayerCache | None = None,
        start: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T, C) each; idx (B, T)
        x, h = self.attention_norm(x, branch)
        branch = self.attention(h, idx, cache, start)
        if self.mlp is not None and self.mlp_norm is not None:
            x, h = self.mlp_norm(x, branch)
            branch = self.mlp(h)
        return x, branch


class Transformer(LanguageModel):
    """Token (and position) embeddings, blocks, a last norm, and a head that may share the embedding's table.

    Raises ValueError when more than `block_size` tokens are fed.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, backend: str = "auto") -> None:
        super().__init__()
        seed = int(torch.randint(2**62, ()))  # before any part draws, so that the parts do not matter to it
        self.config, self.vocab_size, self.backend = config, vocab_size, backend
        self.block_size, self.width = config.block_size, config.n_embd  # tokens of context; C
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.bigram_embedding = (
            nn.Embedding(min(vocab_size**2, BIGRAM_ROWS), config.n_embd) if config.bigram_embeddings else None
        )
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(config, vocab_size, backend) for _ in range(config.n_layer))
        self.norm = AddNorm(config, backend)
        self.head = None if config.tied_head else nn.Linear(config.n_embd, vocab_size, bias=config.bias)
        self._initialise(seed)

    def new_cache(self) -> Cache:
        return TransformerCache(self.config.n_layer, self.block_size)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        parts = self.hidden, self.loss, self._head  # a subclass, or an object, may have its own
        usual = Transformer.hidden, Transformer.loss, Transformer._head
        own = tuple(getattr(part, "__func__", None) for part in parts) == usual
        if self.head is not None or not own or not pays(self.token_embedding, idx):
            return super().forward(idx, targets, reduction)
        x, table = embed_and_keep(self.token_embedding.weight, idx)
        return self._loss(self._hidden(x, idx), targets, reduction, table, None)

    def hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """What the head reads for each of `idx` (B, T): (B, T, C)."""
        return self._hidden(self.token_embedding(idx), idx, cache)

    def _hidden(self, x: torch.Tensor, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:  # x (B, T, C)
        assert cache is None or isinstance(cache, TransformerCache)
        T, length = idx.size(1), 0 if cache is None else cache.length
        if self.block_size < length + T:
            raise ValueError(f"{length + T} tokens were fed to a model whose block_size is {self.block_size}")
        start = length if cache is None or cache.position is None else cache.position
        if self.bigram_embedding is not None:
            x = x + self.bigram_embedding(self._bigrams(idx, None if cache is None else cache.last))
        if self.position_embedding is not None:
            x = x + rows_from(self.position_embedding.weight, start)[:T]
        # Transforms of torch.func, which know no hooks on what is saved, keep all.
        transformed = torch._C._are_functorch_transforms_active()
        again = self.recompute and cache is None and torch.is_grad_enabled() and not transformed
        stream, branch = None, x
        for i, block in enumerate(self.blocks):
            if again:
                stream, branch = checkpoint(block, stream, branch, idx, use_reentrant=False)
            else:
                stream, branch = block(stream, branch, idx, None if cache is None else cache.layers[i], start)
        _, x = self.norm(stream, branch)
        if cache is not None and cache.position is None:
            cache.length, cache.last = length + T, idx[:, -1:]
        return x

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) for the token after each of the hidden states (…, C)."""
        # The head as a module, so that one that replaced it, a quantised one say, is taken.
        logits = F.linear(h, self.token_embedding.weight) if self.head is None else self.head(h)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, h: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy in nats of `targets` (…) after the hidden states (…, C); () for "mean" or "sum", else (…)."""
        return self._loss(h, targets, reduction, *self._head())

    def _loss(
        self, h: torch.Tensor, targets: torch.Tensor, reduction: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        cap = self.config.logit_softcap
        return linear_cross_entropy(h, weight, targets, bias, softcap=cap, reduction=reduction, impl=self.backend)

    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None]:  # (V, C), (V,)
        return (self.token_embedding.weight, None) if self.head is None else (self.head.weight, self.head.bias)

    def _bigrams(self, idx: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """The row (B, T) of each token and the one before it in the table of pairs. The first is behind
        `last` (B, 1); where there is none, it stands for both.

        Vocabularies with more pairs than rows share rows, spread by a multiplication (Knuth, TAOCP 3, section 6.4).
        """
        assert self.bigram_embedding is not None
        before = torch.cat([idx[:, :1] if last is None else last, idx[:, :-1]], 1)
        pairs = before * self.vocab_size + idx
        rows = self.bigram_embedding.num_embeddings
        return pairs if rows == self.vocab_size**2 else pairs * 2654435761 % 2**32 % rows

    def _initialise(self, seed: int) -> None:
        """`gpt2`: N(0, 0.02), projections into the residual stream narrower by √(2 · n_layer). `torch`: torch's own.

        Biases, value and bigram embeddings begin at zero. Every other weight is drawn from `seed` and its own name, so
        models that differ in some parts begin with the same weights in all others.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            bias = module.bias if isinstance(module, nn.Linear) else None
            if name.endswith(("value_embedding", "bigram_embedding")):
                nn.init.zeros_(module.weight)
            elif self.config.init == "gpt2":
                narrower = math.sqrt(2 * self.config.n_layer) if name.endswith("projection") else 1.0
                nn.init.normal_(module.weight, std=0.02 / narrower, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
            else:
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if bias is not None:
                nn.init.zeros_(bias)
