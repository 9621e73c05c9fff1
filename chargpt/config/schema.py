"""Every knob of the project: its name, type, range and meaning, in frozen dataclasses that mirror `params.yaml`.

The dataclasses check their own ranges, so they hold wherever they are built.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from chargpt.errors import ConfigError, nearest, shown

MOST_WIDTH = 1e6  # of an MLP; far above any, and its products still fit in numbers
MOST_SAMPLES = 2**16  # at once


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        wanted = "a finite number"
    elif condition:
        return
    raise ConfigError(f"{name} must be {wanted}, got {shown(value)}")


def require_seed(value: int, name: str = "seed") -> None:
    """Raise ConfigError unless `value` is a seed that every generator takes."""
    _require(0 <= value < 2**63, name, value, "a whole number of at least 0 and below 2^63")


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class CorpusConfig:
    name: str = "tiny_shakespeare"  # a text of the catalogue in chargpt/text/catalogue.py
    path: str | None = None  # the user's own file, or folder of text files; wins over `name`
    encoding: str = "utf-8"  # of the user's own text


@dataclass(frozen=True)
class TokenizerConfig:
    kind: Literal["character", "byte"] = "character"  # the text's own characters, or the 256 bytes of UTF-8


@dataclass(frozen=True)
class SplitConfig:
    val_fraction: float = 0.1  # the last part of the text, by position

    def __post_init__(self) -> None:
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")


# -------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class BigramConfig:
    kind: Literal["bigram"] = "bigram"
    block_size: int = 8  # tokens in a training window; a bigram looks at one

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, "block_size", self.block_size, "at least 1")


@dataclass(frozen=True)
class TransformerConfig:
    kind: Literal["transformer"] = "transformer"
    block_size: int = 64  # longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None  # key and value heads, shared by groups of query heads; null: as many as n_head
    n_embd: int = 128  # channels
    position: Literal["none", "learned", "rotary"] = "learned"
    norm: Literal["none", "layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["none", "relu", "gelu", "relu2", "swiglu"] = "gelu"
    mlp_width: float = 4.0  # hidden channels of the MLP, as a multiple of n_embd
    residual: bool = True  # x + f(x) with output projections; false: f(x) without them, as early in the lecture
    qk_norm: bool = False  # RMSNorm on queries and keys
    tied_head: bool = True  # the output head is the token embedding
    logit_softcap: float | None = None  # c · tanh(logits / c)
    value_embeddings: bool = False  # a token embedding added to the values of every layer
    bigram_embeddings: bool = False  # an embedding of each pair of neighbours added to the token embedding
    dropout: float = 0.0
    bias: bool = False  # in linear layers and LayerNorms
    init: Literal["gpt2", "torch"] = "gpt2"  # N(0, 0.02), or torch's own, as in the lecture

    def __post_init__(self) -> None:
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.n_embd % self.n_head:
            head_size = max(1, (self.n_embd + self.n_head // 2) // self.n_head)
            raise ConfigError(
                f"n_embd must be divisible by n_head, got n_embd={self.n_embd} and n_head={self.n_head}; "
                f"the nearest n_embd that works is {head_size * self.n_head}"
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ConfigError(
                f"n_head must be a multiple of n_kv_head, got n_head={self.n_head}, n_kv_head={self.n_kv_head}"
            )
        if self.position == "rotary" and (self.n_embd // self.n_head) % 2:
            raise ConfigError(
                f"rotary positions need an even head size, got n_embd / n_head = {self.n_embd // self.n_head}"
            )
        one_channel = 1 / self.n_embd
        _require(self.mlp_width >= one_channel, "mlp_width", self.mlp_width, "at least 1 / n_embd (one channel)")
        _require(self.mlp_width <= MOST_WIDTH, "mlp_width", self.mlp_width, f"at most {MOST_WIDTH:g}")
        if not self.residual and self.mlp != "none" and self.mlp_width != 1:
            raise ConfigError(
                f"without residual the MLP has no projection back, so mlp_width must be 1, got {self.mlp_width}"
            )
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        _require(
            self.logit_softcap is None or self.logit_softcap > 0,
            "logit_softcap",
            self.logit_softcap,
            "positive or null",
        )


ModelConfig = BigramConfig | TransformerConfig


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class OptimizerConfig:
    kind: Literal["adamw", "muon"] = "adamw"  # muon: matrices inside the blocks by Muon, the rest by AdamW
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1  # decoupled; on matrices and embeddings, not on gains and biases
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("beta1", "beta2", "muon_momentum"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["constant", "cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, then linear to zero
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1  # cosine: the last learning rate, as a share of the peak
    decay_fraction: float = 0.4  # wsd: the share of the run that decays

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        _require(0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "in (0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """One variant: a model and how it is trained."""

    model: ModelConfig = field(default_factory=TransformerConfig)
    max_steps: int = 2000  # optimizer steps; a run is a number of steps, so that its result does not hang on a clock
    batch_size: int = 12  # windows in one forward pass
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    order: Literal["epoch", "random"] = "epoch"  # a permutation of windows, or the lecture's random offsets
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    grad_clip: float | None = 1.0  # largest norm of the gradient
    ema_decay: float | None = None  # keep an exponential moving average of the weights and deliver it
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_tokens: int | None = None  # validation tokens scored while training, from the first on; null: all of them
    patience: int | None = None  # evaluations without a better validation loss before the run stops; null: it goes on
    log_interval: int = 10  # steps between points of the training curve
    device: str = "auto"  # auto, cpu, cuda, cuda:1 …
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"  # torch.compile
    cuda_graph: Literal["auto", "always", "never"] = "auto"  # one launch for a whole step on a GPU
    recompute: bool = False  # what blocks compute, again in the backward: less memory, a third more time
    backend: Literal["auto", "torch", "cpp", "cuda", "triton"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_tokens", "patience"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1 or null")
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", self.grad_clip, "positive or null")
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1) or null")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.model.block_size


# Knobs of earlier versions, and what takes their place.
RETIRED = {
    "max_seconds": "a run is a number of steps: set max_steps, or let `chargpt train --minutes N` count them",
    "sampling": "its name is `order`",
    "kernels": "its name is `backend`",
}


# ---------------------------------------------------------------------------------------------- evaluation and sampling


@dataclass(frozen=True)
class EvaluationConfig:
    nanogpt_batches: int = 200  # random batches (of the variant's batch_size) in nanoGPT's protocol
    sliding_stride: int = 64  # tokens scored by each window of the sliding protocol
    seed: int = 1337  # of the random batches

    def __post_init__(self) -> None:
        _require(self.nanogpt_batches >= 1, "nanogpt_batches", self.nanogpt_batches, "at least 1")
        _require(self.sliding_stride >= 1, "sliding_stride", self.sliding_stride, "at least 1")
        require_seed(self.seed)


Engine = Literal["auto", "torch", "fp32", "bf16", "int8"]


@dataclass(frozen=True)
class SampleConfig:
    prompts: tuple[str, ...] = ("",)  # an empty prompt starts from a newline, or the vocabulary's first symbol
    num_samples: int = 1  # for each prompt
    max_new_tokens: int = 500
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together have this probability
    min_p: float | None = None  # drop tokens that have less than this share of the likeliest one's probability
    stop: tuple[str, ...] = ()  # texts at the first of which a sample ends; they are no part of it
    allow: str | None = None  # characters; tokens with any other cannot come. null: all may
    ban: str = ""  # characters; tokens with one of them cannot come
    keep: int | None = None  # tokens of a full window that the model goes on with; null: half of them
    unknown: Literal["strict", "replace", "skip"] = "strict"  # characters of a prompt that the vocabulary lacks
    engine: Engine = "auto"  # torch, or C++ with weights in that precision; auto: C++ in int8 where it can, else torch
    seed: int = 1337

    def __post_init__(self) -> None:
        samples = self.num_samples
        _require(1 <= samples <= MOST_SAMPLES, "num_samples", samples, f"at least 1 and at most {MOST_SAMPLES}")
        _require(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "at least 0")
        _require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1 or null")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1] or null")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1] or null")
        _require("" not in self.stop, "stop", self.stop, "texts that are not empty")
        _require(self.allow != "", "allow", self.allow, "at least one character or null")
        both = sorted(set(self.allow or "") & set(self.ban))
        _require(not both, "ban", self.ban, f"characters that allow lacks, so not {''.join(both)!r}")
        _require(self.keep is None or self.keep >= 1, "keep", self.keep, "at least 1 or null")
        require_seed(self.seed)


# ------------------------------------------------------------------------------------------------------------ pipeline


@dataclass(frozen=True)
class AblationConfig:
    """What `dvc repro` trains and compares: every variant with every seed."""

    variants: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            _require(len(values) > 0, name, list(values), "at least one")
            _require(len(set(values)) == len(values), name, list(values), "a list that names each once")
        for seed in self.seeds:
            require_seed(seed, "seeds")


@dataclass(frozen=True)
class TrackingConfig:
    enabled: bool = True
    uri: str | None = None  # null: MLFLOW_TRACKING_URI, else sqlite, mlflow.db at the project's root
    experiment: str = "chargpt"
    system_metrics: bool = True


@dataclass(frozen=True)
class Params:
    """The whole of `params.yaml`."""

    ablation: AblationConfig
    variants: dict[str, TrainConfig]
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in self.variants:  # they become names of folders
            _require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
                "a name in variants",
                name,
                "of letters, digits, dots, hyphens and underscores",
            )
        for name in self.ablation.variants:
            if name not in self.variants:
                hint = nearest(name, self.variants)
                raise ConfigError(f"ablation.variants names {name!r}, which `variants` does not define{hint}")
