"""Build, prove, measure: the steps of the suite within ten minutes, and a page about what came of them.

Run as `make gpu`, or `python3 -m benchmarks.gpu`. The steps, in this order unless --steps says otherwise:

  build          the native modules for this GPU, or carried ones
  smoke          one check for each path through the kernels
  shapes         this project's attention and cross-entropy against torch's, with and without dropout; ceilings
  step           a training step of the 10.65 M model, eager and compiled, and what it is bound by
  cases          every check
  generation     tokens a second, eager and as one graph a token
  grid           attention over a grid of shapes
  cross_entropy  cross-entropy over vocabularies
  counters       the hardware's counters of our kernels (ncu)
  memcheck       compute-sanitizer
  racecheck
  time_to_loss   training to a validation loss of 1.47

The first four within 180 seconds say whether the kernels are right, how fast they are, and what bounds a step:
`python3 -m benchmarks.gpu --steps smoke,shapes,step --seconds 180`. Results of a former run on the same card stay; a
step that runs again replaces its own.

Writes benchmarks/results/gpu-<device>.json and .md, and copies of them and of the log into $OUT where that is set, all
of them every few seconds. The exit code is 1 when a step failed; a goal that was missed is no failure.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import proven, report
from benchmarks.gpu.build import KERNELS, fingerprint
from benchmarks.gpu.program import BROKEN
from chargpt.files import replaced_file

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 570  # for everything
PATIENCE_DRY = 6  # times as much on a dry run, on a machine with two cores perhaps
OFTEN = 4.0  # seconds between two looks at what running steps have found
MARGIN = 4  # seconds between the deadline that a step is told and the one at which it is ended
MODULE = "benchmarks.gpu"
MOST_RESTARTS = 8  # of a step that lost its CUDA context; each leaves out a contender in a case, or a check


@dataclass(frozen=True)
class Step:
    name: str
    module: str
    budget: float  # seconds
    options: tuple[str, ...] = ()
    light: bool = False  # takes little of the GPU, so that what later steps need may be compiled beside it
    compiles: bool = False  # can compile ahead what it will need
    kept: bool = True  # whether its results are; if not, it may fail


STEPS = (
    Step("build", "build", 90),
    Step("smoke", "cases", 40, ("--smoke",), light=True),
    Step("shapes", "shapes", 55, compiles=True),
    Step("step", "training_step", 120, compiles=True),
    Step("cases", "cases", 150, light=True),
    Step("generation", "generation", 45),
    Step("grid", "attention", 80, compiles=True),
    Step("cross_entropy", "cross_entropy", 40, compiles=True),
    Step("counters", "counters", 45),
    Step("memcheck", "sanitize", 45, ("--tool", "memcheck")),
    Step("racecheck", "sanitize", 35, ("--tool", "racecheck")),
    Step("time_to_loss", "time_to_loss", 80, compiles=True),
)


def main() -> None:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="walk through everything on the CPU; nothing is kept")
    parser.add_argument("--steps", help="which steps to run and in which order, e.g. smoke,shapes,step; build is first")
    parser.add_argument("--seconds", type=float, help=f"for everything (default {SECONDS}; more on a dry run)")
    parser.add_argument(
        "--prebuilt", metavar="FOLDER", help="native modules to use where they load, instead of building"
    )
    options = parser.parse_args()
    chosen = options.steps.split(",") if options.steps else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"there is no step {unknown[0]!r}; the steps are {', '.join(names)}")
    seconds = SECONDS * (PATIENCE_DRY if options.dry else 1) if options.seconds is None else options.seconds
    if seconds <= 0:
        parser.error(f"--seconds must be positive, got {seconds:g}")
    steps = [next(step for step in STEPS if step.name == name) for name in dict.fromkeys(["build", *chosen])]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        results = scratch / "results" if options.dry else RESULTS
        prebuilt = ("--prebuilt", options.prebuilt) if options.prebuilt else ()
        failed = run(plan(steps, options.dry, prebuilt), scratch, results, options.dry, seconds)
    if options.dry:
        print("a dry run: nothing was kept")
    else:
        proven.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def plan(steps: list[Step], dry: bool, prebuilt: tuple[str, ...] = ()) -> list[tuple[Step, list[Step]]]:
    """Each step, with its options, and what compiles beside it."""
    planned = []
    for number, step in enumerate(steps):
        options = (*step.options, *(prebuilt if step.module == "build" else ()), *(("--dry",) if dry else ()))
        beside = compiling(steps[number + 1 :]) if step.light and not dry else []
        budget = step.budget * (PATIENCE_DRY if dry else 1)
        planned.append((replace(step, options=options, budget=budget), beside))
    return planned


def compiling(later: list[Step]) -> list[Step]:
    """The compiling of what follows, as far as the next light step."""
    heavy = itertools.takewhile(lambda step: not step.light, later)
    return [
        Step(f"{step.name}, compiling", step.module, step.budget, (*step.options, "--warm"), kept=False)
        for step in heavy
        if step.compiles
    ]


def run(
    planned: list[tuple[Step, list[Step]]], scratch: Path, results: Path, dry: bool, seconds: float = SECONDS
) -> list[str]:
    """Run the steps one after the other, writing what is known all the while; the names of those that failed."""
    end = time.time() + seconds
    content: dict[str, Any] = {"dry": dry, "steps": {}}
    for number, (step, beside) in enumerate(planned):
        left = max(0.0, end - time.time())
        to_come = sum(later.budget for later, _ in planned[number:])
        budget = min(max(each.budget for each in (step, *beside)), left * step.budget / to_come)
        print(f"{', '.join(each.name for each in (step, *beside))}: {budget:.0f} s at most", flush=True)
        running = [Running(each, scratch, time.time() + budget) for each in (step, *beside)]
        looked = time.time()
        try:
            while running:
                time.sleep(0.1)
                for process in [process for process in running if process.ended()]:
                    running.remove(process)
                    print(f"  {process.step.name}: {process.status} after {process.seconds:.0f} s", flush=True)
                    if process.status != "done":
                        print("    " + "\n    ".join(process.last_lines()), flush=True)
                    take(process, content, budget)
                    content = write(content, scratch, results)
                # The first step tells which card this is, after which the files are named.
                if running and number > 0 and time.time() - looked > OFTEN:
                    for process in running:
                        take(process, content, budget)
                    content = write(content, scratch, results)
                    looked = time.time()
        finally:
            for process in running:  # after Ctrl-C
                process.kill()
    print("\n" + report.markdown(content))
    return [step.name for step, _ in planned if content["steps"][step.name]["status"] != "done"]


def take(process: "Running", content: dict[str, Any], budget: float) -> None:
    """Put into `content` how a step goes, or ended, and what it has found."""
    name = process.step.name
    if not process.step.kept:
        return
    content["steps"][name] = {
        "budget": round(budget),
        "status": process.status,
        "seconds": round(process.seconds, 1),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sources": fingerprint(KERNELS),
        "torch": torch.__version__,
    }
    content.pop(name, None)
    with contextlib.suppress(FileNotFoundError):
        content[name] = json.loads(process.result.read_text(encoding="utf-8"))


class Running:
    """A step's process, with everything that it starts in a group of its own."""

    def __init__(self, step: Step, scratch: Path, deadline: float) -> None:
        self.step, self.deadline, self.started = step, deadline, time.time()
        self.status = "running"
        self.restarts = 0
        self.log = scratch / f"{step.name}.log"
        self.result = scratch / f"{step.name}.json"
        command = [sys.executable, "-m", f"{MODULE}.{step.module}", *step.options, "--result", str(self.result)]
        self.command = [*command, "--deadline", str(deadline - MARGIN)]
        self._start()

    @property
    def seconds(self) -> float:
        return (self._end or time.time()) - self.started

    def _start(self) -> None:
        self._end = 0.0
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
        self._end = time.time()
        return True

    def kill(self) -> None:
        """End what is left of the step: it must not disturb the next."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]


def write(content: dict[str, Any], scratch: Path, results: Path) -> dict[str, Any]:
    """The two files, whole at every moment, and their copies. What a former run on this card found is kept."""
    name = report.file_name(content)
    content = merged(content, results / f"{name}.json")
    content["not run"] = [step.name for step in STEPS if step.name not in content["steps"]]
    try:
        page = report.markdown(content)
    except Exception:  # the numbers are worth more than their page, which the run's end tries again
        page = f"The page could not be made:\n\n{traceback.format_exc()}"
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
    return content


def merged(content: dict[str, Any], former: Path) -> dict[str, Any]:
    """`content`, with the steps of a former run that it does not have."""
    if not former.exists():
        return content
    old = json.loads(former.read_text(encoding="utf-8"))
    missing = [name for name in old["steps"] if name not in content["steps"]]
    found = {name: old[name] for name in missing if name in old}
    return content | found | {"steps": {name: old["steps"][name] for name in missing} | content["steps"]}


if __name__ == "__main__":
    main()
