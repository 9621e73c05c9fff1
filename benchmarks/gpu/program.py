"""What the programs of the suite share: their options, results kept on disk as they come, and fair timing.

The one idea to know: an illegal access breaks a process's CUDA context for good, and a kernel that hangs cannot be
stopped from inside. A program that meets one records who did it in which case and ends with the exit code BROKEN.
Started again with the same result file, it goes on without that contender in that case; what was measured stays.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import interleave, milliseconds, paired_ratio
from chargpt.errors import ConfigError
from chargpt.files import replaced_file
from chargpt.kernels import resolve

# While the GPU waits this many clock cycles, about a millisecond, the host queues up what is to be timed. Without it
# the time of small kernels would be the time that Python needs to launch them.
HEAD_START = 2_000_000

BROKEN = 3  # the exit code of a program that lost its CUDA context, or hung, and can go on in another process
MOST_FAULTS = 3  # of one contender, after which it is left out everywhere: each costs a restart
PATIENCE = 45.0  # seconds for a contender to compile and run twice, or for a case to be timed

Function = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of every contender in every round, and why others did not run."""

    times: dict[str, list[float]]
    refused: dict[str, str]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def best(self, names: Iterator[str] | list[str]) -> str | None:
        """The fastest of those of `names` that ran."""
        return min((name for name in names if name in self.times), key=self.median, default=None)

    def ratio(self, a: str, b: str) -> float:
        """By how much b is faster than a: the median over the rounds."""
        return paired_ratio(self.times, a, b)

    def summary(self) -> dict[str, Any]:
        """spread: the range of the middle half of the times, as a share of the median."""
        quartiles = {name: statistics.quantiles(column, n=4) for name, column in self.times.items()}
        return {
            "milliseconds": {name: self.median(name) for name in self.times},
            "spread": {name: (q[2] - q[0]) / self.median(name) for name, q in quartiles.items()},
            "rounds": min(map(len, self.times.values()), default=0),
            "refused": self.refused,
        }


