"""The machine that a model runs on.

device.py   device, precision, compilation, backend: what `auto` becomes, and why
memory.py   what is free
interrupts.py   Ctrl-C and SIGTERM
"""

from chargpt.runtime.device import Runtime, device_name, resolve_device, resolve_runtime
from chargpt.runtime.interrupts import Interrupts
from chargpt.runtime.memory import available_memory

__all__ = [
    "Interrupts",
    "Runtime",
    "available_memory",
    "device_name",
    "resolve_device",
    "resolve_runtime",
]
