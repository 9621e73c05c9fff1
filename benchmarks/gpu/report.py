"""The suite's results as a page to read: what ran on which card, what did not and why, and which goals were met."""

import re
from collections.abc import Callable, Iterable
from typing import Any

Results = dict[str, Any]

SHORT = 512  # the longest sequence that the CUDA kernels are made for
LONG = 1024  # the shortest on which Triton should keep up with the libraries
# Times as fast as the best of torch's backends, forward and backward in bfloat16.
HEAD_64_GOAL, HEAD_32_GOAL, HEAD_128_GOAL, DROPOUT_GOAL = 1.2, 1.5, 0.6, 1.2
TRITON_GOAL = 0.9  # times as fast as FlashAttention-2, torch's flash backend
COPY_GOALS = {65: 0.6, 50_257: 0.85, 50_304: 0.85, 128_256: 0.6}  # shares of the copy bandwidth, by vocabulary
LARGE, COMPILE_GOAL = 30_000, 2.0  # from such a vocabulary on, times as fast as torch.compile
STEP_GOAL, COMPILED_STEP_GOAL = 1.8, 1.3  # times as fast as the step on SDPA, eager and compiled
BUSY = 0.9  # a GPU that is busy for less of the time waits for the host
LISTED = 60  # failed checks on the page


def file_name(results: Results) -> str:
    """gpu-h200 for an NVIDIA H200."""
    device = _notes(results, "build").get("machine", {}).get("device", "unknown")
    short = device.removeprefix("NVIDIA ").removeprefix("GeForce ").lower()
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", short).strip("-")


def markdown(results: Results) -> str:
    sections = (
        *(machine, steps, goals, smoke, proof, shapes, grid, cross_entropy, training_step, bound, generation, counters),
        time_to_loss,
    )
    written = [section(results) for section in sections]
    return "\n".join(line for lines in written if len(lines) > 3 for line in lines).rstrip() + "\n"  # 3: head alone


# ------------------------------------------------------------------------------------------------------- how it was run


def machine(results: Results) -> list[str]:
    here = _notes(results, "build").get("machine", {})
    lines = [f"# {here.get('device', 'unknown device')}", ""]
    if results["dry"]:
        lines += ["A dry run on the CPU: tiny sizes and stand-ins, so no number below says anything about a GPU.", ""]
    told = ", ".join(f"{key} {value}" for key, value in here.items() if key != "device" and value)
    clocks = {name: _notes(results, name).get("clocks") for name in ("shapes", "step", "grid", "cross_entropy")}
    lines += [told, ""]
    lines += [f"After {name}: {_pairs(values)}." for name, values in clocks.items() if values]
    if (carried := _notes(results, "build").get("carried")) is not None:
        lines.append(f"The carried modules were not used: {carried}.")
    lines += [f"{name}: {text}." for name, text in _notes(results, "build").get("implementations", {}).items()]
    return [*lines, ""]


def steps(results: Results) -> list[str]:
    """sources: a fingerprint of the kernels that ran. Steps with different ones are of different versions."""
    rows = [
        [name, f"{step['seconds']:.0f} of {step['budget']}", step["status"], step["ended"], step["sources"]]
        for name, step in results["steps"].items()
    ]
    lines = table(["step", "seconds", "status", "ended", "sources"], rows)
    missing = results.get("not run", [])
    return [*lines, f"Not run: {', '.join(missing)}.", ""] if missing else lines


def goals(results: Results) -> list[str]:
    rows = [list(row) for row in judged(results)]
    return ["## Goals", "", *table(["goal", "", "measured"], rows)]


def judged(results: Results) -> Iterable[tuple[str, str, str]]:
    """(goal, "met" or "missed" or "not measured", by how much)"""
    yield from _judged_attention(results)
    losses = _losses(results)
    for name in ("cuda", "triton"):
        for V, goal in COPY_GOALS.items():
            shares = {m["case"]: m["share_of_copy"].get(name) for m in losses if m["shape"][1] == V}
            yield _least(f"{name} cross-entropy at least {goal} of the copy bandwidth, V = {V}", shares, goal)
        yield _least(
            f"{name} cross-entropy at least {COMPILE_GOAL} times torch.compile, V ≥ {LARGE}",
            {m["case"]: m["ratio"].get(name, {}).get("compiled") for m in losses if m["shape"][1] >= LARGE},
            COMPILE_GOAL,
        )
    yield from _judged_steps(results)
    for m in _measurements(results, "time_to_loss"):
        if "skipped" not in m:
            claim = f"{m['case']} trains to a validation loss of at most {_notes(results, 'time_to_loss')['goal']}"
            told = f"in {m['seconds']:.1f} s" if m["reached"] else f"best {_number(m['best'])}"
            yield claim, "met" if m["reached"] else "missed", told


