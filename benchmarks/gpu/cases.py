"""Every check of `tests/gpu/checks.py` on this GPU, shared out among processes, with all failures reported.

Processes, because Triton compiles on one core, and because an illegal access leaves a process without a GPU: that
process ends, and another goes on behind the check that did it. With --smoke it is one check for each path through the
kernels, each in a process of its own.
"""

import argparse
import collections
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.program import BROKEN, save

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from gpu.checks import Check, SkippedError, all_checks, smoke_checks

PATIENCE = 60.0  # seconds after which a check counts as hung, the compiling of its kernels included
OFTEN = 2.0  # seconds between two looks at what the workers found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write; a worker's: of lines")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="in seconds since 1970")
    parser.add_argument("--dry", action="store_true", help="on the CPU")
    parser.add_argument("--smoke", action="store_true", help="only the few checks of every path")
    parser.add_argument("--worker", type=int, help="run this share of the checks")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--skip", type=int, default=0, help="checks of the share that are done")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = smoke_checks if options.smoke else all_checks
    checks = chosen("cpu" if options.dry else "cuda", small=options.dry)
    parts = [[check] for check in checks] if options.smoke else shares(checks, options.workers)
    if options.worker is not None:
        work(parts[options.worker][options.skip :], options.result)
        return
    command = [sys.executable, "-m", "benchmarks.gpu.cases", "--workers", str(options.workers)]
    command += [flag for flag, wanted in (("--dry", options.dry), ("--smoke", options.smoke)) if wanted]
    at_once = len(parts) if options.smoke else options.workers  # most of a short check is the start of its process
    outcomes = run(command, parts, at_once, options.result, options.deadline, checks)
    content = summary(checks, outcomes)
    save(options.result, {"notes": content})
    print(f"{content['passed']} of {content['checks']} checks passed")
    for name, problems in content["failed"].items():
        print(f"FAILED {name}: {'; '.join(problems)}")
    sys.exit(content["passed"] + len(content["skipped"]) < max(1, content["checks"]))


def shares(checks: list[Check], workers: int) -> list[list[Check]]:
    """One for each worker, families together, and last those that must run alone."""
    beside = [check for check in checks if not check.alone]
    families = list(dict.fromkeys(check.family for check in beside))
    parts: list[list[Check]] = [[] for _ in range(workers)]
    for check in beside:
        parts[families.index(check.family) % workers].append(check)
    return [part for part in [*parts, [check for check in checks if check.alone]] if part]


def run(
    command: list[str], parts: list[list[Check]], at_once: int, result: Path, deadline: float, checks: list[Check]
) -> dict[str, dict[str, Any]]:
    """What came of the checks, by name; saved again and again while they run."""
    waiting = list(enumerate(parts))
    workers: list[Worker] = []
    running: list[Worker] = []
    saved = 0.0
    while (waiting or running) and time.time() < deadline:
        while waiting and len(running) < (1 if waiting[0][1][0].alone else at_once):
            number, share = waiting.pop(0)
            workers.append(Worker(command, number, share, result))
            running.append(workers[-1])
        time.sleep(0.1)
        running = [worker for worker in running if worker.goes_on()]
        if time.time() - saved > OFTEN:
            outcomes = {name: outcome for worker in workers for name, outcome in worker.outcomes().items()}
            save(result, {"notes": summary(checks, outcomes)})
            saved = time.time()
    return {name: outcome for worker in workers for name, outcome in worker.stop().items()}


def summary(checks: list[Check], outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What came of all checks: counts for each operation, implementation and dtype, and everything that failed."""
    table: dict[str, collections.Counter[str]] = {}
    failed, skipped = {}, {}
    for check in checks:
        outcome = outcomes.get(str(check), {"problems": ["was not run: no time was left"]})
        row = table.setdefault(f"{check.operation} {check.impl} {check.dtype}", collections.Counter())
        if "skipped" in outcome:
            skipped[str(check)] = outcome["skipped"]
            row["skipped"] += 1
        elif outcome["problems"]:
            failed[str(check)] = outcome["problems"]
            row["failed"] += 1
        else:
            row["passed"] += 1
    return {
        "checks": len(checks),
        "passed": sum(row["passed"] for row in table.values()),
        "table": {name: dict(row) for name, row in table.items()},
        "failed": failed,
        "skipped": skipped,
    }


class Worker:
    """A process that runs a share of the checks, started again for as long as checks break its CUDA context."""

    def __init__(self, command: list[str], number: int, share: list[Check], result: Path) -> None:
        self.command, self.number, self.share = command, number, share
        self.lines = result.with_name(f"{result.stem}-{number}.lines")
        self.lines.unlink(missing_ok=True)
        self._start(skip=0)

    def goes_on(self) -> bool:
        """Whether there is more to wait for."""
        code = self.process.poll()
        if code is None:
            return True
        outcomes = self.outcomes()
        if code == 0 or len(outcomes) == len(self.share):
            return False
        if code != BROKEN:  # it had no time to say why
            check = self.share[len(outcomes)]
            _write(self.lines, str(check), problems=[f"ended the process with exit code {code}"])
        self._start(skip=len(self.outcomes()))
        return True

    def stop(self) -> dict[str, dict[str, Any]]:
        """End the process if it still runs, and say what is known about the share."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            outcomes = self.outcomes()
            if len(outcomes) < len(self.share):
                _write(self.lines, str(self.share[len(outcomes)]), problems=["had not ended when the time was over"])
        return self.outcomes()

    def outcomes(self) -> dict[str, dict[str, Any]]:
        outcomes = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.lines.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                    outcome = json.loads(line)
                    outcomes[outcome.pop("check")] = outcome
        return outcomes

    def _start(self, skip: int) -> None:
        options = ["--worker", str(self.number), "--skip", str(skip), "--result", str(self.lines)]
        self.process = subprocess.Popen([*self.command, *options])


def work(share: list[Check], lines: Path) -> None:
    """Run the checks in order and write one line about each."""
    for check in share:
        started = time.perf_counter()
        outcome: dict[str, Any]
        watchdog = threading.Timer(PATIENCE, _give_up, (lines, str(check)))
        watchdog.daemon = True
        watchdog.start()
        try:
            outcome = {"problems": check.problems()}
        except SkippedError as reason:
            outcome = {"skipped": str(reason)}
        except Exception as error:  # whatever a kernel raises is a finding
            outcome = {"problems": [f"{type(error).__name__}: {error}"[:500]]}
        broken = _broken()
        watchdog.cancel()
        _write(lines, str(check), **outcome, seconds=round(time.perf_counter() - started, 3))
        if broken:
            os._exit(BROKEN)


def _give_up(lines: Path, check: str) -> None:
    """End the process: nothing else stops a kernel that hangs."""
    _write(lines, check, problems=[f"had not ended after {PATIENCE:g} s"])
    os._exit(BROKEN)


def _broken() -> bool:
    """Whether the CUDA context is gone. Gives the check's memory back, for the other workers."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _write(lines: Path, check: str, **outcome: Any) -> None:
    with lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"check": check, **outcome}) + "\n")


if __name__ == "__main__":
    main()
