"""Every knob of the project: its name, type, range and meaning, in frozen dataclasses that mirror `params.yaml`.

The dataclasses check their own ranges, so they hold wherever they are built. `parse` adds what a file needs: types,
unknown keys (with the nearest known name), and the place of the mistake. The defaults of `TrainConfig` are nanoGPT's
published CPU configuration.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from chargpt.errors import ConfigError

T = TypeVar("T")


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        wanted = "a finite number"
    elif condition:
        return
    raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def require_seed(value: int, name: str = "seed") -> None:
    """Raise ConfigError unless `value` is a seed that every generator takes."""
    _require(0 <= value < 2**63, name, value, "a whole number of at least 0 and below 2^63")


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class CorpusConfig:
    name: str = "tiny_shakespeare"  # a text of the catalogue in chargpt/corpus.py
    path: str | None = None  # the user's own file, or folder of text files; wins over `name`
    encoding: str = "utf-8"  # of the user's own text


@dataclass(frozen=True)
class TokenizerConfig:
    kind: Literal["character"] = "character"


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
        _require(self.mlp_width >= 1 / self.n_embd, "mlp_width", self.mlp_width, "at least 1 / n_embd (one channel)")
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
    max_steps: int | None = 2000  # budget in optimizer steps …
    max_seconds: float | None = None  # … or in seconds of training; one of the two
    batch_size: int = 12  # windows in one forward pass
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    sampling: Literal["epoch", "random"] = "epoch"  # a permutation of windows, or the lecture's random offsets
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
    kernels: Literal["auto", "torch", "cpp", "cuda", "triton"] = "auto"

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.max_seconds is None):
            raise ConfigError(
                f"set exactly one of max_steps and max_seconds, got {self.max_steps!r} and {self.max_seconds!r}"
            )
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        _require(self.max_seconds is None or self.max_seconds > 0, "max_seconds", self.max_seconds, "positive")
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_tokens", "patience"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1 or null")
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", self.grad_clip, "positive or null")
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1) or null")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.model.block_size


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


@dataclass(frozen=True)
class SampleConfig:
    prompts: tuple[str, ...] = ("",)  # an empty prompt starts from a newline, or the vocabulary's first symbol
    num_samples: int = 1  # for each prompt
    max_new_tokens: int = 500
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the likeliest tokens that together have this probability
    unknown: Literal["strict", "replace", "skip"] = "strict"  # characters of a prompt that the vocabulary lacks
    seed: int = 1337

    def __post_init__(self) -> None:
        _require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        _require(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "at least 0")
        _require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1 or null")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1] or null")
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
    uri: str | None = None  # null: sqlite, mlflow.db at the project's root
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


# ------------------------------------------------------------------------------------------------------------- parsing


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check `params.yaml`.

    Raises ConfigError naming the file, the dotted key and what would be right.
    """
    return parse(Params, _read_yaml(Path(path)), str(path))


def load_train_config(path: str | Path) -> TrainConfig:
    """Read one variant (the fields of TrainConfig) from a YAML file. Raises ConfigError as `load_params` does."""
    return parse(TrainConfig, _read_yaml(Path(path)), str(path))


def parse(cls: type[T], raw: object, source: str) -> T:
    """Turn plain data (dicts, lists, scalars) into the dataclass `cls`; `source` names the file in errors.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, a wrong type, or a value that
    the dataclass refuses; each says where.
    """
    return typing.cast(T, _convert(cls, raw, source, ""))


def override(config: T, assignments: list[str]) -> T:
    """Apply `key.path=value` assignments (values as in YAML) to a config dataclass and check the result.

    Choosing another `model.kind` starts that model from its defaults, wherever in the list it stands. Raises
    ConfigError.
    """
    raw = dataclasses.asdict(typing.cast(Any, config))
    for assignment in sorted(assignments, key=lambda text: not text.startswith("model.kind=")):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, as in model.n_layer=6; got {assignment!r}")
        *parents, last = key.split(".")
        target = raw
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                raise ConfigError(f"--set {assignment}: {parent!r} is no group of knobs{nearest(parent, target)}")
            target = target[parent]
        parsed = _parse_yaml(value, f"--set {assignment}")
        if last == "kind" and target.get("kind") != parsed and parents == ["model"]:
            target.clear()
        target[last] = parsed
    return parse(type(config), raw, "--set")


def flatten(config: object) -> dict[str, Any]:
    """A config dataclass as one flat dict with dotted keys, as trackers log it."""
    flat: dict[str, Any] = {}

    def walk(value: object, prefix: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = value

    walk(dataclasses.asdict(typing.cast(Any, config)), "")
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old → new` for every key whose value differs between two flat dicts."""
    return [
        f"{key}: {old.get(key, '(not set)')} → {new.get(key, '(not set)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _read_yaml(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the project's root, or name the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # YAMLError is what PyYAML documents; the others escape from it, as for `2020-13-45` or a thousand brackets.
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def _convert(wanted: Any, raw: Any, source: str, key: str) -> Any:
    """`raw` as the type `wanted`, or a ConfigError that names `source` and the dotted `key`."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        return _convert_dataclass(wanted, raw, source, key)
    if origin is types.UnionType:
        if type(None) in arguments:
            return None if raw is None else _convert(arguments[0], raw, source, key)
        return _convert(_by_kind(arguments, raw, source, key), raw, source, key)
    if origin is Literal and raw in arguments:
        return raw
    if origin is tuple and isinstance(raw, (list, tuple)):
        return tuple(_convert(arguments[0], item, source, f"{key}[{index}]") for index, item in enumerate(raw))
    if origin is dict and isinstance(raw, dict):
        return {
            _convert(arguments[0], name, source, f"a name in {key}"): _convert(
                arguments[1], item, source, f"{key}.{name}"
            )
            for name, item in raw.items()
        }
    if wanted is float and isinstance(raw, (str, int)) and not isinstance(raw, bool):
        with contextlib.suppress(ValueError, OverflowError):  # a string, because YAML 1.1 reads 1e-3 as one
            return float(raw)
    if isinstance(wanted, type) and type(raw) is wanted:
        return raw
    raise ConfigError(f"{source}: {key or 'the file'} must be {_describe(wanted)}, got {raw!r}")


def _convert_dataclass(cls: Any, raw: Any, source: str, key: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: {key or 'the file'} must be a group of knobs, got {raw!r}")
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in raw:
        if name not in hints:
            raise ConfigError(f"{source}: unknown key {prefix}{name}{nearest(str(name), hints)}")
    for item in dataclasses.fields(cls):
        no_default = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if no_default and item.name not in raw:
            raise ConfigError(f"{source}: {prefix}{item.name} is missing")
    values = {name: _convert(hints[name], value, source, f"{prefix}{name}") for name, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {prefix.rstrip('.') + ': ' if prefix else ''}{error}") from None


def _by_kind(choices: tuple[Any, ...], raw: Any, source: str, key: str) -> Any:
    """The dataclass among `choices` whose `kind` is the one that `raw` names."""
    kinds = {typing.get_args(typing.get_type_hints(choice)["kind"])[0]: choice for choice in choices}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: {key} must be a group of knobs, got {raw!r}")
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        hint = nearest(str(kind), kinds)
        raise ConfigError(f"{source}: {key}.kind must be one of {', '.join(kinds)}, got {kind!r}{hint}")
    return kinds[kind]


def _describe(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if typing.get_origin(wanted) is tuple:
        return "a list"
    if typing.get_origin(wanted) is dict:
        return "a group of named entries"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(wanted, str(wanted))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error: the nearest known name, or all of them."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"
