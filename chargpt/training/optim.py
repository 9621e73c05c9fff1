"""Optimizers, their parameter groups, and learning-rate schedules.

Every group keeps its peak in `peak_lr`; a schedule is one factor that scales all of them.
"""

import math
import typing
from collections import defaultdict

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
            BatchedMuon(
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


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, with all matrices of one shape orthogonalised by the same products of (n, rows, columns).

    The matrices of a small GPT are too small to fill a processor one by one: on two cores, four layers of 128 channels
    take 6 ms this way and 24 ms in turn. The state is torch.optim.Muon's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append((parameter, parameter.grad))
            for (rows, columns), pairs in by_shape.items():
                parameters, gradients = zip(*pairs, strict=True)
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalised(torch.stack(nesterov), group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-scale)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return typing.cast(torch.Tensor, state["momentum_buffer"])


def orthogonalised(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1, in bfloat16.

    Newton and Schulz's iteration with the quintic that Jordan et al. 2024 (Muon) chose: X ← aX + (bA + cA²)X, A = XXᵀ.
    """
    a, b, c = coefficients
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return x.mT if tall else x


def muon_parameters(model: nn.Module) -> list[torch.Tensor]:
    """Weights of the linear layers inside the blocks: not embeddings, not the head."""
    blocks = getattr(model, "blocks", nn.ModuleList())
    return [module.weight for module in blocks.modules() if isinstance(module, nn.Linear)]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            value = group["peak_lr"] * scale
            if isinstance(group["lr"], torch.Tensor):  # a CUDA graph reads it there
                group["lr"].fill_(value)
            else:
                group["lr"] = value


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