class Program:
    """One step: a process with a deadline that measures case by case."""

    def __init__(self, description: str | None, arguments: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--result", type=Path, required=True, help="the JSON file to write, or to go on with")
        parser.add_argument("--deadline", type=float, default=float("inf"), help="in seconds since 1970")
        parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
        parser.add_argument("--warm", action="store_true", help="compile everything, time nothing")
        options = parser.parse_args(arguments)
        self.result: Path = options.result
        self.deadline: float = options.deadline
        self.dry: bool = options.dry
        self.warm: bool = options.warm
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.content: dict[str, Any] = {"measurements": [], "notes": {}, "broken": {}}
        if self.result.exists():
            self.content = json.loads(self.result.read_text(encoding="utf-8"))
        if self.dry:
            torch.set_num_threads(1)  # for work as small as this, and beside other programs
        self.late = 0  # how often the host needed longer to launch than HEAD_START
        if not self.dry:
            properties = torch.cuda.get_device_properties(self.device)
            self._flush = torch.zeros(properties.L2_cache_size // 2, dtype=torch.int32, device=self.device)
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._wake_up()

    def ours(self, operation: str, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
        """Our implementations for this device, and why others of them cannot run. The CPU's stand in on a dry run."""
        names, refused = [], {}
        for name in ("cpp", "torch") if self.dry else ("cuda", "triton"):
            try:
                resolve(operation, self.device, dtype, name)
                names.append(name)
            except ConfigError as error:
                refused[name] = str(error)
        return names, refused

    def time(
        self,
        case: str,
        functions: dict[str, Function],
        refused: dict[str, str],
        *,
        seconds: float,
        timer: Callable[[Function], float] | None = None,
        patience: float = PATIENCE,
    ) -> Times | None:
        """Let those of `functions` that run compete for about `seconds`; None where that is not wanted (any more).

        patience: seconds after which a contender, or the timing beyond `seconds`, counts as hung
        """
        if any(done["case"] == case for done in self.content["measurements"]):
            return None
        if self.over():
            self.record({"case": case, "skipped": "no time was left"})
            return None
        refused = dict(refused)
        working = {}
        for name, function in functions.items():
            if (fault := self._fault(name, case)) is not None:
                refused[name] = fault
            elif time.time() + seconds > self.deadline:
                refused[name] = "no time was left"
            elif (problem := self._attempt(name, case, function, patience)) is not None:
                refused[name] = problem
            else:
                working[name] = function
        if self.warm:
            return None
        try:
            hung = {"case": case, "skipped": f"had not ended {patience:g} s after its time"}
            with self._watched(seconds + patience, lambda: self.record(hung)):
                times = interleave(working, timer or self.milliseconds, 0 if self.dry else seconds) if working else {}
        except Exception as error:  # rare after two good calls, and there is no telling whose fault it was
            self.record({"case": case, "skipped": f"failed while it was timed: {_first_line(error)}"})
            self._stop_if_broken()
            return None
        return Times(times, refused)

    def milliseconds(self, function: Function) -> float:
        """What one call takes on the GPU, with nothing of its inputs in L2; by the host's clock on a dry run."""
        if not self.dry:
            self._flush.sum()  # reading, because lines that were written would be written back during the call
        return self.warm_milliseconds(function)

    def warm_milliseconds(self, function: Function) -> float:
        """What one call takes on the GPU right after another."""
        if self.dry:
            return milliseconds(function)
        torch.cuda._sleep(HEAD_START)
        self._start.record()
        launched = milliseconds(function)
        self._end.record()
        self._end.synchronize()
        self.late += launched > 1.0
        return self._start.elapsed_time(self._end)

    def over(self) -> bool:
        return time.time() > self.deadline

    def record(self, measurement: dict[str, Any]) -> None:
        """Keep a measurement, on disk too."""
        if not self.warm:
            self.content["measurements"].append(measurement)
            self.save()
            print(json.dumps(measurement), flush=True)

    def note(self, **notes: Any) -> None:
        """Keep something else that was found."""
        self.content["notes"] |= notes
        self.save()

    def save(self) -> None:
        save(self.result, self.content)

    def finish(self) -> None:
        """Note the clocks, read while the GPU is still warm."""
        self.note(clocks=None if self.dry else nvidia_smi(), launches_later_than_the_head_start=self.late)

    def _attempt(self, name: str, case: str, function: Function, patience: float) -> str | None:
        """Call it twice, which compiles and loads what it needs; the reason when that fails."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                blame = f"had not ended after {patience:g} s"
                with self._watched(patience, lambda: self._blame(name, case, blame)):
                    for _ in range(2):
                        function()
                    self.synchronize()
                return None
            except Exception as error:  # whatever a contender raises, the others go on
                reason = " ".join(dict.fromkeys(_first_line(text) for text in (error, *(w.message for w in caught))))
        self._stop_if_broken(name, case, f"broke the CUDA context: {reason}")
        if not self.dry:
            torch.cuda.empty_cache()
        return reason[:400]

    def _fault(self, name: str, case: str) -> str | None:
        """Why a contender must not run in a case: it broke or hung a former process there, or too often elsewhere."""
        faults = self.content["broken"].get(name, {})
        if case in faults:
            return str(faults[case])
        return f"left out after faults in {', '.join(faults)}" if len(faults) >= MOST_FAULTS else None

    def _blame(self, name: str, case: str, reason: str) -> None:
        self.content["broken"].setdefault(name, {})[case] = reason[:400]
        self.save()

    def _stop_if_broken(self, name: str = "", case: str = "", reason: str = "") -> None:
        """End this process, saying who is to be left out in which case, if the GPU does not answer any more."""
        try:
            self.synchronize()
        except RuntimeError:
            if name:
                self._blame(name, case, reason)
            sys.exit(BROKEN)

    @contextlib.contextmanager
    def _watched(self, seconds: float, say: Callable[[], object]) -> Iterator[None]:
        """Where the block takes longer: `say` who hung, and end the process, since nothing else stops a kernel."""

        def stop() -> None:
            say()
            os._exit(BROKEN)

        watchdog = threading.Timer(seconds, stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def _wake_up(self) -> None:
        """Half a second of work, after which the clocks are up."""
        x = torch.randn(4096, 4096, dtype=torch.bfloat16, device=self.device)
        started = time.perf_counter()
        while time.perf_counter() - started < 0.5:
            for _ in range(10):
                x @ x
            self.synchronize()


def save(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a kill, never meets half of it."""
    with replaced_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def nvidia_smi() -> dict[str, str] | None:
    """Clocks, temperature, power and driver as the driver's own tool tells them, where it is there."""
    fields = ["clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", f"--query-gpu={','.join([*fields, 'driver_version'])}", "--format=csv,noheader", "-i", "0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return dict(zip([*fields, "driver_version"], map(str.strip, answer.split(",")), strict=True))
    return None


def _first_line(text: object) -> str:
    return (str(text).strip() or type(text).__name__).splitlines()[0]
