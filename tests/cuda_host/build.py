"""Compiles csrc/cuda/<name>*.cu and its test for the CPU: as a library for ctypes, or as a program under a sanitizer.

What was compiled once stays in build/cuda_host until a source changes.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_host"

# Kernels look at one piece of shared memory as several types, which nvcc allows.
COMMON = ["-std=c++20", "-DCHARGPT_CUDA_HOST", f"-I{HERE}", f"-I{KERNELS}", "-Wall", "-Wno-unknown-pragmas", "-fPIC"]
COMMON += ["-fno-strict-aliasing"]
# Without -fno-builtin a memset of 16 bytes becomes a store that ThreadSanitizer does not see.
WATCHED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-builtin", "-fno-sanitize-recover=all"]
# kind: flags of the kernels and their test; flags of host.cpp, which is never instrumented; flags of the linker
KINDS = {
    # A CUDA thread is scalar: vectorised, loops that load by 16 bytes and by elements were rounded differently. Tuned
    # for Zen, g++ avoids some fused multiply-adds, and sums that are equal by design were rounded differently.
    "library": (
        ["-O2", "-march=native", "-mtune=generic", "-fno-tree-vectorize"],
        ["-O2", "-march=native"],
        ["-shared"],
    ),
    "asan": (
        [*WATCHED, "-fsanitize=address,undefined"],
        ["-O2", "-DCUDA_HOST_ASAN"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": ([*WATCHED, "-fsanitize=thread"], ["-O2", "-DCUDA_HOST_TSAN"], ["-fsanitize=thread"]),
}


def library(name: str) -> ctypes.CDLL:
    """csrc/cuda/<name>*.cu, where there are any, with tests/cuda_host/<name>_test.cpp, loaded."""
    return ctypes.CDLL(str(compiled(name, "library")))


def run_watched(name: str, kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The main() of tests/cuda_host/<name>_test.cpp under a sanitizer: "asan" (with ubsan) or "tsan"."""
    program = str(compiled(name, kind))
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}

    def run(*prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, program, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)

    done = run()
    if "unexpected memory mapping" in done.stderr:  # older ThreadSanitizers on kernels that randomise more
        done = run("setarch", "-R")
        if "unexpected memory mapping" in done.stderr or "setarch" in done.stderr:
            pytest.skip("ThreadSanitizer does not run on this kernel")
    return done


def compiled(name: str, kind: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    kernel_flags, host_flags, link_flags = KINDS[kind]
    host = HERE / "host.cpp"
    sources = [host, HERE / f"{name}_test.cpp", *sorted(KERNELS.glob(f"{name}*.cu"))]
    identity = hashlib.sha256(repr((_version(compiler), COMMON, KINDS[kind], _cpu())).encode())
    for path in _files_of(compiler, sources):
        identity.update(str(path).encode() + b"\0" + path.read_bytes())
    folder = CACHE / f"{name}-{kind}-{identity.hexdigest()[:16]}"
    target = folder / (f"{name}.so" if kind == "library" else name)
    if target.exists():
        return target
    for old in CACHE.glob(f"{name}-{kind}-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        object_file = folder / f"{source.stem}.{os.getpid()}.o"
        flags = host_flags if source == host else kernel_flags
        _call([compiler, *COMMON, *flags, "-c", "-x", "c++", str(source), "-o", str(object_file)])
        return object_file

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = target.with_suffix(f".{os.getpid()}")
    _call([compiler, *link_flags, *map(str, objects), "-pthread", "-o", str(unfinished)])
    for path in objects:
        path.unlink()
    unfinished.replace(target)
    return target


def _files_of(compiler: str, sources: list[Path]) -> list[Path]:
    """The sources and the headers of this project that they include."""
    rules = subprocess.run(
        [compiler, *COMMON, "-MM", "-x", "c++", *map(str, sources)], capture_output=True, text=True, check=False
    )
    assert rules.returncode == 0, rules.stderr
    words = rules.stdout.replace("\\\n", " ").split()
    return sorted({Path(word) for word in words if not word.endswith(":")})


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-5000:]}"


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _cpu() -> str:
    """What -march=native may depend on."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    return flags[0] if flags else ""
