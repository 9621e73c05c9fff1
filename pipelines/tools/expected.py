"""Not a stage: what `make repro` prints first. How long it will take here, by trying each run for a moment."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chargpt.command import user_errors
from pipelines.split import SPLITS
from pipelines.workspace import borrow_native_module

if TYPE_CHECKING:
    from chargpt.config import Params
    from chargpt.data import Splits

TINY_SHAKESPEARE = (1_003_854, 111_540, 65)  # tokens to train and to validate on, symbols: before it was downloaded
STAGE_SECONDS = 18.0  # around the training of a run: Python, torch, MLflow, DVC, the last scores and its sample
TRIAL_SECONDS = 1.0  # for each run


def main() -> None:
    borrow_native_module()
    from chargpt.config import load_params
    from chargpt.console import duration
    from chargpt.kernels import native

    params = load_params()
    wanted = [(variant, seed) for variant in params.ablation.variants for seed in params.ablation.seeds]
    changed = changed_stages()
    missing = [run for run in wanted if f"train@{run[0]}-{run[1]}" in changed]
    if not missing:
        return
    splits = _splits()
    each = {variant: run_seconds(params, variant, splits) for variant in dict.fromkeys(name for name, _ in missing)}
    total = sum(each[variant] for variant, _ in missing)
    longest = sorted(each, key=lambda variant: -each[variant])[:3]
    print(
        f"{len(missing)} of {len(wanted)} runs are to be trained, about {duration(total)} on this machine (of which "
        + ", ".join(f"{duration(each[name])} for each {name}" for name in longest)
        + ")"
    )
    module = native.load().module
    if module is None or not module.cpu_features()["avx512_bf16"]:
        print("this CPU has no instructions for bf16, with which the larger variants take less than half as long")
    print(
        "to shorten it, take variants or seeds off the lists under `ablation` in params.yaml; Ctrl-C stops, and the "
        "same command resumes",
        flush=True,
    )


def changed_stages() -> set[str]:
    """The stages that `dvc repro` would run."""
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)
    try:
        return set(json.loads(done.stdout))
    except ValueError:  # DVC will say itself what is wrong
        return set()


def run_seconds(params: "Params", variant: str, splits: "Splits") -> float:
    """Seconds that a run of a variant will take here, evaluations included, by its speed over a moment."""
    from chargpt.training import Run, measure_speed

    config = params.variants[variant]
    speed = measure_speed(Run(variant, 1, config, splits, "", Path("unused")), TRIAL_SECONDS)
    evaluations = 2 + config.max_steps // config.eval_interval  # and one by `full` at the end
    scored = min(len(splits.val), config.eval_tokens or len(splits.val)) * evaluations
    block_size, stride = config.model.block_size, min(config.model.block_size, params.evaluation.sliding_stride)
    scored += (
        len(splits.val) * block_size // stride + params.evaluation.nanogpt_batches * config.batch_size * block_size
    )
    training = config.max_steps * config.tokens_per_step / speed.training
    return STAGE_SECONDS + training + scored / speed.evaluation


def _splits() -> "Splits":
    """Tokens of the right number, whatever they say: the split text's, or Tiny Shakespeare's before it is there."""
    import numpy as np

    from chargpt.data import MANIFEST, Splits, load_splits
    from chargpt.tokenizers import CharacterTokenizer

    if (SPLITS / MANIFEST).exists():
        return load_splits(SPLITS)
    n_train, n_val, V = TINY_SHAKESPEARE
    ids = np.random.default_rng(1).integers(V, size=n_train + n_val, dtype=np.uint8)
    return Splits(ids[:n_train], ids[n_train:], CharacterTokenizer([chr(32 + i) for i in range(V)]))


if __name__ == "__main__":
    with user_errors():
        main()
