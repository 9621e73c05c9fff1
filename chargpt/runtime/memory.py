"""How much memory is free, and whether an error says that it was not enough."""

import contextlib
import re
from pathlib import Path

import torch

# Limit and use of memory of a container, and the line of memory.stat for the page cache that is given back when memory
# is short, under the second and the first version of Linux's control groups.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int | None:
    """Bytes of memory that are free: the GPU's, or the machine's within its container's limit; None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="utf-8") as meminfo:
        free += [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")]
    for folder, limit, used, cache in CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            left = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text())
            free.append(left)
            lines = Path(folder, "memory.stat").read_text().splitlines()
            free[-1] = left + sum(int(line.split()[1]) for line in lines if line.split()[:1] == [cache])
    return min(free, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python or torch run out of memory: on a CPU torch has no type for it, only a message."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # the second one is of GPUs alone
        return True
    return isinstance(error, RuntimeError) and bool(re.search("not enough memory|can't allocate memory", str(error)))
