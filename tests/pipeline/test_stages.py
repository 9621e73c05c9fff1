"""Each stage of dvc.yaml lists the code that decides its results, so that `dvc repro` gives nothing stale."""

import ast
from pathlib import Path

import pytest
import yaml

from test_rooms import arrows, imported

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# What a stage may run without its results hanging on it.
DECIDES_NOTHING = {
    "errors": "sentences",
    "files": "how bytes come to disk, not which",
    "interrupts": "when a run stops",
    "command": "exit codes and streams",
    "console": "what the terminal shows",
    "tracking": "what MLflow shows; curve.py writes an output and is listed on its own",
}
TRAINED_BEFORE = (
    *("kernels", "runtime", "models", "tokenizers", "text", "data", "checkpoint"),
    *("evaluation", "training", "generation"),
)
BESIDES: dict[str, dict[str, str]] = {
    "train": {"generation": "the sample in a run's folder is no output"},
    "sample": dict.fromkeys(("data", "evaluation", "training"), "the sampler neither scores nor trains"),
    "compare": dict.fromkeys(TRAINED_BEFORE, "the runs are trained"),
}


def reached(stage: str) -> set[str]:
    """The rooms that a stage's module imports, and those that these import, and so on."""
    found: set[str] = set()
    new = imported(ROOT / "pipelines" / f"{stage}.py")
    while new:
        found |= new
        new = set().union(*(arrows().get(room, set()) for room in new)) - found
    return found


def listed(stage: str) -> set[str]:
    """The rooms that the stage's dependencies name."""
    paths = [Path(path) for path in STAGES[stage]["deps"] if path.startswith("chargpt/")]
    assert all((ROOT / path).exists() for path in paths)
    return {path.with_suffix("").parts[1] for path in paths}


@pytest.mark.parametrize("stage", STAGES)
def test_what_decides_a_stages_results_is_among_its_dependencies(stage: str) -> None:
    assert STAGES[stage]["cmd"].split()[:3] == ["python", "-m", f"pipelines.{stage}"]
    assert f"pipelines/{stage}.py" in STAGES[stage]["deps"]
    missing = reached(stage) - listed(stage) - DECIDES_NOTHING.keys() - BESIDES.get(stage, {}).keys()
    assert missing == set()
    if "kernels" in listed(stage):
        assert {"csrc", "setup.py"} <= set(STAGES[stage]["deps"])


def test_the_lists_of_exceptions_have_no_room_that_is_listed() -> None:
    for stage, rooms in BESIDES.items():
        assert not rooms.keys() & listed(stage)


def test_the_file_of_tracking_that_writes_an_output_is_listed_and_stands_alone() -> None:
    assert "chargpt/tracking/curve.py" in STAGES["train"]["deps"]
    tree = ast.parse((ROOT / "chargpt" / "tracking" / "curve.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module and module.startswith("chargpt.tracking")}
