"""Training: a run from its first step, or its last checkpoint, to its last.

trainer.py        the loop
events.py         what it tells about itself
state.py          what training changes
steps.py          one step
memory.py         what a run will need, counted
probe.py          what a run will take, tried out
optim.py          optimizers and learning rates
distillation.py   learning from trained models
"""

from chargpt.training.events import Ended, Evaluated, Event, Point, Saved, Saving, Started, Stepped, Subscriber
from chargpt.training.memory import require_memory, required_memory
from chargpt.training.probe import Estimate, Speed, estimate, measure_speed, memory_errors
from chargpt.training.state import Run, State, stream_seed
from chargpt.training.steps import overfits, training_step
from chargpt.training.trainer import Trainer

__all__ = [
    "Ended",
    "Estimate",
    "Evaluated",
    "Event",
    "Point",
    "Run",
    "Saved",
    "Saving",
    "Speed",
    "Started",
    "State",
    "Stepped",
    "Subscriber",
    "Trainer",
    "estimate",
    "measure_speed",
    "memory_errors",
    "overfits",
    "require_memory",
    "required_memory",
    "stream_seed",
    "training_step",
]
