"""Whole training steps of the 10.65 M model, batch 64 × 256, bfloat16: tokens per second, and what bounds them.

From batch to optimizer, as `chargpt.training` makes them, by the host's clock. Against the same model on torch's
scaled_dot_product_attention and F.cross_entropy: eager, recorded as one CUDA graph, under torch.compile, and both.
Tokens are random: they change no amount of work. A profile says for how much of the time the GPU was busy, and with
what.
"""

import re
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.program import Function, Program
from benchmarks.gpu.training import TORCH, candidates, setup
from benchmarks.harness import milliseconds
from chargpt.data import build_batches
from chargpt.training import training_step
from chargpt.training.graph import GraphedStep

VOCABULARY = 65
COMPILING = 150.0  # seconds that torch.compile may take for one of them
LISTED = 15  # kernels of a profile

# By the names of kernels, ours and the libraries', the first that fits.
GROUPS = {
    "attention": r"attention_|flash|fmha|sdp|forward_kernel|delta_kernel|(key|query)_gradients_kernel",
    "cross-entropy": r"short_rows|long_rows|whole_rows|span_totals|count_kernel|sum_kernel|softmax|nll",
    "matrix products": r"gemm|nvjet|cutlass|cublas|matmul|mma|splitK|aten::(mm|addmm|bmm)",
    "optimizer": r"multi_tensor|adam|foreach|_foreach",
    "copies": r"[Mm]emcpy|[Mm]emset|copy|[Cc]at",
}
OTHERS = "other passes over memory"


def main() -> None:
    program = Program(__doc__)
    names, refused = candidates(program)
    first, others = names[:1], names[1:]
    # What answers most comes first, in case that time runs out; torch: the reference, for the record.
    graph, compiled_graph = ("", " compiled") if program.dry else (" graph", " compiled graph")
    measure(program, "eager", [f"{name}{way}" for name in (*first, TORCH) for way in ("", graph)], refused)
    ways = [f"{TORCH} compiled", *(f"{name}{way}" for name in (*first, TORCH) for way in (" compiled", compiled_graph))]
    measure(program, "compiled", ways, refused)
    measure(program, "others", [TORCH, *(f"{name}{way}" for name in (*others, "torch") for way in ("", graph))], {})
    program.finish()


def measure(program: Program, case: str, ways: list[str], refused: dict[str, str]) -> None:
    """Time the steps of each against the others', and profile those of the first two cases.

    ways: the name of an implementation, then " compiled" or " graph" or both
    """
    steps = 1 if program.dry else 10  # in one sample, so that waiting for the GPU at its end weighs little
    variants = {name: samples(program, name, steps) for name in dict.fromkeys(ways)}

    def per_step(sample: Function) -> float:
        program.synchronize()
        return milliseconds(sample) / steps

    times = program.time(case, variants, refused, seconds=8, timer=per_step, patience=COMPILING)
    if times is not None:
        tokens = 4 * 16 if program.dry else 64 * 256
        baselines = [name for name in times.times if name.startswith(TORCH)]
        program.record(
            {
                "case": case,
                **times.summary(),
                "tokens_per_second": {name: 1e3 * tokens / times.median(name) for name in times.times},
                "ratio": {
                    name: {other: times.ratio(other, name) for other in baselines}
                    for name in times.times
                    if name not in baselines
                },
            }
        )
        if case != "others":
            profiles = {name: profiled(program, variants[name], steps) for name in times.times}
            program.note(profiles=program.content["notes"].get("profiles", {}) | profiles)


def samples(program: Program, way: str, steps: int) -> Function:
    """A function that makes `steps` training steps and waits for the GPU to finish them."""
    kernels, *how = way.split()
    _, called, optimizers, config, runtime = setup(program, kernels, "compiled" in how, VOCABULARY, max_steps=1)
    tokens = np.random.default_rng(2).integers(VOCABULARY, size=1_000_000, dtype=np.uint8)
    batches = build_batches("random", tokens, config.batch_size, config.model.block_size, seed=3)
    parts = (called, optimizers, batches, config, runtime)
    step = GraphedStep(*parts) if "graph" in how else partial(training_step, *parts)

    def sample() -> None:
        for _ in range(steps):
            step()
        program.synchronize()

    return sample


def profiled(program: Program, sample: Function, steps: int) -> dict[str, Any]:
    """What the GPU did while a sample ran, or, on a dry run, the CPU."""
    with profile(activities=[ProfilerActivity.CPU if program.dry else ProfilerActivity.CUDA]) as seen:
        sample()
    wanted = DeviceType.CPU if program.dry else DeviceType.CUDA
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == wanted
    ]
    return summary(events, steps)


def summary(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """events: (name, start, end) in microseconds. What the GPU was busy with, and whether the host kept it busy."""
    if not events:
        return {}
    busy, reached = 0.0, float("-inf")  # the union of the intervals
    for _, start, end in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - min(start for _, start, _ in events)
    spent, calls, groups = Counter[str](), Counter[str](), Counter[str]()
    for name, start, end in events:
        spent[name] += end - start  # type: ignore[assignment]
        calls[name] += 1
        groups[group(name)] += end - start  # type: ignore[assignment]
    total = sum(spent.values())
    return {
        "busy_share": busy / span if span else 1.0,
        "busy_milliseconds": busy / 1e3 / steps,
        "launches": len(events) / steps,
        "groups": {name: value / total for name, value in groups.most_common()} if total else {},
        "kernels": [
            [name[:120], spent[name] / 1e3 / steps, calls[name] / steps] for name, _ in spent.most_common(LISTED)
        ],
    }


def group(kernel: str) -> str:
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel)), OTHERS)


if __name__ == "__main__":
    main()
