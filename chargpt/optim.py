"""Optimizers, their parameter groups, and learning-rate schedules.

Every group keeps its peak in `peak_lr`; a schedule is one factor that scales all of them.
"""

import math

import torch
from torch import nn

from chargpt.config import OptimizerConfig, ScheduleConfig


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay is decoupled, on matrices and embeddings alone. Muon: Jordan et al. 2024, as in torch.optim.Muon;
    AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101.
    """
    by_muon = muon_parameters(model) if config.kind == "muon" else []
    taken = set(map(id, by_muon))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
    ]
    if by_muon:
        optimizers.append(
            torch.optim.Muon(
                by_muon,
                lr=config.muon_learning_rate,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def muon_parameters(model: nn.Module) -> list[torch.Tensor]:
    """Weights of the linear layers inside the blocks: not embeddings, not the head."""
    blocks = getattr(model, "blocks", nn.ModuleList())
    return [module.weight for module in blocks.modules() if isinstance(module, nn.Linear)]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def learning_rate_scale(config: ScheduleConfig, step: int, progress: float) -> float:
    """The factor on the peak learning rate at a step (from 0), with `progress` through the run after warm-up in [0, 1].

    Warm-up is linear. Then: constant; cosine to `min_lr_ratio`; or wsd, which is stable and then linear to zero over
    the last `decay_fraction` (Hu et al. 2024, arXiv 2404.06395, section 4).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.kind == "cosine":
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.kind == "wsd":
        return min(1.0, (1 - progress) / config.decay_fraction)
    return 1.0
