"""Every check of `tests/gpu/checks.py` on this GPU, shared out among processes, with all failures reported.

Processes, because Triton compiles on one core, and because an illegal access leaves a process without a GPU: that
process ends, and another goes on behind the check that did it.
"""

import argparse
import collections
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.program import BROKEN, save

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from gpu.checks import Check, SkippedError, all_checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write; a worker's: of lines")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="in seconds since 1970")
    parser.add_argument("--dry", action="store_true", help="on the CPU")
    parser.add_argument("--worker", type=int, help="run this share of the checks")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes")
    parser.add_argument("--skip", type=int, default=0, help="checks of the share that are done")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checks = all_checks("cpu" if options.dry else "cuda", small=options.dry)
    families = list(dict.fromkeys(check.family for check in checks))
    shares: list[list[Check]] = [[] for _ in range(options.workers)]
    for check in checks:
        shares[families.index(check.family) % options.workers].append(check)
    if options.worker is not None:
        work(shares[options.worker][options.skip :], options.result)
        return
    command = [sys.executable, "-m", "benchmarks.gpu.cases", "--workers", str(options.workers)]
    workers = [
        Worker([*command, *(["--dry"] if options.dry else [])], number, share, options.result)
        for number, share in enumerate(shares)
        if share
    ]
    running = workers
    while running and time.time() < options.deadline:
        time.sleep(0.2)
        running = [worker for worker in running if worker.goes_on()]
    outcomes = {name: outcome for worker in workers for name, outcome in worker.stop().items()}
    content = summary(checks, outcomes)
    save(options.result, {"notes": content})
    print(f"{content['passed']} of {content['checks']} checks passed")
    for name, problems in content["failed"].items():
        print(f"FAILED {name}: {'; '.join(problems)}")
    sys.exit(content["passed"] + len(content["skipped"]) < max(1, content["checks"]))


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
        try:
            outcome = {"problems": check.problems()}
        except SkippedError as reason:
            outcome = {"skipped": str(reason)}
        except Exception as error:  # whatever a kernel raises is a finding
            outcome = {"problems": [f"{type(error).__name__}: {error}"[:500]]}
        broken = _broken()
        _write(lines, str(check), **outcome, seconds=round(time.perf_counter() - started, 3))
        if broken:
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
