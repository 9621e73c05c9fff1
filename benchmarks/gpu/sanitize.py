"""Both operations under compute-sanitizer: memory errors (memcheck), or races in shared memory (racecheck).

The sanitizer slows every access down, so a few cases stand for the list, chosen for different paths through the
kernels. Allocations are not cached, so that a step over the end of a tensor leaves its allocation. What is found is
kept case by case; where one ends the process, which an invalid access does, another goes on behind it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.program import save
from chargpt.kernels import causal_attention, softmax_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from kernels.cases import ALL_OPTIONS, AttentionCase, CrossEntropyCase

FOUND = 86  # the exit code with which the sanitizer says that it found something
OVER = "over: case "
TINY = {"B": 1, "H": 2}
CASES = (
    (AttentionCase("packed_dropout", **TINY, T=65, D=64, packed=True, options={"dropout_p": 0.1}), torch.bfloat16),
    (AttentionCase("grouped", B=1, H=4, H_kv=2, T=33, S=70, D=32), torch.float16),
    (AttentionCase("window", **TINY, T=130, D=128, options={"window": 17}), torch.bfloat16),
    (AttentionCase("odd_head", **TINY, T=33, D=31), torch.bfloat16),
    (AttentionCase("long", B=1, H=1, T=700, D=64), torch.bfloat16),
    (AttentionCase("float32", **TINY, T=65, D=64), torch.float32),
    (AttentionCase("large_head", **TINY, T=33, D=160), torch.float32),
    (CrossEntropyCase("V65", shape=(33,), ignored=0.2, options=ALL_OPTIONS), torch.bfloat16),
    (CrossEntropyCase("V65_none", shape=(33,), options={"reduction": "none"}), torch.float32),
    (CrossEntropyCase("V1000_sliced", shape=(5,), V=1000, sliced=True), torch.float16),
    (CrossEntropyCase("V50257", shape=(3,), V=50_257), torch.bfloat16),
    (CrossEntropyCase("V128256", shape=(2,), V=128_256), torch.float32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=("memcheck", "racecheck"), required=True)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="in seconds since 1970")
    parser.add_argument("--dry", action="store_true", help="the cases on the CPU, without the tool")
    parser.add_argument("--inside", type=int, help="run the cases from this one on: what the tool is to watch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [(case, dtype, impl) for impl in implementations(options.tool, options.dry) for case, dtype in CASES]
    runs = [run for run in runs if run[1:] != (torch.float16, "cpp")]  # which it does not take
    if options.inside is not None:
        inside(runs, options.inside, "cpu" if options.dry else "cuda")
        return
    names = [f"{impl} {str(dtype).removeprefix('torch.')} {case.name}" for case, dtype, impl in runs]
    command = [sys.executable, "-m", "benchmarks.gpu.sanitize", "--tool", options.tool, "--result", str(options.result)]
    if options.dry:
        command.append("--dry")
    else:
        sanitizer = find()
        if sanitizer is None:
            save(options.result, {"notes": {"skipped": "compute-sanitizer is not here"}})
            return
        told = ["--tool", options.tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
        command = [sanitizer, *told, *command]
    found = watch(command, names, options.result, options.deadline)
    if options.dry:
        found["skipped"] = "a dry run has no sanitizer; the cases ran without it"
    save(options.result, {"notes": found})
    sys.exit(any(found["cases"].values()) or len(found["cases"]) < len(names))


def implementations(tool: str, dry: bool) -> tuple[str, ...]:
    """CUDA first. Racecheck does not follow asynchronous barriers in Triton's code, and reports races that are none."""
    return ("cpp", "torch") if dry else ("cuda", "triton") if tool == "memcheck" else ("cuda",)


def inside(runs: list[tuple[Any, torch.dtype, str]], first: int, device: str) -> None:
    """Run the cases, saying after each that it is over, which is what the report before it belongs to."""
    for number, (case, dtype, impl) in enumerate(runs[first:], first):
        walk(case, dtype, impl, device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{OVER}{number}", flush=True)


def watch(command: list[str], names: list[str], result: Path, deadline: float) -> dict[str, Any]:
    """Start `command` from case to case until all were seen. By name: what the tool reported, nothing if clean."""
    cases: dict[str, list[str]] = {}
    silent = 0  # processes that ended at once and without a report
    while len(cases) < len(names) and silent < 2 and time.time() < deadline:
        before, report = len(cases), list[str]()
        for line in lines_of([*command, "--inside", str(before)]):
            print(line, flush=True)
            if line.startswith(OVER):
                cases[names[int(line.removeprefix(OVER))]] = report
                report = []
                save(result, {"notes": {"cases": cases}})
            elif line.startswith("=========") and not re.search("COMPUTE-SANITIZER|SUMMARY", line):
                report.append(line.removeprefix("=========").strip())
        if len(cases) < len(names):  # it ended in the middle of one
            silent = silent + 1 if len(cases) == before and not report else 0
            cases[names[len(cases)]] = report[:40] or ["ended the process"]
        elif report:  # what the tool says only at the end
            cases["at the end"] = report[:40]
        save(result, {"notes": {"cases": cases}})
    return {"cases": cases}


def lines_of(command: list[str]) -> Iterator[str]:
    """What the command says, as it comes."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            yield line.rstrip()


def walk(case: AttentionCase | CrossEntropyCase, dtype: torch.dtype, impl: str, device: str) -> None:
    """Forward and backward, with as little of torch's own kernels around as possible."""
    if isinstance(case, AttentionCase):
        q, k, v = case.inputs(dtype, device=device)
        out = causal_attention(q, k, v, impl=impl, **case.options)
        torch.autograd.grad(out, (q, k, v), torch.ones(out.shape, dtype=dtype).to(device))
    else:
        logits, targets = case.inputs(dtype, device=device)
        loss = softmax_cross_entropy(logits, targets, impl=impl, **case.options)
        torch.autograd.grad(loss, logits, torch.ones(loss.shape).to(device))


def find() -> str | None:
    """compute-sanitizer, on the path or beside the compiler."""
    compiler = shutil.which("nvcc")
    beside = str(Path(compiler).resolve().parent) if compiler else ""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


if __name__ == "__main__":
    main()