def _judged_attention(results: Results) -> Iterable[tuple[str, str, str]]:
    timed = [m for step in ("shapes", "grid") for m in _timed(results, step) if "tflops" in m]
    both = [m for m in timed if m["passes"] != "forward" and not m["warm"]]
    plain, dropped = ([m for m in both if bool(m["dropout_p"]) == wanted] for wanted in (False, True))

    def cuda(measured: list[Any], D: int, longest: int) -> dict[str, float | None]:
        wanted = [m for m in measured if m["shape"][3] == D and m["shape"][2] <= longest]
        return {m["case"]: m["ratio"].get("cuda") for m in wanted}

    best = "the best of torch's backends, forward and backward"
    yield _least(f"CUDA, D = 64, T ≤ {SHORT}: {HEAD_64_GOAL} times {best}", cuda(plain, 64, SHORT), HEAD_64_GOAL)
    yield _least(f"CUDA, D = 32, T ≤ {SHORT}: {HEAD_32_GOAL} times {best}", cuda(plain, 32, SHORT), HEAD_32_GOAL)
    yield _least(f"CUDA, D = 128: {HEAD_128_GOAL} times {best}", cuda(plain, 128, 1 << 30), HEAD_128_GOAL)
    yield _least(
        f"Triton, its faster entry, T ≥ {LONG}: {TRITON_GOAL} times torch's flash backend, forward and backward",
        {m["case"]: _fastest_triton(m["ratio_to_flash"]) for m in plain if m["shape"][2] >= LONG},
        TRITON_GOAL,
    )
    yield _least(
        f"CUDA with dropout, T ≤ {SHORT}: {DROPOUT_GOAL} times the best backend that takes dropout",
        {m["case"]: m["ratio"].get("cuda") for m in dropped if m["shape"][2] <= SHORT},
        DROPOUT_GOAL,
    )


def _judged_steps(results: Results) -> Iterable[tuple[str, str, str]]:
    """The fastest of ours against torch's eager step; the fastest compiled one against torch's compiled step."""
    speed = {name: value for m in _timed(results, "step") for name, value in m["tokens_per_second"].items()}
    ours = {name: value for name, value in speed.items() if name.split()[0] in ("cuda", "triton")}
    compiled = {name: value for name, value in ours.items() if " compiled" in name}
    for goal, wanted, others, theirs in (
        ("the training step: {} times torch's eager step on SDPA", STEP_GOAL, ours, speed.get("sdpa")),
        ("compiled: {} times torch's compiled step", COMPILED_STEP_GOAL, compiled, speed.get("sdpa compiled")),
    ):
        best = max(others, key=lambda name: others[name], default=None)
        ratios = {} if best is None or theirs is None else {best: others[best] / theirs}
        yield _least(goal.format(wanted), dict(ratios), wanted)


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


def smoke(results: Results) -> list[str]:
    found = _notes(results, "smoke")
    return ["## Smoke", "", *_checks(found)] if found else []


def proof(results: Results) -> list[str]:
    lines = ["## Proof", "", *_checks(_notes(results, "cases"))]
    for tool in ("memcheck", "racecheck"):
        notes = _notes(results, tool)
        if "skipped" in notes:
            lines.append(f"- {tool}: skipped, {notes['skipped']}")
        elif "cases" in notes:
            clean = [name for name, report in notes["cases"].items() if not report]
            lines.append(f"- {tool}: {len(clean)} of {len(notes['cases'])} cases clean")
            lines += [f"  - {name}: {'; '.join(report)}" for name, report in notes["cases"].items() if report]
        else:
            lines.append(f"- {tool}: not run")
    return [*lines, ""]


def _checks(found: dict[str, Any]) -> list[str]:
    if not found:
        return ["The checks were not run.", ""]
    rows = [
        [name, *(str(row.get(key, 0)) for key in ("passed", "failed", "skipped"))]
        for name, row in found["table"].items()
    ]
    lines = [f"{found['passed']} of {found['checks']} checks passed.", ""]
    lines += table(["", "passed", "failed", "skipped"], rows)
    failed = [f"- FAILED {name}: {'; '.join(problems)}" for name, problems in found["failed"].items()]
    lines += failed[:LISTED]
    lines += [f"- and {len(failed) - LISTED} more, in the JSON file"] if len(failed) > LISTED else []
    return [*lines, *(f"- skipped {name}: {reason}" for name, reason in found["skipped"].items()), ""]


# ----------------------------------------------------------------------------------------------------- the measurements


def shapes(results: Results) -> list[str]:
    notes = _notes(results, "shapes")
    lines = ["## This project's shapes", ""]
    if "matrix_product_tflops" in notes:
        copied, product = notes["copy_gigabytes_per_second"], notes["matrix_product_tflops"]
        lines += [f"This card copies {copied:.0f} GB/s and multiplies 8192³ at {product:.0f} TFLOP/s in bfloat16.", ""]
    return lines + _attention(results, "shapes") + _cross_entropy(results, "shapes") + _remarks(results, "shapes")


def grid(results: Results) -> list[str]:
    return ["## Causal attention, bfloat16", "", *_attention(results, "grid"), *_remarks(results, "grid")]


def cross_entropy(results: Results) -> list[str]:
    lines = ["## Softmax cross-entropy, loss and gradient", "", *_cross_entropy(results, "cross_entropy")]
    return lines + _remarks(results, "cross_entropy")


