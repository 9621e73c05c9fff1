"""What machine this is, then the extension built in place, then which implementations that gives."""

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.program import Program, nvidia_smi
from chargpt.runtime import device_name

INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "-v", "-e", ".")
IMPLEMENTATIONS = "import json; from chargpt.kernels import describe_implementations as d; print(json.dumps(d()))"


def main() -> None:
    program = Program(__doc__)
    program.note(machine=machine(program.device))
    if not program.dry:
        started = time.perf_counter()
        subprocess.run([sys.executable, *INSTALL], check=True)
        program.note(build_seconds=round(time.perf_counter() - started, 1))
    # In a new process, because this one may have found the module of a former build.
    found = subprocess.run([sys.executable, "-c", IMPLEMENTATIONS], check=True, capture_output=True, text=True).stdout
    program.note(implementations=(implementations := json.loads(found)))
    wanted = ("torch",) if program.dry else ("cuda", "triton")
    missing = [f"{name}: {implementations[name]}" for name in wanted if not implementations[name].startswith("avail")]
    if missing:
        sys.exit("; ".join(missing))


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    here: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "nvcc": nvcc(),
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        here |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": (nvidia_smi() or {}).get("driver_version"),
        }
    return here


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvcc() -> str | None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        return None
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+)", answer)
    return release[1] if release else None


if __name__ == "__main__":
    main()
