"""The machine that a model runs on.

device.py   device, precision, compilation, backend: what `auto` becomes, and why
memory.py   what is free
"""

from chargpt.runtime.device import Runtime, device_name, resolve_device, resolve_runtime
from chargpt.runtime.memory import available_memory, is_out_of_memory

__all__ = [
    "Runtime",
    "available_memory",
    "device_name",
    "is_out_of_memory",
    "resolve_device",
    "resolve_runtime",
]
