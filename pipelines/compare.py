"""Stage compare: every variant and seed of params.yaml side by side, as Markdown, JSON and a picture.

The list comes from params.yaml and not from the disk, so a variant that was dropped there vanishes here.
"""

import json
from pathlib import Path

from chargpt.errors import user_errors
from pipelines.train import REPORTS

TABLE = Path("reports/comparison.md")
ROWS = Path("reports/comparison.json")
PICTURE = Path("reports/curves.png")


def main() -> None:
    from chargpt.comparison import comparison_table, plot_curves
    from chargpt.config import load_params

    ablation = load_params().ablation
    folders = {variant: [REPORTS / f"{variant}-s{seed}" for seed in ablation.seeds] for variant in ablation.variants}
    rows = [
        json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for seeds in folders.values()
        for folder in seeds
    ]
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(comparison_table(rows) + "\n", encoding="utf-8")
    plot_curves({variant: [folder / "curve.csv" for folder in seeds] for variant, seeds in folders.items()}, PICTURE)
    print(f"compare: {len(rows)} runs of {len(folders)} variants → {TABLE}, {ROWS}, {PICTURE}")


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
