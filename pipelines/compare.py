"""Stage compare: every variant and seed of params.yaml side by side, as a page, Markdown, JSON and a picture.

The list comes from params.yaml and not from the disk, so a variant that was dropped there vanishes here.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chargpt.command import user_errors
from chargpt.errors import TrainingError
from pipelines.download import CORPUS
from pipelines.sample import SAMPLES
from pipelines.train import REPORTS, recorded_times

TABLE = Path("reports/comparison.md")
METRICS = Path("reports/comparison.json")
PICTURE = Path("reports/curves.png")
CURVES = Path("reports/curves.csv")
PAGE = Path("reports/index.html")


def main() -> None:
    from chargpt import report
    from chargpt.config import load_params
    from chargpt.files import replaced_file
    from chargpt.report import Provenance, Variant, render
    from chargpt.tracking import code_state, register_champion

    params = load_params()
    seeds = params.ablation.seeds
    folders = {name: [REPORTS / f"{name}-s{seed}" for seed in seeds] for name in params.ablation.variants}
    times = recorded_times()
    variants = []
    for name in folders:
        settings, sample = _sample(name)
        seconds = [times.get(run.name, {}) for run in folders[name]]
        variants.append(
            Variant(
                name=name,
                rows=[report.timed(_metrics(run), at) for run, at in zip(folders[name], seconds, strict=True)],
                curves=[
                    report.read_curve(run / "curve.csv", at) for run, at in zip(folders[name], seconds, strict=True)
                ],
                sample=sample,
                sample_settings=settings,
                command=" ".join(["dvc repro", *(f"train@{name}-{seed}" for seed in seeds)]),
            )
        )
    rows = [row for variant in variants for row in variant.rows]

    git = code_state()
    provenance = Provenance(
        corpus=params.corpus.path or params.corpus.name,
        corpus_sha256=hashlib.sha256(CORPUS.read_bytes()).hexdigest(),
        commit=None if git is None else git.commit,
        dirty=git is not None and git.dirty,
        made=datetime.now(UTC),
    )
    the_lectures_data = (
        provenance.corpus_sha256 == report.TINY_SHAKESPEARE_SHA256
        and params.tokenizer.kind == "character"
        and params.split.val_fraction == 0.1
    )
    published = report.PUBLISHED if the_lectures_data else {}
    references = report.COUNTS if the_lectures_data else {}

    contents = {
        PAGE: render(variants, provenance, published, references),
        TABLE: report.comparison_table(rows, published) + "\n",
        METRICS: json.dumps(report.comparison_metrics(rows), indent=1) + "\n",
        CURVES: report.evaluations_csv(
            [(v.name, row["seed"], curve) for v in variants for row, curve in zip(v.rows, v.curves, strict=True)]
        ),
    }
    for path, content in contents.items():
        with replaced_file(path) as file:
            file.write(content.encode())
    report.plot_curves({variant.name: variant.curves for variant in variants}, PICTURE)
    print(f"compare: {len(rows)} runs of {len(variants)} variants → {PAGE}, {TABLE}, {METRICS}, {PICTURE}")
    if promoted := register_champion(params.tracking, rows):
        print(f"compare: {promoted}")


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise TrainingError(f"{folder} holds no finished run, which params.yaml asks for; run `dvc repro`") from None


def _sample(variant: str) -> tuple[str, str]:
    """The settings and the text of a variant's first sample; pipelines/sample.py puts a line before each."""
    heading, _, rest = (SAMPLES / f"{variant}.txt").read_text(encoding="utf-8").partition("\n\n")
    settings = heading.removeprefix(f"=== {variant}, ")
    return settings, rest.partition("\n\n=== ")[0].strip("\n")


if __name__ == "__main__":
    with user_errors():  # around the imports in main too: Ctrl-C while they load is an ordinary stop
        main()
