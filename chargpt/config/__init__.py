"""Every knob: what it is called, what it may be, and how a file becomes one.

schema.py    frozen dataclasses, the one source of every default
parse.py     YAML and `key=value` to these dataclasses, with errors that say where
presets.py   configurations that were measured
"""

from chargpt.config.parse import differences, flatten, load_params, load_train_config, override, parse
from chargpt.config.schema import (
    AblationConfig,
    BigramConfig,
    CorpusConfig,
    Engine,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Params,
    SampleConfig,
    ScheduleConfig,
    SplitConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    TransformerConfig,
    require_seed,
)

__all__ = [
    "AblationConfig",
    "BigramConfig",
    "CorpusConfig",
    "Engine",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Params",
    "SampleConfig",
    "ScheduleConfig",
    "SplitConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "TransformerConfig",
    "differences",
    "flatten",
    "load_params",
    "load_train_config",
    "override",
    "parse",
    "require_seed",
]
