"""Tiny training runs for the tests of training: made in milliseconds, compared bit by bit, killed at chosen moments.

A moment is a training step or an operation on a file below the run's folder, so "killed at moment n" for every n is
"killed anywhere". Children come from a fork server that has torch loaded already.
"""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from chargpt import experiment
from chargpt.checkpoint import read_description
from chargpt.config import (
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    override,
)
from chargpt.data import Splits, split_tokens
from chargpt.tokenizers import build_tokenizer
from chargpt.tracking import Point
from chargpt.training import Run, trainer

EVALUATION = EvaluationConfig(nanogpt_batches=2, sliding_stride=4)
BASE = TrainConfig(
    max_steps=20,
    batch_size=4,
    optimizer=OptimizerConfig(learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=3),
    eval_interval=6,
    log_interval=4,  # not a divisor of eval_interval: points of the curve straddle checkpoints
    device="cpu",
    precision="fp32",
    compile="never",
    backend="torch",
)
BIGRAM = override(BASE, ["model.kind=bigram", "model.block_size=8"])
TRANSFORMER = override(
    BASE, ["model.block_size=8", "model.n_layer=1", "model.n_head=2", "model.n_embd=8", "model.dropout=0.2"]
)
# Every part that has a state of its own, each in company of others.
CASES = {
    "bigram-adamw-epoch": BIGRAM,
    "bigram-random-ema": override(BIGRAM, ["order=random", "ema_decay=0.9"]),
    "transformer-adamw-random-accumulated-ema": override(
        TRANSFORMER, ["order=random", "gradient_accumulation_steps=3", "ema_decay=0.9"]
    ),
    "transformer-patience-part": override(
        TRANSFORMER, ["max_steps=60", "eval_interval=2", "optimizer.learning_rate=0.3", "patience=4", "eval_tokens=150"]
    ),
    "transformer-muon-epoch": override(TRANSFORMER, ["optimizer.kind=muon", "schedule.kind=wsd", "grad_clip=null"]),
    "transformer-muon-random-ema": override(
        TRANSFORMER, ["optimizer.kind=muon", "order=random", "ema_decay=0.8", "model.tied_head=false"]
    ),
}


def words(length: int = 3000, seed: int = 0) -> str:
    """A text of random words, emoji and Cyrillic among them: `length` characters."""
    rng = random.Random(seed)
    vocabulary = ["to", "be", "or", "not", "that", "is", "the", "question", "мир", "🙂🙃", "\n"]
    return " ".join(rng.choice(vocabulary) for _ in range(length))[:length]


def splits_of(text: str) -> Splits:
    tokenizer = build_tokenizer(TokenizerConfig(), text)
    return split_tokens(tokenizer.encode(text), tokenizer, 0.1)


def make_run(
    folder: Path,
    config: TrainConfig = BIGRAM,
    text: str | None = None,
    seed: int = 1,
    teachers: tuple[Path, ...] = (),
) -> Run:
    return Run("tiny", seed, config, splits_of(words() if text is None else text), "words", folder, teachers)


def train(
    folder: Path,
    config: TrainConfig = BIGRAM,
    text: str | None = None,
    seed: int = 1,
    teachers: tuple[Path, ...] = (),
) -> dict[str, Any]:
    with one_thread():
        run = make_run(folder, config, text, seed, teachers)
        return experiment.train(run, EVALUATION, TrackingConfig(enabled=False))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The sums here are too short to share, and the number of threads decides how they round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def result(folder: Path) -> dict[str, Any]:
    """All that a run ends with, except times: equal for two runs exactly when they ended with the same bits."""
    found: dict[str, Any] = {
        name: (folder / name).read_bytes() for name in ("sample.txt", "curve.csv", "metrics.json", "config.yaml")
    }
    for name in ("best", "last"):
        found[name, "model"] = (folder / name / "model.safetensors").read_bytes()
        found[name, "state"] = (folder / name / "state.safetensors").read_bytes()
        found[name, "curve"] = curve(folder / name)
        found[name, "at"] = [read_description(folder / name)["training"][key] for key in ("step", "best")]
    return found


