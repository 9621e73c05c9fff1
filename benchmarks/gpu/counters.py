"""What the hardware's counters say of our kernels, by Nsight Compute (ncu): why each is as fast as it is.

The clocks are left as they are. Where ncu is not there, or the driver does not let it read counters, that is said.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.gpu.program import save
from chargpt.kernels import causal_attention, softmax_cross_entropy

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats")
# By the name of a metric in those sections; the others are left out.
METRICS = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L1/TEX Cache Throughput",
    "L2 Cache Throughput",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
    "Dynamic Shared Memory Per Block",
    "Waves Per SM",
    "Warp Cycles Per Issued Instruction",
    "No Eligible",
)
KERNELS = "attention_forward|attention_backward|long_rows|short_rows|forward_kernel|gradients_kernel|_rows_kernel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="not looked at: the caller keeps it")
    parser.add_argument("--dry", action="store_true", help="run the kernels on the CPU, without ncu")
    parser.add_argument("--inside", action="store_true", help="run the kernels: what ncu is to watch")
    options = parser.parse_args()
    if options.inside or options.dry:
        calls("cpu" if options.dry else "cuda", ("cpp",) if options.dry else ("cuda", "triton"))
        if options.dry:
            save(options.result, {"notes": {"skipped": "a dry run has no ncu; the kernels ran without it"}})
        return
    save(options.result, {"notes": measured()})


def calls(device: str, impls: Iterable[str]) -> None:
    """The kernels at this project's shapes, forward and backward, once each."""
    small = device == "cpu"
    for impl in impls:
        for dropout_p in (0.0, 0.2):
            B, H, T, D = (2, 2, 16, 64) if small else (64, 6, 256, 64)
            q, k, v = (torch.randn(B, H, T, D, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(3))
            causal_attention(q, k, v, dropout_p=dropout_p, impl=impl).backward(torch.randn_like(q))
        for rows, V in ((4, 65), (4, 50_257)) if small else ((16_384, 65), (4096, 50_257)):
            logits = torch.randn(rows, V, dtype=torch.bfloat16, device=device).requires_grad_()
            softmax_cross_entropy(logits, torch.randint(V, (rows,), device=device), impl=impl).backward()


def measured() -> dict[str, object]:
    tool = shutil.which("ncu")
    if tool is None:
        return {"skipped": "ncu is not here"}
    told = ["--clock-control", "none", "--csv", "--page", "details", "--kernel-name", f"regex:{KERNELS}"]
    sections = [part for section in SECTIONS for part in ("--section", section)]
    inner = [sys.executable, "-m", "benchmarks.gpu.counters", "--inside", "--result", "/dev/null"]
    done = subprocess.run([tool, *told, *sections, *inner], capture_output=True, text=True, check=False)
    print(done.stdout[-100_000:], done.stderr[-20_000:], flush=True)
    kernels = read(done.stdout)
    if not kernels:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("==ERROR==")]
        return {"skipped": f"ncu measured nothing: {' '.join(said)[:400] or f'exit code {done.returncode}'}"}
    return {"kernels": kernels}


def read(text: str) -> list[dict[str, str]]:
    """From ncu's CSV, behind whatever the program printed: for each launch its kernel, and metrics with units."""
    lines = text.splitlines()
    head = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[head:] if line.startswith('"')):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
        if row["Metric Name"] in METRICS:
            launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


if __name__ == "__main__":
    main()
