"""`chargpt compare`: any runs side by side."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chargpt.cli.parsing import Commands, command
from chargpt.errors import ChargptError, ConfigError

if TYPE_CHECKING:
    from chargpt.report import Variant

TITLE = b"<title>chargpt: "  # of every page, in its first lines

EXAMPLES = """examples:
  chargpt compare runs/my runs/my-6
  chargpt compare runs/* --page runs/comparison.html"""


def add(commands: Commands) -> None:
    compare = command(
        commands, "compare", run, EXAMPLES, "A table of finished runs, and with --page their curves and samples."
    )
    compare.add_argument("runs", metavar="run", type=Path, nargs="+", help="the folder of a finished run")
    compare.add_argument("--page", type=Path, help="also write a page to open in a browser (needs chargpt[pipeline])")


def run(arguments: argparse.Namespace) -> None:
    from chargpt.checkpoint import read_description
    from chargpt.report import comparison_table

    if arguments.page is not None:
        _require_page(arguments.page)
    variants = [_variant(folder) for folder in dict.fromkeys(arguments.runs)]
    print(comparison_table([row for variant in variants for row in variant.rows]))
    summaries = [read_description(folder)["summary"] for folder in arguments.runs]
    if len({summary["data"] for summary in summaries}) > 1:
        print("\nThese runs were not all validated on the same data, so their losses do not compare:")
        for folder, summary in zip(arguments.runs, summaries, strict=True):
            print(f"  {folder}: {summary['corpus']}, data {summary['data'][:12]}")
    if arguments.page is not None:
        _write_page(arguments.page, variants, sorted({str(summary["corpus"]) for summary in summaries}))
        print(f"\npage: {arguments.page}")


def _variant(folder: Path) -> "Variant":
    """A finished run under its folder's name. Raises ConfigError when the folder holds none."""
    from chargpt.experiment import METRICS, SAMPLE
    from chargpt.report import Variant, read_curve, timed
    from chargpt.tracking import CURVE, TIMING, read_timing

    try:
        row: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        sample = (folder / SAMPLE).read_text(encoding="utf-8")
        seconds = {step: moment.seconds for step, moment in read_timing(folder / TIMING).items()}
        row = timed(row | {"variant": folder.resolve().name}, seconds)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} holds no finished run (no {Path(str(error.filename)).name} in it); name folders that "
            f"`chargpt train` finished"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{folder} is damaged ({error}); leave it out, or train it again") from None
    return Variant(
        name=row["variant"],
        rows=[row],
        curves=[read_curve(folder / CURVE, seconds)],
        sample=sample,
        sample_settings="temperature 0.8",
        command=f"chargpt eval {folder}",
    )


def _require_page(path: Path) -> None:
    """Raise ConfigError when something lies at `path` that is no page of ours: it would be overwritten."""
    if not path.name:
        raise ConfigError(f"--page {path} names a folder; name a file in it, as in {path / 'comparison.html'}")
    if not os.path.lexists(path):
        return
    ours = False
    if path.is_file():
        with path.open("rb") as file:
            ours = TITLE in file.read(1000)
    if not ours:
        raise ConfigError(f"--page {path} exists and is no page that chargpt wrote; name another file")


def _write_page(path: Path, variants: "list[Variant]", corpora: list[str]) -> None:
    from datetime import UTC, datetime

    from chargpt.files import replaced_file
    from chargpt.report import Provenance, render
    from chargpt.tracking import code_state

    git = code_state()
    provenance = Provenance(
        corpus=", ".join(corpora),
        corpus_sha256=None,
        commit=None if git is None else git.commit,
        dirty=git is not None and git.dirty,
        made=datetime.now(UTC),
    )
    try:
        page = render(variants, provenance, published={}, references={})
    except ModuleNotFoundError as error:
        raise ChargptError(f"a page needs {error.name}, which `pip install 'chargpt[pipeline]'` brings") from None
    with replaced_file(path) as file:
        file.write(page.encode())