def _attention(results: Results, step: str) -> list[str]:
    measured = [m for m in _timed(results, step) if "tflops" in m]
    if not measured:
        return []
    names = _names(m["tflops"] for m in measured)
    lines = ["TFLOP/s of useful work, and times as fast as torch's best. Warm: with the inputs in L2.", ""]
    for passes in ("forward", "forward and backward"):
        rows = []
        for m in (m for m in measured if m["passes"] == passes):
            rows.append(
                [
                    m["case"].replace(f" {passes}", ""),
                    *_row(m["tflops"], names),
                    str(m["best_backend"]),
                    _pairs(m["ratio"]),
                ]
            )
        lines += table([f"{passes}: (B, H, T, D)", *names, "best", "ratio to it"], rows)
    return lines


def _cross_entropy(results: Results, step: str) -> list[str]:
    measured = [m for m in _timed(results, step) if "share_of_copy" in m]
    if not measured:
        return []
    copied = _notes(results, step).get("copy_gigabytes_per_second")
    lines = [f"GB/s of one read and one write of the logits; torch copies {copied:.0f} GB/s.", ""] if copied else []
    names = _names(m["gigabytes_per_second"] for m in measured)
    rows = []
    for m in measured:
        shares = ", ".join(f"{name} {m['share_of_copy'][name]:.0%}" for name in m["ratio"])
        ratios = "; ".join(f"{name} {_pairs(ratio)}" for name, ratio in m["ratio"].items())
        rows.append([m["case"], *_row(m["gigabytes_per_second"], names), shares, ratios])
    return lines + table(["(rows, V)", *names, "share of the copy", "times as fast as torch's"], rows)


def training_step(results: Results) -> list[str]:
    lines = ["## Training step, 10.65 M parameters, 64 × 256, bfloat16, dropout 0.2", ""]
    for m in _timed(results, "step"):
        rows = [
            [name, f"{m['milliseconds'][name]:.2f}", f"{speed:,.0f}", _pairs(m["ratio"].get(name, {}))]
            for name, speed in m["tokens_per_second"].items()
        ]
        lines += table([m["case"], "ms", "tokens/s", "times as fast as torch's"], rows)
    return lines + _remarks(results, "step")


def generation(results: Results) -> list[str]:
    lines = ["## Generation, tokens a second of all samples together, behind half a window", ""]
    measured = _timed(results, "generation")
    rows = [
        [m["case"], *(f"{m['tokens_per_second'].get(way, 0):,.0f}" for way in ("eager", "graph")), f"{m['alike']:.1%}"]
        for m in measured
    ]
    lines += table(["model, samples", "eager", "graph", "same tokens"], rows) if rows else []
    return lines + _remarks(results, "generation")


def bound(results: Results) -> list[str]:
    """What the step is bound by: the host, or the largest of what the GPU does."""
    lines = []
    for name, found in _notes(results, "step").get("profiles", {}).items():
        if not found:
            continue
        groups = ", ".join(f"{group} {share:.0%}" for group, share in found["groups"].items())
        busy, launches = found["busy_share"], found["launches"]
        told = f"the GPU is busy for {busy:.0%} of the time, in {launches:.0f} launches a step"
        reason = "the host" if busy < BUSY else next(iter(found["groups"]))
        lines += [f"**{name}** is bound by {reason}: {told}: {groups}.", ""]
        rows = [[f"`{kernel}`", f"{spent:.3f}", f"{calls:.0f}"] for kernel, spent, calls in found["kernels"]]
        lines += table(["kernel", "ms a step", "calls a step"], rows)
    return lines


def counters(results: Results) -> list[str]:
    notes = _notes(results, "counters")
    if not notes:
        return []
    lines = ["## Counters", ""]
    if "skipped" in notes:
        return [*lines, f"- skipped, {notes['skipped']}", ""]
    names = list(dict.fromkeys(name for launch in notes["kernels"] for name in launch))
    return lines + table(names, [[launch.get(name, "–") for name in names] for launch in notes["kernels"]])


def time_to_loss(results: Results) -> list[str]:
    lines = [f"## Seconds to a validation loss of at most {_notes(results, 'time_to_loss').get('goal')}", ""]
    rows = [
        [
            m["case"],
            _number(m["seconds"]) if m["reached"] else "not reached",
            str(m["curve"][-1][0]) if m["curve"] else "",
            _number(m["best"]),
            _number(m["compile_seconds"]),
        ]
        for m in _timed(results, "time_to_loss")
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


def _losses(results: Results) -> list[dict[str, Any]]:
    """Of cross-entropy in bfloat16."""
    timed = [m for step in ("shapes", "cross_entropy") for m in _timed(results, step)]
    return [m for m in timed if m.get("dtype") == "bfloat16"]


def _timed(results: Results, step: str) -> list[dict[str, Any]]:
    return [m for m in _measurements(results, step) if "skipped" not in m]


def _notes(results: Results, step: str) -> dict[str, Any]:
    return results.get(step, {}).get("notes", {})


def _measurements(results: Results, step: str) -> list[dict[str, Any]]:
    return results.get(step, {}).get("measurements", [])
