"""Build, prove, measure: every step of the suite within ten minutes, and a page about what came of them.

Run as `make gpu`, or `python -m benchmarks.gpu [--dry]`. Writes benchmarks/results/gpu-<device>.json and .md, again
after every step, and copies of them and of the log into $OUT where that is set. The exit code is 1 when a step failed;
a goal that was missed is no failure.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.program import BROKEN
from chargpt.files import replaced_file

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 570  # for everything
MARGIN = 4  # seconds between the deadline that a step is told and the one at which it is ended
MODULE = "benchmarks.gpu"
MOST_RESTARTS = 8  # of a step that lost its CUDA context; each leaves out a contender, or a case


@dataclass(frozen=True)
class Step:
    name: str
    module: str
    options: tuple[str, ...] = ()
    kept: bool = True  # whether its results are; if not, it may fail


@dataclass(frozen=True)
class Stage:
    """Steps that run beside each other, and what they may take. What earlier stages save, later ones may use."""

    budget: float  # seconds
    steps: tuple[Step, ...]


# While the checks run, on many cores and little of the GPU, the measurements compile what they will need.
MEASUREMENTS = ("attention", "cross_entropy", "training_step", "time_to_loss")
STAGES = (
    Stage(300, (Step("build", "build"),)),
    Stage(
        160,
        (
            Step("cases", "cases"),
            Step("memcheck", "sanitize", ("--tool", "memcheck")),
            Step("racecheck", "sanitize", ("--tool", "racecheck")),
            *(Step(f"{name}, compiling", name, ("--warm",), kept=False) for name in MEASUREMENTS),
        ),
    ),
    *(Stage(budget, (Step(name, name),)) for name, budget in zip(MEASUREMENTS, (100, 50, 90, 80), strict=True)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="walk through everything on the CPU; nothing is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        results = scratch / "results" if options.dry else RESULTS
        failed = run(dry_stages() if options.dry else STAGES, scratch, results, options.dry)
        if options.dry:
            print("a dry run: nothing was kept")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def dry_stages() -> tuple[Stage, ...]:
    """All steps beside each other, since nothing is really timed. Compiling is no step of its own."""
    options = {"cases": ("--dry", "--workers", "2")}
    steps = [
        Step(step.name, step.module, (*step.options, *options.get(step.name, ("--dry",))))
        for stage in STAGES
        for step in stage.steps
        if step.kept
    ]
    return (Stage(SECONDS, tuple(steps)),)


def run(stages: tuple[Stage, ...], scratch: Path, results: Path, dry: bool) -> list[str]:
    """Run the stages one after the other, writing what is known after each; the names of the steps that failed."""
    end = time.time() + SECONDS
    content: dict[str, Any] = {"dry": dry, "steps": []}
    for number, stage in enumerate(stages):
        left = max(0.0, end - time.time())
        to_come = sum(later.budget for later in stages[number:])
        budget = min(stage.budget, left * stage.budget / to_come)
        print(f"{', '.join(step.name for step in stage.steps)}: {budget:.0f} s at most", flush=True)
        running = [Running(step, scratch, time.time() + budget) for step in stage.steps]
        try:
            while running:
                time.sleep(0.1)
                for process in [process for process in running if process.ended()]:
                    running.remove(process)
                    take(process, content, budget)
                    write(content, scratch, results)
        finally:
            for process in running:  # after Ctrl-C
                process.kill()
    print("\n" + report.markdown(content))
    kept = {step.name for stage in stages for step in stage.steps if step.kept}
    return [step["step"] for step in content["steps"] if step["status"] != "done" and step["step"] in kept]


def take(process: "Running", content: dict[str, Any], budget: float) -> None:
    """Add to `content` how a step ended and what it found."""
    name, status, seconds = process.step.name, process.status, process.seconds
    content["steps"].append({"step": name, "budget": round(budget), "status": status, "seconds": round(seconds, 1)})
    print(f"  {name}: {status} after {seconds:.0f} s", flush=True)
    if status != "done":
        print("    " + "\n    ".join(process.last_lines()), flush=True)
    if process.step.kept and process.result.exists():
        content[name] = json.loads(process.result.read_text(encoding="utf-8"))


class Running:
    """A step's process, with everything that it starts in a group of its own."""

    def __init__(self, step: Step, scratch: Path, deadline: float) -> None:
        self.step, self.deadline, self.started = step, deadline, time.time()
        self.status, self.seconds = "running", 0.0
        self.restarts = 0
        self.log = scratch / f"{step.name}.log"
        self.result = scratch / f"{step.name}.json"
        command = [sys.executable, "-m", f"{MODULE}.{step.module}", *step.options, "--result", str(self.result)]
        self.command = [*command, "--deadline", str(deadline - MARGIN)]
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def ended(self) -> bool:
        """Whether it is over, by itself or because its time was."""
        code = self.process.poll()
        if code is None and time.time() < self.deadline:
            return False
        self.kill()
        if code == BROKEN and self.restarts < MOST_RESTARTS:
            self.restarts += 1
            self._start()
            return False
        self.status = "stopped, out of time" if code is None else f"failed with exit code {code}" if code else "done"
        self.seconds = time.time() - self.started
        return True

    def kill(self) -> None:
        """End what is left of the step: it must not disturb the next."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]


def write(content: dict[str, Any], scratch: Path, results: Path) -> None:
    """The two files, whole at every moment, and their copies."""
    name = report.file_name(content)
    page = report.markdown(content)
    for suffix, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", page)):
        with replaced_file(results / f"{name}.{suffix}") as file:
            file.write(text.encode())
    out = os.environ.get("OUT")
    if out and not content["dry"]:
        Path(out).mkdir(parents=True, exist_ok=True)
        for suffix in ("json", "md"):
            shutil.copy(results / f"{name}.{suffix}", out)
        with (Path(out) / f"{name}.log").open("wb") as log:
            for part in sorted(scratch.glob("*.log"), key=lambda path: path.stat().st_mtime):
                log.write(f"\n==== {part.stem}\n".encode() + part.read_bytes()[-1_000_000:])


if __name__ == "__main__":
    main()
