"""Time functions side by side in one process: rounds in which each runs once, compared round by round.

The one idea to know: on a shared machine the speed of everything drifts, so two medians taken one after the other
compare two moments. Here each round gives one ratio, in which the drift cancels; the median of the ratios is reported.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chargpt.kernels import native
from chargpt.runtime import device_name

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """One case: the same work done by several functions. Times in milliseconds."""

    case: str  # what is done, with shapes and dtype
    median: dict[str, float]  # by the name of the function
    fastest: dict[str, float]
    ratios: dict[str, float]  # "a / b": median over the rounds of time(a) / time(b)
    rounds: int
    goal: str = ""


def compare(
    case: str,
    functions: dict[str, Callable[[], Any]],
    ratios: list[tuple[str, str]],
    *,
    goal: str = "",
    seconds: float = 4.0,
    warm_up: int = 2,
) -> Measurement:
    """Time `functions` by the host's clock, as `interleave` does.

    ratios: pairs (a, b) of names, of which time(a) / time(b) is wanted: by how much b is faster
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    times = interleave(functions, milliseconds, seconds)
    return Measurement(
        case=case,
        median={name: statistics.median(column) for name, column in times.items()},
        fastest={name: min(column) for name, column in times.items()},
        ratios={f"{a} / {b}": paired_ratio(times, a, b) for a, b in ratios},
        rounds=min(map(len, times.values())),
        goal=goal,
    )


def interleave(
    functions: dict[str, Callable[[], Any]], timer: Callable[[Callable[[], Any]], float], seconds: float
) -> dict[str, list[float]]:
    """Times by name: `functions` in turn for about `seconds`, at least five rounds, every other one in reverse order.

    timer: calls a function once and says how many milliseconds it took
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    rounds = 0
    while rounds < 5 or (time.perf_counter() - started < seconds and rounds < 2000):
        for name in list(functions)[:: -1 if rounds % 2 else 1]:
            times[name].append(timer(functions[name]))
        rounds += 1
    return times


def paired_ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """The median over the rounds of time(a) / time(b): by how much b is faster."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def milliseconds(function: Callable[[], Any]) -> float:
    """What one call takes, by the host's clock."""
    before = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - before)


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    module = native.load().module
    return {
        "cpu": device_name(torch.device("cpu")),
        "features": [name for name, has in module.cpu_features().items() if has] if module else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": module.build_info()["compiler"] if module else None,
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def report(name: str, measurements: list[Measurement], notes: dict[str, Any] | None = None) -> None:
    """Write benchmarks/results/<name>.json and print a Markdown table."""
    content = {"machine": machine(), **(notes or {}), "measurements": [asdict(m) for m in measurements]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    here = content["machine"]
    print(f"\n### {name}: {here['cpu']}, {here['threads']} threads, torch {here['torch']}, {here['time']}\n")
    for key, value in (notes or {}).items():
        print(f"{key}: {value}\n")
    print("| case | median time in ms | times faster, median of paired ratios | goal |")
    print("|---|---|---|---|")
    for m in measurements:
        times = ", ".join(f"{function} {_short(value)}" for function, value in m.median.items())
        ratios = ", ".join(f"{pair} {value:.2f}" for pair, value in m.ratios.items())
        print(f"| {m.case} | {times} | {ratios} | {m.goal} |")


def _short(milliseconds: float) -> str:
    """Three significant digits."""
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(milliseconds)))}f}"
