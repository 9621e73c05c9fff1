"""Both operations under compute-sanitizer: memory errors (memcheck), or races in shared memory (racecheck).

The sanitizer slows every access down, so a few cases stand for the list, chosen for different paths through the
kernels. Allocations are not cached, so that a step over the end of a tensor leaves its allocation.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.program import save
from chargpt.kernels import causal_attention, softmax_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from kernels.cases import ALL_OPTIONS, AttentionCase, CrossEntropyCase

FOUND = 86  # the exit code with which the sanitizer says that it found something
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
    parser.add_argument("--deadline", type=float, default=float("inf"), help="not looked at: the caller keeps it")
    parser.add_argument("--dry", action="store_true", help="the cases on the CPU, without the tool")
    parser.add_argument("--inside", action="store_true", help="run the cases: what this program starts under the tool")
    options = parser.parse_args()
    if not options.dry and not options.inside:
        found = run(options.tool, options.result)
        save(options.result, {"notes": found})
        sys.exit(found.get("errors", 0) != 0)
    # Racecheck does not follow the asynchronous barriers in Triton's code, and reports races that are none.
    impls = ("cpp", "torch") if options.dry else ("cuda", "triton") if options.tool == "memcheck" else ("cuda",)
    torch.set_num_threads(1)
    for case, dtype in CASES:
        for impl in impls:
            if not (impl == "cpp" and dtype == torch.float16):  # which it does not take
                walk(case, dtype, impl, "cpu" if options.dry else "cuda")
                print(f"ran {case.name} {dtype} {impl}", flush=True)
    save(options.result, {"notes": {"skipped": "a dry run has no sanitizer"}})


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


def run(tool: str, result: Path) -> dict[str, object]:
    """Start this program under the tool: how many errors it found, and the first of its report."""
    sanitizer = find()
    if sanitizer is None:
        return {"skipped": "compute-sanitizer is not here"}
    inner = [sys.executable, "-m", "benchmarks.gpu.sanitize", "--tool", tool, "--result", str(result), "--inside"]
    command = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND), *inner]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:  # as they come, so that the log has them when time runs out
            print(line, end="", flush=True)
            lines.append(line.strip())
    errors = count_errors("\n".join(lines))
    if errors is None or running.returncode not in (0, FOUND):
        sys.exit(f"{tool} ended with exit code {running.returncode}; its report is above")
    report = [line.removeprefix("=========").strip() for line in lines if line.startswith("=========")]
    return {"errors": errors, "report": report[:40] if errors else []}


def count_errors(report: str) -> int | None:
    """The number in the summary at the end, None where there is none."""
    summary = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", report)
    return int(summary[1] or summary[2]) if summary else None


def find() -> str | None:
    """compute-sanitizer, on the path or beside the compiler."""
    compiler = shutil.which("nvcc")
    beside = str(Path(compiler).resolve().parent) if compiler else ""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


if __name__ == "__main__":
    main()
