"""When each step of a run was done: seconds of training, without evaluations and checkpoints.

The one idea to know: time lies in a file of its own, timing.csv in the run's folder. Everything else that a run leaves
is a function of its config, and two runs of one config can be compared byte by byte.
"""

import contextlib
import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from chargpt.files import replaced_file, sweep
from chargpt.tracking.base import Point
from chargpt.training import Evaluated, Event, Saved, Saving, Started, Stepped
from chargpt.training import Point as TrainingPoint

TIMING = "timing.csv"  # step, seconds, time


class Moment(NamedTuple):
    seconds: float  # of training, up to the end of this step
    time: float  # seconds since the epoch


class Timing:
    """Listens to a trainer and keeps the moments of its steps, over all resumes of a run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / TIMING
        self.moments: dict[int, Moment] = {}  # by step
        self.seconds = 0.0
        self.tokens_per_second = float("nan")  # between the last two points of the training curve

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                sweep(self.path)
                self.moments = {step: at for step, at in read_timing(self.path).items() if step <= event.step}
                self.seconds = max((moment.seconds for moment in self.moments.values()), default=0.0)
                self._logged = self.seconds
                self._clock = time.perf_counter()
            case Stepped():
                self._tick(event.step)
                self.tokens_per_second = event.tokens / max(self.seconds - self._logged, 1e-9)
                self._logged = self.seconds
            case Evaluated():
                self._clock = time.perf_counter()  # an evaluation is no training
            case Saving():
                self._tick(event.step)
                self._write()
            case Saved():
                self._clock = time.perf_counter()

    def stamped(self, history: Sequence[TrainingPoint]) -> list[Point]:
        """The curve with the time of each point, the seconds of training up to it, and tokens per second."""
        stamped, before = [], (0.0, 0.0)  # tokens and seconds of the last point of the training curve
        for point in history:
            moment = self.moments.get(point.step, Moment(self.seconds, time.time()))  # timing.csv was deleted
            kind = "train" if "train/loss" in point.metrics else "val"
            metrics = point.metrics | {f"{kind}/seconds": moment.seconds}
            if kind == "train":
                now = (metrics["train/tokens"], moment.seconds)
                if now[1] > before[1]:
                    metrics["perf/tokens_per_second"] = (now[0] - before[0]) / (now[1] - before[1])
                before = now
            stamped.append(Point(point.step, moment.time, metrics))
        return stamped

    def _tick(self, step: int) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        self.moments[step] = Moment(self.seconds, time.time())

    def _write(self) -> None:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["step", *Moment._fields])
        lines.writerows((step, f"{at.seconds:.6g}", f"{at.time:.3f}") for step, at in sorted(self.moments.items()))
        with replaced_file(self.path) as file:
            file.write(text.getvalue().encode())


def read_timing(path: Path) -> dict[int, Moment]:
    """The moments of a timing.csv by step; none where there is no such file, or where it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open(encoding="utf-8", newline="") as file:
        return {int(row["step"]): Moment(float(row["seconds"]), float(row["time"])) for row in csv.DictReader(file)}
    return {}
