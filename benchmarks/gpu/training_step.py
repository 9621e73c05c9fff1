"""Whole training steps of the 10.65 M model, batch 64 × 256, bfloat16: tokens per second on each implementation.

From batch to optimizer, as `chargpt.training` makes them, by the host's clock. Against the same model on torch's
scaled_dot_product_attention and F.cross_entropy, all of them eager and under torch.compile. Tokens are random: they
change no amount of work.
"""

from functools import partial

import numpy as np

from benchmarks.gpu.program import Function, Program
from benchmarks.gpu.training import TORCH, candidates, setup
from benchmarks.harness import milliseconds
from chargpt.data import RandomBatches
from chargpt.training import training_step

VOCABULARY = 65


def main() -> None:
    program = Program(__doc__)
    names, refused = candidates(program)
    contenders = [*names[:1], TORCH, *names[1:]]  # what `auto` takes and torch's, in case that time runs out
    measure(program, list(dict.fromkeys([*contenders, "torch"])), [], refused)  # torch: the reference, for the record
    measure(program, [TORCH], contenders, refused)
    program.finish()


def measure(program: Program, eager: list[str], compiled: list[str], refused: dict[str, str]) -> None:
    steps = 1 if program.dry else 10  # in one sample, so that waiting for the GPU at its end weighs little
    variants = {name: samples(program, name, False, steps) for name in eager}
    variants |= {f"{name} compiled": samples(program, name, True, steps) for name in compiled}

    def per_step(sample: Function) -> float:
        program.synchronize()
        return milliseconds(sample) / steps

    case = "compiled" if compiled else "eager"
    times = program.time(case, variants, refused, seconds=15, timer=per_step)
    if times is not None:
        tokens = 4 * 16 if program.dry else 64 * 256
        baselines = [name for name in times.times if name.startswith(TORCH)]
        program.record(
            {
                "case": case,
                **times.summary(),
                "tokens_per_second": {name: 1e3 * tokens / times.median(name) for name in times.times},
                "ratio": {
                    name: {other: times.ratio(other, name) for other in baselines}
                    for name in times.times
                    if name not in baselines
                },
            }
        )


def samples(program: Program, kernels: str, compiled: bool, steps: int) -> Function:
    """A function that makes `steps` training steps and waits for the GPU to finish them."""
    _, called, optimizers, config, runtime = setup(program, kernels, compiled, VOCABULARY, max_steps=1)
    tokens = np.random.default_rng(2).integers(VOCABULARY, size=1_000_000, dtype=np.uint8)
    batches = RandomBatches(tokens, config.batch_size, config.model.block_size, seed=3)
    step = partial(training_step, called, optimizers, batches, config, runtime)

    def sample() -> None:
        for _ in range(steps):
            step()
        program.synchronize()

    return sample


if __name__ == "__main__":
    main()
