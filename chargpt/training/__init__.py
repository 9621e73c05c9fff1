"""Training: a run from its first step, or its last checkpoint, to its results.

trainer.py        the loop
state.py          what training changes
steps.py          one step
probe.py          what a run will take
results.py        what a run leaves for readers
optim.py          optimizers and learning rates
distillation.py   learning from trained models
"""

from chargpt.training.probe import estimate, measure_speed
from chargpt.training.state import Run, State, stream_seed
from chargpt.training.steps import overfits, training_step
from chargpt.training.trainer import require_unfinished, train

__all__ = [
    "Run",
    "State",
    "estimate",
    "measure_speed",
    "overfits",
    "require_unfinished",
    "stream_seed",
    "train",
    "training_step",
]
