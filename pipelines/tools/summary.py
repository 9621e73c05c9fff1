"""Not a stage: what `make repro` prints when it is done. Where the results are, and what to type next."""

import json
from pathlib import Path

from chargpt.command import user_errors
from pipelines.compare import METRICS, PAGE, PICTURE, TABLE
from pipelines.sample import SAMPLES
from pipelines.tools.published import PUBLISHED, against_published, compared_runs
from pipelines.train import MODELS

LINES = 8  # of a sample


def main() -> None:
    from chargpt.config import load_params
    from chargpt.tracking import ui_url

    params = load_params()
    last = params.ablation.variants[-1]
    sample = (SAMPLES / f"{last}.txt").read_text(encoding="utf-8").split("\n")
    print(f"\n{TABLE.read_text(encoding='utf-8')}")
    print("\n".join(sample[: LINES + 2]), "\n…")
    if PUBLISHED.exists():
        published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
        print("\n" + "\n".join(against_published(compared_runs(), published)))
    print(f"\nreport    {PAGE} (open it in a browser), {TABLE}, {METRICS}, {PICTURE}")
    print(f"samples   {SAMPLES}/\nmodels    {MODELS}/")
    command = f'chargpt sample {MODELS}/{last}-s{params.ablation.seeds[0]} --prompt "ROMEO:" --stream'
    print(f"\nsample more:\n  {Path('.venv/bin') / command}")
    print("\nask it in the browser, and see what it thinks:\n  make serve")
    if params.tracking.enabled:
        runs, charts = (ui_url(params.tracking, view) for view in ("runs", "charts"))
        print(f"\nsee the runs in MLflow:\n  make ui\n  then open {runs}\n  or the curves, {charts}")


if __name__ == "__main__":
    with user_errors():
        main()
