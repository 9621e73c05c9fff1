"""What machine this is, then the native modules: carried ones where they load, else built in place for this GPU."""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.program import Program, nvidia_smi
from chargpt.kernels import native
from chargpt.runtime import device_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "chargpt"
MODULES, KERNELS = (
    ("csrc", "setup.py"),
    ("csrc", "chargpt/kernels"),
)  # what the modules, and what all kernels are made of
STAMP = "fingerprint"  # the file beside carried modules that says what they were built from
INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "-v", "-e", ".")
STATE = """
import json
from chargpt.kernels import describe_backends, native
print(json.dumps({"implementations": describe_backends(), "problem": native.load_cuda().problem}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--prebuilt", type=Path, help="a folder of modules to use where they load")
    options, rest = parser.parse_known_args()
    program = Program(__doc__, rest)
    program.note(machine=machine(program.device))
    started = time.perf_counter()
    carried = None if options.prebuilt is None else take(options.prebuilt)
    program.note(carried=carried)
    if carried is not None and options.prebuilt is not None:
        print(f"the carried modules are not used: {carried}", flush=True)
    if not program.dry and (options.prebuilt is None or carried is not None):
        build(program.device)
    program.note(build_seconds=round(time.perf_counter() - started, 1))
    program.note(implementations=(implementations := state()["implementations"]))
    wanted = ("torch",) if program.dry else ("cuda", "triton")
    missing = [f"{name}: {implementations[name]}" for name in wanted if not implementations[name].startswith("avail")]
    if missing or (program.dry and carried):
        sys.exit("; ".join(missing) or carried)


def take(folder: Path) -> str | None:
    """Put the carried modules in their place; why they cannot be used, None when the CUDA kernels load."""
    stamp = folder / STAMP
    if (problem := native.check_cuda_record(folder / native.RECORD.name)) is not None:
        return f"in {folder}: {problem}"
    if not stamp.exists() or stamp.read_text(encoding="utf-8").strip() != fingerprint(MODULES):
        return f"{folder} was built from other sources than these"
    for path in folder.glob("_native*"):
        shutil.copy(path, PACKAGE)
    return state()["problem"]


def build(device: torch.device) -> None:
    """For this GPU alone and on all cores, whatever the image says of architectures and jobs: its values may be old."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(os.cpu_count() or 1)}
    done = subprocess.run([sys.executable, *INSTALL], cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:  # Triton needs no build, so what can be measured is
        print(f"the build ended with exit code {done.returncode}", flush=True)


def fingerprint(names: Iterable[str]) -> str:
    """Of these files and of the sources in these folders, and not of proven.json, which follows from a run."""
    found = hashlib.sha256()
    files = [path for name in names for path in sorted([ROOT / name, *(ROOT / name).rglob("*")])]
    for path in files:
        inside = path.relative_to(ROOT)
        if path.is_file() and path.suffix != ".json" and not {"tests", "__pycache__"} & {*inside.parts}:
            found.update(f"{inside}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def state() -> Any:
    """What a new process finds: this one may have looked for the modules before they were there."""
    done = subprocess.run([sys.executable, "-c", STATE], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


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
