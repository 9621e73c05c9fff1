"""Fuzz for a time: `python -m tests.fuzz --seconds 3600`, or `make fuzz`.

Each target runs in a process of its own, so that a crash or a hang is counted and the rest goes on. What fails is
printed with the command that repeats it. Ends with 1 if anything failed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.targets import TARGETS
from fuzz.worker import Worker, rng_of

REPORT = Path("build/fuzz.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz chargpt with input from a seed.")
    parser.add_argument("--seconds", type=float, default=3600, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all input (default: the time)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS], help="(default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="N", help="try piece N of each target here, with its traceback")
    arguments = parser.parse_args()
    if arguments.only is not None:
        for target in arguments.targets:
            with tempfile.TemporaryDirectory(prefix="chargpt-fuzz-") as folder:
                print(target, TARGETS[target](Path(folder)).once(rng_of(arguments.seed, target, arguments.only)))
        return
    waiting, working, ended = list(arguments.targets), [], []
    each = arguments.seconds * min(arguments.jobs, len(waiting)) / len(waiting)
    start = time.monotonic()
    while waiting or working:
        while waiting and len(working) < arguments.jobs:
            working.append(Worker(waiting.pop(0), arguments.seed, 0, time.monotonic() + each))
        time.sleep(0.2)
        for worker in [*working]:
            worker.look()
            if worker.done:
                working.remove(worker)
                ended.append(worker)
                print(f"{worker.target}: {dict(worker.counts)}, {time.monotonic() - start:.0f} s", flush=True)
    failures = [failure for worker in ended for failure in worker.failures]
    REPORT.parent.mkdir(exist_ok=True)
    report = {
        "seed": arguments.seed,
        "counts": {worker.target: worker.counts for worker in ended},
        "failures": failures,
    }
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(f"seed {arguments.seed}: {len(failures)} failures; {REPORT} has all of it")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
