"""`chargpt info`: what this installation is and what this machine offers it."""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from chargpt import __version__
from chargpt.cli.parsing import Commands, command
from chargpt.errors import ChargptError

EXAMPLES = """examples:
  chargpt info
  chargpt info --check
  chargpt info --json"""
PACKAGES = ("torch", "numpy", "safetensors", "triton", "dvc", "mlflow")


def add(commands: Commands) -> None:
    info = command(
        commands, "info", run, EXAMPLES, "Versions, devices, and which kernels exist here and why the others do not."
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--check",
        action="store_true",
        help="first compare all kernels that can run here with PyTorch, for a minute, and remember where they were "
        "right and faster: backend=auto takes them there from then on (default: nothing is compared)",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.check:
        check()
    info = collect()
    print(json.dumps(info, indent=1) if arguments.json else as_text(info))


def check() -> None:
    """Check every kernel that can run on this machine's devices, say so on stderr, and record the outcome.

    Raises ChargptError when a kernel is wrong, or the outcome cannot be kept.
    """
    import torch

    from chargpt.generation.check import check as check_decoder
    from chargpt.kernels import available_backends, native
    from chargpt.kernels.check import check as check_kernels

    kinds = {"cpp": ("cpu", native.cpu_kind())}
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        kinds |= dict.fromkeys(("cuda", "triton"), ("cuda", capability))
    native.require_record()
    wrong = []
    for backend in filter(kinds.get, available_backends()):
        device, kind = kinds[backend]
        _say(f"checking {backend} on {kind}")
        findings = check_kernels(backend, device) | ({"decoding": check_decoder()} if backend == "cpp" else {})
        for name, found in findings.items():
            speed = f"right, {found.speed:.1f} times as fast as PyTorch"
            _say(f"  {name:<22}{found.checks:4} checks, {'WRONG' if found.problems else speed}")
        problems = [problem for found in findings.values() for problem in found.problems]
        for problem in problems:
            _say(f"  WRONG: {problem}")
        middle = statistics.median(found.speed for found in findings.values())
        if not problems and middle <= 1:
            _say(f"  {middle:.2f} times as fast as PyTorch, so auto leaves them alone until another check")
        checks = sum(found.checks for found in findings.values())
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        passed = not problems and middle > 1
        native.record_check(backend, kind, passed, time=now, checks=checks, speed=round(middle, 2))
        wrong += [backend] if problems else []
    if wrong:
        raise ChargptError(
            f"{' and '.join(wrong)} computed wrong results, so auto leaves them alone; please report the above"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def collect() -> dict[str, Any]:
    """Versions, devices and kernels as plain data."""
    import torch

    from chargpt.kernels import describe_backends, native, resolve
    from chargpt.kernels.ops import OPERATIONS
    from chargpt.runtime import device_name

    loaded = native.load()
    return {
        "chargpt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "features": loaded.module.cpu_features() if loaded.module else None,
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native_module": loaded.module.build_info() if loaded.module else loaded.problem,
        "cuda_module": native.load_cuda().problem or native.cuda_build(native.RECORD),
        "backends": describe_backends(),
        "chosen": {
            device: {operation: resolve(operation, device, torch.float32).name for operation in OPERATIONS}
            for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
        },
    }


def as_text(info: dict[str, Any]) -> str:
    """`collect()` for people."""
    features = info["cpu"]["features"]
    packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in info["packages"].items())
    built = info["native_module"]
    lines = [
        f"chargpt {info['chargpt']}, Python {info['python']}, {info['platform']}",
        f"packages: {packages}",
        f"cpu: {info['cpu']['name']}, {info['cpu']['cores']} cores, {info['cpu']['torch_threads']} torch threads"
        + (f", {' '.join(name for name, has in features.items() if has)}" if features else ""),
        f"gpus: {', '.join(info['gpus']) or 'none that torch can use'}",
        "native module: " + (", ".join(f"{k} {v}" for k, v in built.items()) if isinstance(built, dict) else built),
        f"cuda module: {info['cuda_module']}",
        "backends:",
        *(f"  {name:<7} {state}" for name, state in info["backends"].items()),
        *(
            f"chosen on {device}: " + ", ".join(f"{name} for {operation}" for operation, name in names.items())
            for device, names in info["chosen"].items()
        ),
    ]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
