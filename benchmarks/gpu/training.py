"""The model of the two training measurements, and its twin on torch's own functions."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.program import Program
from chargpt.config import OptimizerConfig, ScheduleConfig, TrainConfig, TransformerConfig
from chargpt.models import LanguageModel, build_model
from chargpt.models.cache import LayerCache
from chargpt.models.transformer import CausalSelfAttention, Transformer
from chargpt.runtime import Runtime
from chargpt.training.optim import build_optimizers

# nanoGPT's train_shakespeare_char: 10.65 M parameters besides the position embedding.
MODEL = TransformerConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2)
TINY = TransformerConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2)  # for a dry run
TORCH = "sdpa"  # the name of the twin


class TorchAttention(CausalSelfAttention):
    """The same module on scaled_dot_product_attention, for MODEL's learned positions and equal heads."""

    def forward(self, x: Tensor, idx: Tensor, cache: LayerCache | None = None, start: int | Tensor = 0) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return F.dropout(self.projection(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class TorchTransformer(Transformer):
    """The same model on F.cross_entropy."""

    def loss(self, h: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(self.logits(h).flatten(0, -2), targets.flatten(), reduction=reduction)


def build(model: TransformerConfig, vocabulary: int, kernels: str, device: torch.device) -> Transformer:
    """The model on the implementation `kernels`, or its twin. Both begin with the same weights."""
    network = build_model(model, vocabulary, seed=1, backend="torch" if kernels == TORCH else kernels)
    assert isinstance(network, Transformer)
    if kernels == TORCH:
        network.__class__ = TorchTransformer
        for module in network.modules():
            if isinstance(module, CausalSelfAttention):
                module.__class__ = TorchAttention
    return network.to(device).train()


def setup(
    program: Program, kernels: str, compiled: bool, vocabulary: int, max_steps: int
) -> tuple[Transformer, LanguageModel, list[torch.optim.Optimizer], TrainConfig, Runtime]:
    """Model, what to call in a step (the model, compiled or not), optimizers, config and runtime."""
    config = TrainConfig(
        model=TINY if program.dry else MODEL,
        max_steps=max_steps,
        batch_size=4 if program.dry else 64,
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(warmup_steps=100, min_lr_ratio=0.1),
        grad_clip=1.0,
        precision="bf16",
    )
    assert isinstance(config.model, TransformerConfig)
    network = build(config.model, vocabulary, kernels, program.device)
    # A dry run only traces: inductor would spend its time on compiling C++.
    backend = "eager" if program.dry else "inductor"
    called = cast(LanguageModel, torch.compile(network, backend=backend)) if compiled else network
    runtime = Runtime(program.device, "bf16", compiled, False, kernels, ())
    return network, called, build_optimizers(network, config.optimizer), config, runtime


def candidates(program: Program) -> tuple[list[str], dict[str, str]]:
    """Implementations of both operations for the training, best first, and why others cannot run."""
    attention, refused = program.ours("causal_attention", torch.bfloat16)
    cross_entropy, also_refused = program.ours("softmax_cross_entropy", torch.bfloat16)
    return [name for name in attention if name in cross_entropy], refused | also_refused
