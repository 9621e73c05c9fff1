"""The planner: a preset, fitted to a text, a machine and a time.

fit.py      the choices, each with its reason
machine.py  this machine, measured
"""

from chargpt.planner.fit import (
    Fitted,
    Machine,
    Request,
    Text,
    assigned,
    choose_preset,
    fit,
    steps_in,
    validation_fraction,
)
from chargpt.planner.machine import this_machine

__all__ = [
    "Fitted",
    "Machine",
    "Request",
    "Text",
    "assigned",
    "choose_preset",
    "fit",
    "steps_in",
    "this_machine",
    "validation_fraction",
]
