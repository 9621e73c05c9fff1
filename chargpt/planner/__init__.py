"""The planner: a preset, fitted to a text, a machine and a time.

fit.py      the choices, each with its reason
machine.py  this machine, measured
memory.py   what a run takes
"""

from chargpt.planner.fit import Fitted, Machine, Request, Speed, Text, budgeted, choose_preset, fit, validation_fraction
from chargpt.planner.memory import WHAT_TO_LOWER, parameter_estimate, require_memory, required_memory

__all__ = [
    "WHAT_TO_LOWER",
    "Fitted",
    "Machine",
    "Request",
    "Speed",
    "Text",
    "budgeted",
    "choose_preset",
    "fit",
    "parameter_estimate",
    "require_memory",
    "required_memory",
    "validation_fraction",
]
