"""Configurations that were measured to be good at what their name says; `EXPERIMENTS.md` holds the measurements.

`nanogpt-cpu` is the field's yardstick. `modern` takes 80 seconds and `cpu-best` five minutes on two cores of an Intel
Xeon with AMX, where their steps were counted; a CPU without instructions for bf16 takes several times as long. More
time is better spent on several `cpu-best` and a student of theirs than on a larger model.
"""

from dataclasses import replace

from chargpt.config import OptimizerConfig, ScheduleConfig, TrainConfig, TransformerConfig

_MODERN_MODEL = TransformerConfig(
    block_size=128,
    n_layer=4,
    n_head=2,
    n_embd=128,
    position="rotary",
    norm="rmsnorm",
    mlp="relu2",
    qk_norm=True,
    tied_head=False,
    value_embeddings=True,
    bigram_embeddings=True,
)
_MODERN = TrainConfig(
    model=_MODERN_MODEL,
    max_steps=1050,
    batch_size=32,
    order="epoch",
    optimizer=OptimizerConfig(kind="muon", learning_rate=0.02, muon_learning_rate=0.02, weight_decay=0.3),
    schedule=ScheduleConfig(kind="wsd", warmup_steps=0, decay_fraction=1.0),
    grad_clip=None,
    eval_interval=200,
)

PRESETS: dict[str, TrainConfig] = {
    "nanogpt-cpu": TrainConfig(order="random", precision="fp32", compile="never"),
    "modern": _MODERN,
    "cpu-best": replace(
        _MODERN,
        model=replace(_MODERN_MODEL, block_size=256, n_head=3, n_embd=192),
        max_steps=2560,
        batch_size=16,
        optimizer=replace(_MODERN.optimizer, weight_decay=0.5),
    ),
}
