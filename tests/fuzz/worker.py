"""The process of a fuzz target, and who starts it. Not in `__main__`, which a spawned process does not import."""

import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz.targets import TARGETS

HANG = 120  # seconds for one piece of input


def rng_of(seed: int, target: str, number: int) -> random.Random:
    return random.Random(f"{seed}/{target}/{number}")


def work(target: str, seed: int, first: int, deadline: float, pipe: Connection) -> None:
    """Tries pieces of input from number `first` on; says which one comes, and what became of it."""
    import torch

    silence = os.open(os.devnull, os.O_WRONLY)  # what commands and runs print would bury what failed
    for stream in (1, 2):
        os.dup2(silence, stream)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chargpt-fuzz-") as folder:
        made = TARGETS[target](Path(folder))
        number = first
        while time.monotonic() < deadline:
            pipe.send(number)
            torch.manual_seed(number)
            try:
                pipe.send(made.once(rng_of(seed, target, number)))
            except Exception:
                pipe.send(("traceback", traceback.format_exc()))
            number += 1
    pipe.send(None)


class Worker:
    """A target's process, started again after a crash or a hang."""

    def __init__(self, target: str, seed: int, first: int, deadline: float) -> None:
        self.target, self.seed, self.deadline = target, seed, deadline
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self._start(first)

    def _start(self, first: int) -> None:
        self.pipe, child = multiprocessing.get_context("spawn").Pipe()
        arguments = (self.target, self.seed, first, self.deadline, child)
        self.process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        self.process.start()
        child.close()
        self.number, self.since, self.done = first, time.monotonic(), False

    def look(self) -> None:
        """Take what the process has said so far."""
        try:
            while self.pipe.poll():
                said = self.pipe.recv()
                self.since = time.monotonic()
                if said is None:
                    self.done = True
                elif isinstance(said, int):
                    self.number = said
                elif isinstance(said, str):
                    self.counts[said] += 1
                else:
                    self._fail(*said)
        except EOFError:
            if not self.done:
                self.process.join()
                self._fail("crash", f"exit code {self.process.exitcode}")
                self._again()
        if not self.done and time.monotonic() - self.since > HANG:
            self.process.kill()
            self.process.join()
            self._fail("hang", f"no end after {HANG} s")
            self._again()

    def _again(self) -> None:
        if time.monotonic() < self.deadline:
            self._start(self.number + 1)
        else:
            self.done = True

    def _fail(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        again = f"python -m tests.fuzz --targets {self.target} --seed {self.seed} --only {self.number}"
        self.failures.append({"target": self.target, "kind": kind, "again": again, "what": what})
        print(f"{kind}: {again}\n{what}", flush=True)