def curve(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    """The history of a checkpoint."""
    return [(step, metrics) for step, metrics in read_description(checkpoint)["training"]["history"]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


# -------------------------------------------------------------------------------------------------------------- moments


class Moments:
    """Counts the moments of runs below `folder` and calls `at` with each number and what happens there.

    Audit hooks cannot be taken away again, so one hook serves all, and `close` disarms it.
    """

    _armed: "Moments | None" = None
    _hooked = False

    def __init__(self, folder: Path, at: Callable[[int, str], None]) -> None:
        self.folder, self.at, self.count = str(folder), at, 0
        self._step = trainer.training_step

    def __enter__(self) -> "Moments":
        def step(*arguments: Any) -> Any:
            self.pass_moment("step")
            return self._step(*arguments)

        trainer.training_step = step
        Moments._armed = self
        if not Moments._hooked:
            sys.addaudithook(Moments._hook)
            Moments._hooked = True
        return self

    def __exit__(self, *_: object) -> None:
        Moments._armed = None
        trainer.training_step = self._step

    def pass_moment(self, what: str) -> None:
        self.count += 1
        self.at(self.count, what)

    @staticmethod
    def _hook(event: str, arguments: tuple[Any, ...]) -> None:
        armed = Moments._armed
        if armed is None or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"):
            return
        path = arguments[1] if event == "os.symlink" else arguments[0]
        writing = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(armed.folder) and writing:
            armed.pass_moment(event)


def count_moments(folder: Path, config: TrainConfig) -> int:
    """Moments of a run that nothing disturbs; trains it in `folder`."""
    with Moments(folder, lambda number, what: None) as moments:
        train(folder, config)
    return moments.count


def disk_full(first: int) -> Callable[[int, str], None]:
    """From moment `first` on nothing can be written; deleting and training still work."""

    def at(number: int, what: str) -> None:
        if number >= first and what in ("open", "os.mkdir", "os.symlink"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return at


class FakeTracker:
    """What a tracker was told."""

    url = None

    def __init__(self) -> None:
        self.histories: list[list[int]] = []  # steps
        self.finished: list[str] = []
        self.model: dict[str, bytes] = {}  # files of the model that was handed over
        self.summary: dict[str, float] = {}
        self.tags: dict[str, str] = {}
        self.artifacts: list[str] = []
        self.points: list[Point] = []

    def log(self, history: Sequence[Point]) -> None:
        self.points = list(history)
        self.histories.append([point.step for point in history])

    def finish(
        self,
        status: str,
        summary: dict[str, float] | None = None,
        tags: dict[str, str] | None = None,
        artifacts: Sequence[Path] = (),
        model: Path | None = None,
    ) -> None:
        self.finished.append(status)
        self.summary, self.tags = summary or {}, tags or {}
        self.artifacts = [path.name for path in artifacts if path.exists()]
        self.model = {path.name: path.read_bytes() for path in model.iterdir()} if model else {}


# ------------------------------------------------------------------------------------------------------------ processes

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["chargpt.experiment", "pytest"])


def in_process(folder: Path, config: TrainConfig, kill_at: int | None = None) -> int:
    """Train in a process of its own, killed at a moment if one is given; the exit code (−9 when it was killed)."""
    process = _processes.Process(target=_child, args=(folder, config, kill_at))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def _child(folder: Path, config: TrainConfig, kill_at: int | None) -> None:
    def at(number: int, what: str) -> None:
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with Moments(folder, at):
        train(folder, config)


def signals_at(folder: Path, at: dict[int, list[int]]) -> Moments:
    """Sends signals to this process as the numbered training steps begin."""
    steps = iter(range(1, 10_000))

    def moment(number: int, what: str) -> None:
        if what == "step":
            for signal_number in at.get(next(steps), []):
                os.kill(os.getpid(), signal_number)

    return Moments(folder, moment)
