"""Not a stage: `make ablation`. Every variant of params.yaml with three seeds, as far as it is not there already.

The one idea to know: it only writes the list into `ablation` of params.yaml and becomes `dvc repro`. So everything that
holds there holds here: finished runs are kept, an interrupted one goes on, a second call does nothing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from chargpt.command import user_errors

PARAMS = Path("params.yaml")
SEEDS = (1, 2, 3)


def main() -> None:
    from chargpt.config import load_params
    from chargpt.files import replaced_file

    variants = tuple(load_params(PARAMS).variants)
    text = PARAMS.read_text(encoding="utf-8")
    whole = with_list(with_list(text, "variants", variants), "seeds", SEEDS)
    if whole != text:
        with replaced_file(PARAMS) as file:
            file.write(whole.encode())
    print(
        f"ablation: {len(variants)} variants × {len(SEEDS)} seeds, those that are missing; Ctrl-C stops, and the same "
        f"command goes on\nablation: {PARAMS} asks for all of them now; `git checkout {PARAMS}` and `dvc repro` give "
        "the comparison of before, without training",
        flush=True,
    )
    command = [sys.executable, "-m", "dvc", "repro"]
    os.execv(command[0], command)  # noqa: S606 -- becomes DVC: one Ctrl-C, and its exit code


def with_list(text: str, key: str, values: Sequence[object]) -> str:
    """`text`, a params.yaml, with `values` as the list `ablation.<key>` and every other character as it was.

    The list keeps its style: one value a line, or all in brackets.
    """
    node = _child(_child(yaml.compose(text), "ablation"), key)
    start, end = node.start_mark, node.end_mark
    if node.flow_style:
        written = f"[{', '.join(map(str, values))}]"
    else:
        written = ("\n" + " " * start.column).join(f"- {value}" for value in values)
        end = node.value[-1].end_mark  # the node itself reaches to the next key, over the comments in between
    return text[: start.index] + written + text[end.index :]


def _child(mapping: Any, key: str) -> Any:
    """The node of a key in a YAML mapping's node."""
    return next(value for name, value in mapping.value if name.value == key)


if __name__ == "__main__":
    with user_errors():
        main()
