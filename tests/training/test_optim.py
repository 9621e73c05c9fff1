"""Optimizers: which parameter is in which group, and the factor of each schedule, step by step."""

import itertools
import math

import pytest
import torch
from torch import nn

from chargpt.config import BigramConfig, OptimizerConfig, ScheduleConfig, TransformerConfig
from chargpt.models import build_model
from chargpt.training.optim import (
    BatchedMuon,
    build_optimizers,
    learning_rate_scale,
    muon_parameters,
    set_learning_rate,
)

EVERYTHING = TransformerConfig(
    block_size=7, n_layer=2, n_head=2, n_embd=8, bias=True, tied_head=False, value_embeddings=True, norm="layernorm"
)
TIED = TransformerConfig(block_size=7, n_layer=2, n_head=2, n_embd=8)


def names_of(model: nn.Module, group: dict) -> set[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in group["params"]}


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("model_config", [BigramConfig(), EVERYTHING, TIED])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(model_config: BigramConfig | TransformerConfig, kind: str) -> None:
    model = build_model(model_config, 11, seed=0)
    optimizers = build_optimizers(model, OptimizerConfig(kind=kind))
    placed = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_and_embeddings_alone(kind: str) -> None:
    model = build_model(EVERYTHING, 11, seed=0)
    adamw, *_ = build_optimizers(model, OptimizerConfig(kind=kind, weight_decay=0.3))
    decayed, free = adamw.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all("norm" in name or name.endswith("bias") for name in names_of(model, free))
    assert not any("norm" in name or name.endswith("bias") for name in names_of(model, decayed))


def test_muon_takes_the_matrices_inside_the_blocks_and_nothing_else() -> None:
    model = build_model(EVERYTHING, 11, seed=0)
    adamw, muon = build_optimizers(model, OptimizerConfig(kind="muon", muon_learning_rate=0.05, muon_momentum=0.9))
    assert isinstance(muon, torch.optim.Muon)
    inside = {"attention.qkv", "attention.projection", "mlp.expand", "mlp.projection"}
    assert names_of(model, muon.param_groups[0]) == {f"blocks.{i}.{name}.weight" for i in range(2) for name in inside}
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["momentum"]) == (0.05, 0.9)
    rest = names_of(model, adamw.param_groups[0])
    assert rest == {
        "token_embedding.weight",
        "position_embedding.weight",
        "head.weight",
        "blocks.0.attention.value_embedding.weight",
        "blocks.1.attention.value_embedding.weight",
    }


def test_muon_on_a_bigram_is_adamw() -> None:
    model = build_model(BigramConfig(), 11, seed=0)
    assert muon_parameters(model) == []
    (adamw,) = build_optimizers(model, OptimizerConfig(kind="muon"))
    assert isinstance(adamw, torch.optim.AdamW)


@pytest.mark.parametrize("model_config", [BigramConfig(), EVERYTHING, TIED])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_few_steps_lower_the_loss_and_move_everything(
    model_config: BigramConfig | TransformerConfig, kind: str
) -> None:
    model = build_model(model_config, 11, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerConfig(kind=kind, learning_rate=0.02))
    idx = torch.randint(11, (8, 8), generator=torch.Generator().manual_seed(0))
    x, y = idx[:, :7], idx[:, 1:]
    first = model(x, y).item()
    for _ in range(20):
        model(x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert model(x, y).item() < first
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_muon_on_stacked_matrices_is_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32), (1, 8), (8, 1)] * 3 + [(5, 7), (15, 8)]  # three layers, and others
    ours, theirs = ([nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = [BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)]
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours[step].grad = theirs[step].grad = None  # a parameter that took no part keeps its value and momentum
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # bfloat16 products may add in another order
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in states[1])


