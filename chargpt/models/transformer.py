"""A decoder-only Transformer whose config chooses its parts, from the lecture's first attention head to modern blocks.

Norm, positions, attention, MLP, block, model: read from top to bottom. Shapes: B batch, T time, C = n_embd channels,
H query heads, H_kv key and value heads, D = C / H, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from chargpt.config import TransformerConfig
from chargpt.kernels import causal_attention, softmax_cross_entropy


def build_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd)
    return nn.Identity()


class RotaryPositions(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position (Su et al. 2021, arXiv 2104.09864, eq. 34).

    Channel i is paired with channel i + D/2 at frequency 10000^(-2i/D).
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, block_size: int, head_size: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)  # (D/2,)
        angles = torch.outer(torch.arange(block_size), frequencies)  # (T, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, T, D)
        cos, sin = self.cos[: x.size(2)].to(x.dtype), self.sin[: x.size(2)].to(x.dtype)
        a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2) over the past, with optional grouped kv heads."""

    def __init__(self, config: TransformerConfig, vocab_size: int, kernels: str) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        self.qk_norm, self.dropout, self.kernels = config.qk_norm, config.dropout, kernels
        kv_channels = self.n_kv_head * self.head_size
        self.qkv = nn.Linear(config.n_embd, config.n_embd + 2 * kv_channels, bias=config.bias)
        self.rotary = RotaryPositions(config.block_size, self.head_size) if config.position == "rotary" else None
        self.value_embedding = nn.Embedding(vocab_size, kv_channels) if config.value_embeddings else None
        self.projection = (
            nn.Linear(config.n_embd, config.n_embd, bias=config.bias) if config.residual else nn.Identity()
        )

    def forward(self, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:  # (B, T, C), (B, T)
        B, T, C = x.shape
        # One projection, read in place: q, k and v are strided views of it.
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_size).transpose(1, 2)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)  # (B, H or H_kv, T, D)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_size,)), F.rms_norm(k, (self.head_size,))
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if self.value_embedding is not None:
            v = v + self.value_embedding(idx).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)
        y = causal_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, impl=self.kernels)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return F.dropout(self.projection(y), self.dropout, self.training)


class MLP(nn.Module):
    """One hidden layer per token. SwiGLU: Shazeer 2020, arXiv 2002.05202, eq. 5; ReLU²: So et al. 2021, 2109.08668."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation, self.dropout = config.mlp, config.dropout
        hidden = round(config.mlp_width * config.n_embd)
        self.expand = nn.Linear(config.n_embd, hidden * (2 if config.mlp == "swiglu" else 1), bias=config.bias)
        self.projection = nn.Linear(hidden, config.n_embd, bias=config.bias) if config.residual else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C)
        h = self.expand(x)  # (B, T, hidden), twice that for SwiGLU
        if self.activation == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        elif self.activation == "gelu":
            h = F.gelu(h)
        else:
            h = F.relu(h)
            h = h.square() if self.activation == "relu2" else h
        return F.dropout(self.projection(h), self.dropout, self.training)


class Block(nn.Module):
    """Communication, then computation: attention between tokens, an MLP on each; both normalised before."""

    def __init__(self, config: TransformerConfig, vocab_size: int, kernels: str) -> None:
        super().__init__()
        self.residual = config.residual
        self.attention_norm = build_norm(config)
        self.attention = CausalSelfAttention(config, vocab_size, kernels)
        self.mlp_norm = build_norm(config) if config.mlp != "none" else None
        self.mlp = MLP(config) if config.mlp != "none" else None

    def forward(self, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:  # (B, T, C), (B, T)
        y = self.attention(self.attention_norm(x), idx)
        x = x + y if self.residual else y
        if self.mlp is None or self.mlp_norm is None:
            return x
        y = self.mlp(self.mlp_norm(x))  # (B, T, C)
        return x + y if self.residual else y  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Token (and position) embeddings, blocks, a last norm, and a head that may share the embedding's table.

    Raises ValueError when more than `block_size` tokens are fed.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, kernels: str = "auto") -> None:
        super().__init__()
        self.config, self.vocab_size, self.kernels = config, vocab_size, kernels
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(config, vocab_size, kernels) for _ in range(config.n_layer))
        self.norm = build_norm(config)
        self.head = None if config.tied_head else nn.Linear(config.n_embd, vocab_size, bias=config.bias)
        self._initialise()

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (B, T, V) for the token after each of `idx` (B, T), and the mean loss in nats if `targets` (B, T)."""
        T = idx.size(1)
        if self.block_size < T:
            raise ValueError(f"{T} tokens were fed to a model whose block_size is {self.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, idx)
        head = self.token_embedding.weight if self.head is None else self.head.weight  # (V, C)
        logits = F.linear(self.norm(x), head, None if self.head is None else self.head.bias)  # (B, T, V)
        cap = self.config.logit_softcap
        capped = logits if cap is None else cap * torch.tanh(logits / cap)
        if targets is None:
            return capped, None
        return capped, softmax_cross_entropy(logits, targets, softcap=cap, impl=self.kernels)

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02), projections into the residual stream narrower by √(2 · n_layer), biases zero.

        Value embeddings begin at zero, so that the model begins as the one without them.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                narrower = math.sqrt(2 * self.config.n_layer) if name.endswith("projection") else 1.0
                nn.init.normal_(module.weight, std=0.02 / narrower)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.0 if name.endswith("value_embedding") else 0.02)
