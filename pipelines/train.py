"""Stage train: one variant with one seed, its best checkpoint in models/ and its numbers in reports/runs/.

The one idea to know: work in progress lies in checkpoints/, which is no output of DVC, so a run that was killed goes
on from there; its folder is named after everything that decides the result, so an edited variant starts anew.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
from pathlib import Path

from chargpt.command import user_errors
from chargpt.errors import ConfigError
from pipelines.split import SPLITS
from pipelines.workspace import borrow_native_module

RUNS = Path("checkpoints")
MODELS = Path("models")
REPORTS = Path("reports/runs")
MOMENTS = 20  # that are kept of each run; a curve interpolates between them
TIMINGS = Path("reports/timing.json")  # seconds of training up to each point of the curve, by run; no output of DVC


def main() -> None:
    borrow_native_module()
    from chargpt import experiment
    from chargpt.checkpoint import export_checkpoint
    from chargpt.config import flatten, load_params
    from chargpt.data import load_splits
    from chargpt.errors import nearest
    from chargpt.tracking import TIMING
    from chargpt.training import Run

    parser = argparse.ArgumentParser(description="Train one variant of params.yaml with one seed.")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    params = load_params()
    if arguments.variant not in params.variants:
        hint = nearest(arguments.variant, params.variants)
        raise ConfigError(f"params.yaml: `variants` does not define {arguments.variant!r}{hint}")
    config = params.variants[arguments.variant]
    splits = load_splits(SPLITS)

    name = f"{arguments.variant}-s{arguments.seed}"
    identity = json.dumps([flatten(config), flatten(params.evaluation), splits.fingerprint], sort_keys=True)
    folder = RUNS / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if not (folder / "metrics.json").exists():  # it exists where only the lines below were cut short
        corpus = params.corpus.path or params.corpus.name
        run = Run(arguments.variant, arguments.seed, config, splits, corpus, folder, home=MODELS / name)
        experiment.train(run, params.evaluation, params.tracking)

    export_checkpoint(folder / "best", MODELS / name)
    (REPORTS / name).mkdir(parents=True, exist_ok=True)
    for file in ("metrics.json", "curve.csv"):
        shutil.copy(folder / file, REPORTS / name / file)
    record_timing(name, folder / TIMING)
    shutil.rmtree(folder)
    metrics = json.loads((REPORTS / name / "metrics.json").read_text(encoding="utf-8"))
    print(f"train: {name}, validation loss {metrics['val_full']:.4f} nats per token → {MODELS / name}")


def record_timing(name: str, source: Path) -> None:
    """Put the seconds of a run into TIMINGS, where they make no result differ, in place of what it says of this run."""
    from chargpt.files import replaced_file
    from chargpt.tracking import read_timing

    moments = read_timing(source)
    TIMINGS.parent.mkdir(parents=True, exist_ok=True)
    with (TIMINGS.parent / ".timing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # stages may run at the same time
        known = recorded_times()
        steps = sorted(moments)
        kept = {steps[n * (len(steps) - 1) // MOMENTS] for n in range(MOMENTS + 1)} if steps else set()
        known[name] = {step: round(moments[step].seconds, 3) for step in sorted(kept)}
        with replaced_file(TIMINGS) as file:
            file.write(json.dumps(known, sort_keys=True).replace("}, ", "},\n").encode() + b"\n")


def recorded_times() -> dict[str, dict[int, float]]:
    """Seconds of training by step, by run, as far as TIMINGS has them."""
    try:
        content = json.loads(TIMINGS.read_text(encoding="utf-8"))
        return {name: {int(step): float(at) for step, at in times.items()} for name, times in content.items()}
    except (OSError, ValueError, AttributeError):  # times decide nothing: without them a page shows dashes
        return {}


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
