"""The suite's results as a page to read, with the goals and whether they were met."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Results = dict[str, Any]

SHORT = 512  # the longest sequence that the CUDA kernels are made for
LONG = 1024  # the shortest on which Triton should keep up with the libraries
CUDA_GOAL, TRITON_GOAL = 1.2, 0.9  # times as fast as the best of torch's backends
COPY_GOAL, COMPILE_GOAL = 0.85, 2.0  # of the copy bandwidth; times as fast as torch.compile
LISTED = 60  # failed checks on the page


def file_name(results: Results) -> str:
    """gpu-h200 for an NVIDIA H200."""
    device = _notes(results, "build").get("machine", {}).get("device", "unknown")
    short = device.removeprefix("NVIDIA ").removeprefix("GeForce ").lower()
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", short).strip("-")


def markdown(results: Results) -> str:
    sections = (machine, steps, goals, proof, attention, cross_entropy, training_step, time_to_loss)
    return "\n".join(line for section in sections for line in section(results)).rstrip() + "\n"


# ------------------------------------------------------------------------------------------------------- how it was run


def machine(results: Results) -> list[str]:
    here = _notes(results, "build").get("machine", {})
    lines = [f"# {here.get('device', 'unknown device')}", ""]
    if results["dry"]:
        lines += ["A dry run on the CPU: tiny sizes and stand-ins, so no number below says anything about a GPU.", ""]
    told = ", ".join(f"{key} {value}" for key, value in here.items() if key != "device" and value)
    clocks = {name: _notes(results, name).get("clocks") for name in ("attention", "cross_entropy", "training_step")}
    lines += [told, ""]
    lines += [f"After {name}: {_pairs(values)}." for name, values in clocks.items() if values]
    lines += [f"{name}: {text}." for name, text in _notes(results, "build").get("implementations", {}).items()]
    return [*lines, ""]


def steps(results: Results) -> list[str]:
    rows = [[step["step"], f"{step['seconds']:.0f} of {step['budget']}", step["status"]] for step in results["steps"]]
    return table(["step", "seconds", "status"], rows)


def goals(results: Results) -> list[str]:
    rows = [list(row) for row in judged(results)]
    return ["## Goals", "", *table(["goal", "", "measured"], rows)]


def judged(results: Results) -> Iterable[tuple[str, str, str]]:
    """(goal, "met" or "missed" or "not measured", by how much)"""
    for passes in ("forward", "forward and backward"):
        shapes = [m for m in _measurements(results, "attention") if m.get("passes") == passes]
        yield _least(
            f"CUDA attention at least {CUDA_GOAL} times the best backend for T ≤ {SHORT}, {passes}",
            {m["case"]: m["ratio"].get("cuda") for m in shapes if m["shape"][2] <= SHORT},
            CUDA_GOAL,
        )
        yield _least(
            f"Triton attention, its faster entry, at least {TRITON_GOAL} times the best for T ≥ {LONG}, {passes}",
            {m["case"]: _fastest_triton(m["ratio"]) for m in shapes if m["shape"][2] >= LONG},
            TRITON_GOAL,
        )
    losses = [m for m in _measurements(results, "cross_entropy") if "skipped" not in m]
    for name in ("cuda", "triton"):
        yield _least(
            f"{name} cross-entropy at least {COPY_GOAL} of the copy bandwidth, V = 50257, bfloat16",
            {
                m["case"]: m["share_of_copy"].get(name)
                for m in losses
                if m["shape"][1] == 50_257 and m["dtype"] == "bfloat16"
            },
            COPY_GOAL,
        )
        yield _least(
            f"{name} cross-entropy at least {COMPILE_GOAL} times torch.compile",
            {m["case"]: m["ratio"].get(name, {}).get("compiled") for m in losses},
            COMPILE_GOAL,
        )
    for m in _measurements(results, "time_to_loss"):
        if "skipped" not in m:
            goal = f"{m['case']} trains to a validation loss of at most {_notes(results, 'time_to_loss')['goal']}"
            told = f"in {m['seconds']:.1f} s" if m["reached"] else f"best {_number(m['best'])}"
            yield goal, "met" if m["reached"] else "missed", told


def _least(goal: str, values: dict[str, float | None], wanted: float) -> tuple[str, str, str]:
    """The goal holds where the least of the values reaches it. None: the contender did not run."""
    if not values or None in values.values():
        missing = [case for case, value in values.items() if value is None]
        return goal, "not measured", f"{len(missing)} of {len(values)} cases did not run" if values else ""
    known = {case: value for case, value in values.items() if value is not None}
    short = [case for case, value in known.items() if value < wanted]
    least = min(known, key=lambda case: known[case])
    told = f"least {known[least]:.2f}, at {least}; reached in {len(known) - len(short)} of {len(known)} cases"
    return goal, "missed" if short else "met", told


def _fastest_triton(ratio: dict[str, float]) -> float | None:
    return max((value for name, value in ratio.items() if name.startswith("triton")), default=None)


# ------------------------------------------------------------------------------------------------------------ the proof


def proof(results: Results) -> list[str]:
    found = _notes(results, "cases")
    lines = ["## Proof", ""]
    if found:
        rows = [
            [name, *(str(row.get(key, 0)) for key in ("passed", "failed", "skipped"))]
            for name, row in found["table"].items()
        ]
        lines += [f"{found['passed']} of {found['checks']} checks passed.", ""]
        lines += table(["", "passed", "failed", "skipped"], rows)
        failed = [f"- FAILED {name}: {'; '.join(problems)}" for name, problems in found["failed"].items()]
        lines += failed[:LISTED]
        lines += [f"- and {len(failed) - LISTED} more, in the JSON file"] if len(failed) > LISTED else []
        lines += [f"- skipped {name}: {reason}" for name, reason in found["skipped"].items()]
    for tool in ("memcheck", "racecheck"):
        notes = _notes(results, tool)
        if "skipped" in notes:
            lines.append(f"- {tool}: skipped, {notes['skipped']}")
        elif "errors" in notes:
            lines += [f"- {tool}: {notes['errors']} errors", *(f"  - {line}" for line in notes["report"] if line)]
        else:
            lines.append(f"- {tool}: did not end")
    return [*lines, ""]


# ----------------------------------------------------------------------------------------------------- the measurements


def attention(results: Results) -> list[str]:
    lines = ["## Causal attention, bfloat16", "", "TFLOP/s of useful work, and times as fast as torch's best.", ""]
    measured = [m for m in _measurements(results, "attention") if "skipped" not in m]
    names = _names(m["tflops"] for m in measured)
    for passes in ("forward", "forward and backward"):
        rows = []
        for m in (m for m in measured if m["passes"] == passes):
            best = m["best_backend"]
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in m["ratio"].items())
            rows.append([str(tuple(m["shape"])), *_row(m["tflops"], names), str(best), ratios])
        lines += table([f"{passes}: (B, H, T, D)", *names, "best", "ratio to it"], rows)
    return lines + _remarks(results, "attention")


def cross_entropy(results: Results) -> list[str]:
    copied = _notes(results, "cross_entropy").get("copy_gigabytes_per_second")
    lines = ["## Softmax cross-entropy, loss and gradient", ""]
    lines += [f"GB/s of one read and one write of the logits; torch copies {copied:.0f} GB/s.", ""] if copied else []
    measured = [m for m in _measurements(results, "cross_entropy") if "skipped" not in m]
    names = _names(m["gigabytes_per_second"] for m in measured)
    rows = []
    for m in measured:
        shares = ", ".join(f"{name} {m['share_of_copy'][name]:.0%}" for name in m["ratio"])
        ratios = "; ".join(f"{name} {_pairs(ratio)}" for name, ratio in m["ratio"].items())
        rows.append([m["case"], *_row(m["gigabytes_per_second"], names), shares, ratios])
    lines += table(["(rows, V)", *names, "share of the copy", "times as fast as torch's"], rows)
    return lines + _remarks(results, "cross_entropy")


def training_step(results: Results) -> list[str]:
    lines = ["## Training step, 10.65 M parameters, 64 × 256, bfloat16, dropout 0.2", ""]
    for m in _measurements(results, "training_step"):
        if "skipped" not in m:
            rows = [
                [name, f"{m['milliseconds'][name]:.2f}", f"{speed:,.0f}", _pairs(m["ratio"].get(name, {}))]
                for name, speed in m["tokens_per_second"].items()
            ]
            lines += table([m["case"], "ms", "tokens/s", "times as fast as torch's"], rows)
    return lines + _remarks(results, "training_step")


def time_to_loss(results: Results) -> list[str]:
    goal = _notes(results, "time_to_loss").get("goal")
    lines = [f"## Seconds to a validation loss of at most {goal}", ""]
    rows = [
        [
            m["case"],
            _number(m["seconds"]) if m["reached"] else "not reached",
            str(m["curve"][-1][0]) if m["curve"] else "",
            _number(m["best"]),
            _number(m["compile_seconds"]),
        ]
        for m in _measurements(results, "time_to_loss")
        if "skipped" not in m
    ]
    lines += table(["", "seconds", "steps", "best loss", "seconds of compiling"], rows)
    return lines + _remarks(results, "time_to_loss")


def _remarks(results: Results, step: str) -> list[str]:
    """What was skipped or refused and why, how much the times spread, and what broke."""
    measured = _measurements(results, step)
    reasons: dict[tuple[str, str], int] = {}
    for m in measured:
        for name, reason in m.get("refused", {}).items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    lines = [f"- {name} did not run in {count} cases: {reason}" for (name, reason), count in reasons.items()]
    lines += [f"- {m['case']}: skipped, {m['skipped']}" for m in measured if "skipped" in m]
    if late := _notes(results, step).get("launches_later_than_the_head_start"):
        lines.append(f"- {late} launches took the host longer than the head start, so their times include waiting")
    spreads = sorted(spread for m in measured for spread in m.get("spread", {}).values())
    if spreads:
        median, largest = spreads[len(spreads) // 2], spreads[-1]
        lines.append(f"- the middle half of the times spreads over {median:.1%} of their median, at most {largest:.1%}")
    return [*lines, ""]


# --------------------------------------------------------------------------------------------------------------- pieces


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _names(columns: Iterable[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for column in columns for name in column))


def _row(values: dict[str, float], names: list[str]) -> list[str]:
    return [_number(values.get(name)) for name in names]


def _number(value: float | None) -> str:
    """Three or four digits."""
    formats: list[tuple[float, Callable[[float], str]]] = [
        (1000, "{:,.0f}".format),
        (100, "{:.0f}".format),
        (10, "{:.1f}".format),
        (0.01, "{:.3f}".format),
        (0, "{:.1e}".format),
    ]
    return "–" if value is None else next(shown(value) for least, shown in formats if abs(value) >= least)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _notes(results: Results, step: str) -> dict[str, Any]:
    return results.get(step, {}).get("notes", {})  # type: ignore[no-any-return]


def _measurements(results: Results, step: str) -> list[dict[str, Any]]:
    return results.get(step, {}).get("measurements", [])  # type: ignore[no-any-return]
