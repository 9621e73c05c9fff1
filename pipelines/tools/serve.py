"""Not a stage: `make serve`. The best model of the comparison, and the smallest beside it."""

import sys

from chargpt import cli
from chargpt.command import user_errors
from chargpt.errors import ConfigError
from pipelines.tools.published import compared_runs
from pipelines.train import MODELS


def best_and_smallest() -> list[str]:
    """VARIANT=RUN each, as `chargpt serve` takes them. Raises ConfigError when none is there."""
    runs = {name: row for name, row in compared_runs().items() if (MODELS / name).is_dir()}
    if not runs:
        raise ConfigError(f"{MODELS}/ has no model of the comparison; train them with make repro")
    best = min(runs, key=lambda name: runs[name]["val_full"])
    smallest = min(runs, key=lambda name: runs[name]["parameters"])
    return [f"{runs[name]['variant']}={MODELS / name}" for name in dict.fromkeys((best, smallest))]


if __name__ == "__main__":
    with user_errors():
        models = best_and_smallest()
    cli.main(["serve", *models, *sys.argv[1:]])
