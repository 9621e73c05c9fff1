"""Seconds of training until the 10.65 M model's validation loss on Tiny Shakespeare first is at most 1.47.

nanoGPT reports 1.4697 for this configuration. The loss is `full` of `chargpt.evaluation`, after every 125 steps; the
seconds are those of the steps alone, after compiling.
"""

import math
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.program import Program
from benchmarks.gpu.training import TORCH, candidates, setup
from chargpt.data import Batches, Splits, build_batches, split_tokens
from chargpt.evaluation import full_loss
from chargpt.models import LanguageModel
from chargpt.runtime import Runtime
from chargpt.tokenizers import CharacterTokenizer
from chargpt.training import training_step
from chargpt.training.optim import learning_rate_scale, set_learning_rate

CORPUS = Path("data/raw/corpus.txt")
TITLE = "First Citizen:"  # how Tiny Shakespeare begins
GOAL = 1.47
# nanoGPT's schedule is twice as long, but its loss is lowest at about step 2000. Reasoned, not measured.
MAX_STEPS, INTERVAL = 2500, 125


def main() -> None:
    program = Program(__doc__)
    splits = dry_splits() if program.dry else shakespeare()
    names, refused = candidates(program)
    program.note(refused=refused, goal=GOAL)
    if isinstance(splits, str):
        program.record({"case": "all", "skipped": splits})
    else:
        runs = [*names[:1], TORCH, *names[1:]]  # ours and torch's, in case that time runs out
        for number, kernels in enumerate(runs):
            left = program.deadline - time.time()
            record(program, splits, kernels, time.time() + left / (len(runs) - number))
    program.finish()


def shakespeare() -> Splits | str:
    """The text that the pipeline downloaded, split as in the lecture; or why it cannot be used."""
    if not CORPUS.exists():
        return f"{CORPUS} is not here; `make repro` downloads it"
    text = CORPUS.read_text(encoding="utf-8")
    if not text.startswith(TITLE):
        return f"{CORPUS} is not Tiny Shakespeare"
    tokenizer = CharacterTokenizer(text)
    return split_tokens(tokenizer.encode(text), tokenizer, 0.1)


def dry_splits() -> Splits:
    text = "to be, or not to be, that is the question: " * 20
    tokenizer = CharacterTokenizer(text)
    return split_tokens(tokenizer.encode(text), tokenizer, 0.1)


def record(program: Program, splits: Splits, kernels: str, deadline: float) -> None:
    if any(done["case"] == kernels for done in program.content["measurements"]):
        return
    try:
        program.record({"case": kernels, **train(program, splits, kernels, deadline)})
    except Exception as error:  # whatever a contender raises, the others go on
        program.record({"case": kernels, "skipped": f"{type(error).__name__}: {error}"[:400]})


def train(program: Program, splits: Splits, kernels: str, deadline: float) -> dict[str, Any]:
    """Train compiled until the goal, the last step or the deadline. The curve: (steps, seconds, validation loss)."""
    steps, interval = (4, 2) if program.dry else (MAX_STEPS, INTERVAL)
    vocabulary = splits.tokenizer.vocab_size
    network, called, optimizers, config, runtime = setup(program, kernels, True, vocabulary, steps)
    batches = build_batches("random", splits.train, config.batch_size, config.model.block_size, seed=3)
    compile_seconds = _compile(program, called, batches, runtime)
    curve: list[tuple[int, float, float]] = []
    seconds = 0.0
    for step in range(0, 0 if program.warm else steps, interval):
        started = time.perf_counter()
        for s in range(step, min(step + interval, steps)):
            warmup = min(config.schedule.warmup_steps, steps - 1)
            progress = min(max((s - warmup) / (steps - warmup), 0.0), 1.0)
            set_learning_rate(optimizers, learning_rate_scale(config.schedule, s, progress))
            training_step(called, optimizers, batches, config, runtime)
        program.synchronize()
        seconds += time.perf_counter() - started
        with runtime.autocast():
            curve.append((s + 1, seconds, full_loss(network, splits.val_with_context, program.device)))
        if curve[-1][2] <= GOAL or not math.isfinite(curve[-1][2]) or time.time() > deadline:
            break
    reached = bool(curve) and curve[-1][2] <= GOAL
    return {
        "reached": reached,
        "seconds": seconds if reached else None,
        "best": min((loss for *_, loss in curve), default=None),
        "compile_seconds": compile_seconds,
        "curve": curve,
    }


def _compile(program: Program, called: LanguageModel, batches: Batches, runtime: Runtime) -> float:
    """Both passes once, without a step of the optimizer: the weights stay as they were."""
    position = batches.state_dict()
    started = time.perf_counter()
    idx, targets = (x.to(program.device) for x in batches.next())
    with runtime.autocast():
        loss = called(idx, targets)
    loss.backward()
    program.synchronize()
    for parameter in called.parameters():
        parameter.grad = None
    batches.load_state_dict(position)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