def test_adamw_is_its_published_update() -> None:
    # Loshchilov and Hutter 2017, algorithm 2, in Python's floats for one number.
    config = OptimizerConfig(learning_rate=0.01, beta1=0.8, beta2=0.95, weight_decay=0.2)
    model = nn.Linear(1, 1, bias=False).double()
    (optimizer,) = build_optimizers(model, config)
    theta, m, v = model.weight.item(), 0.0, 0.0
    for t, gradient in enumerate([0.5, -2.0, 0.1], start=1):
        model.weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.95**t)
        theta -= 0.01 * (m_hat / (math.sqrt(v_hat) + 1e-8) + 0.2 * theta)
        assert model.weight.item() == pytest.approx(theta, rel=1e-9)


def test_every_group_is_scaled_from_its_own_peak() -> None:
    model = build_model(EVERYTHING, 11, seed=0)
    config = OptimizerConfig(kind="muon", learning_rate=0.004, muon_learning_rate=0.02)
    optimizers = build_optimizers(model, config)
    for scale in (0.5, 0.0, 1.0, 0.25):  # never from the value before
        set_learning_rate(optimizers, scale)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [0.004 * scale, 0.004 * scale, 0.02 * scale]


def test_the_peak_survives_saving_and_loading() -> None:
    model = build_model(TIED, 11, seed=0)
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.004))
    set_learning_rate(optimizers, 0.1)
    again = build_optimizers(model, OptimizerConfig(learning_rate=0.004))
    again[0].load_state_dict(optimizers[0].state_dict())
    set_learning_rate(again, 1.0)
    assert again[0].param_groups[0]["lr"] == 0.004


# ------------------------------------------------------------------------------------------------------------ schedules


def scales(config: ScheduleConfig, max_steps: int) -> list[float]:
    """The factor at each step of a run, with the progress that a budget in steps gives."""
    after = max(1, max_steps - config.warmup_steps)
    return [
        learning_rate_scale(config, step, max(0.0, (step - config.warmup_steps) / after)) for step in range(max_steps)
    ]


def test_constant_is_constant() -> None:
    assert scales(ScheduleConfig(kind="constant", warmup_steps=0), 20) == [1.0] * 20


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_never_zero(kind: str) -> None:
    steps = scales(ScheduleConfig(kind=kind, warmup_steps=9), 100)
    assert steps[:9] == pytest.approx([0.1 * n for n in range(1, 10)])
    assert steps[9] == 1.0
    assert max(steps) == 1.0


def test_cosine_is_nanogpts() -> None:
    lr, min_lr, warmup, total = 1e-3, 1e-4, 100, 2000
    ours = scales(ScheduleConfig(kind="cosine", warmup_steps=warmup, min_lr_ratio=0.1), total)
    for step, scale in enumerate(ours):
        if step < warmup:
            published = lr * (step + 1) / (warmup + 1)
        else:
            ratio = (step - warmup) / (total - warmup)
            published = min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - min_lr)
        assert lr * scale == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_cosine_falls_to_its_last_share(min_lr_ratio: float) -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=0, min_lr_ratio=min_lr_ratio)
    steps = scales(config, 1000)
    assert all(a >= b for a, b in itertools.pairwise(steps))
    assert learning_rate_scale(config, 1000, 1.0) == pytest.approx(min_lr_ratio)
    assert learning_rate_scale(config, 500, 0.5) == pytest.approx((1 + min_lr_ratio) / 2)


@pytest.mark.parametrize("decay_fraction", [0.2, 0.4, 1.0])
def test_wsd_is_stable_and_then_linear_to_zero(decay_fraction: float) -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=0, decay_fraction=decay_fraction)
    assert learning_rate_scale(config, 0, 0.0) == 1.0
    assert learning_rate_scale(config, 1, (1 - decay_fraction) * 0.99) == 1.0
    assert learning_rate_scale(config, 1, 1 - decay_fraction / 2) == pytest.approx(0.5)
    assert learning_rate_scale(config, 1, 1 - decay_fraction / 4) == pytest.approx(0.25)
    assert learning_rate_scale(config, 1, 1.0) == 0.0
