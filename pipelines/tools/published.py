"""Not a stage: whether the runs of the comparison are those that were published, bit for bit.

The one idea to know: a run is a function of its config, its data, the kind of CPU and the number of threads. On another
kind of CPU sums round otherwise, and the losses tell how much that is. Run as `python -m pipelines.tools.published`, it
publishes the comparison as it is now.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chargpt.command import user_errors
from pipelines.compare import METRICS

PUBLISHED = Path("reports/published.json")
BITS, MACHINE = ("weights_sha256", "val_full"), ("device", "threads", "precision", "backend", "torch")
Runs = Mapping[str, Mapping[str, Any]]  # metrics by the run's name


def main() -> None:
    from chargpt.files import replaced_file

    content = {name: {key: row[key] for key in BITS + MACHINE} for name, row in compared_runs().items()}
    with replaced_file(PUBLISHED) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    print(f"{len(content)} runs → {PUBLISHED}")


def compared_runs() -> dict[str, dict[str, Any]]:
    """The metrics of each run of the comparison by the run's name."""
    metrics = json.loads(METRICS.read_text(encoding="utf-8"))
    return {f"{row['variant']}-s{row['seed']}": row for variant in metrics.values() for row in variant["runs"]}


def against_published(
    found: Mapping[str, Mapping[str, Any]], published: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Lines that say how many runs came out as published, and by how much the losses of the others differ."""
    both = [name for name in found if name in published]
    if not both:
        return
    same = [
        name for name in both if all(found[name][key] == published[name][key] for key in ("weights_sha256", "val_full"))
    ]
    yield f"{len(same)} of {len(both)} runs came out bit for bit as published"
    for name in both:
        if name not in same:
            ours, theirs = found[name], published[name]
            other = [
                f"{key} {theirs[key]}"
                for key in ("device", "threads", "precision", "torch")
                if ours[key] != theirs[key]
            ]
            yield (
                f"  {name}: loss {ours['val_full']:.4f}, published {theirs['val_full']:.4f} "
                f"({ours['val_full'] - theirs['val_full']:+.4f})" + (f", with {', '.join(other)}" if other else "")
            )


if __name__ == "__main__":
    with user_errors():
        main()
