"""The rooms of the house and the arrows between them: nothing points up, and no room knows too much."""

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import chargpt

PACKAGE = Path(__file__).parents[1] / "chargpt"
# From the bottom to the top: a room may import those before it.
ROOMS = (
    *(
        "errors",
        "files",
        "interrupts",
        "command",
        "config",
        "kernels",
        "runtime",
        "models",
        "tokenizers",
        "text",
        "data",
        "checkpoint",
    ),
    *("evaluation", "generation", "training", "tracking", "console", "planner", "report", "experiment", "serve", "cli"),
)


def imported(file: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "chargpt":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("chargpt."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("chargpt.")}
    return names - {"__version__"}


@functools.cache
def arrows() -> dict[str, set[str]]:
    """For each room those that it imports."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found.setdefault(parts[0], set()).update(imported(file) - {parts[0]})
    return found


def test_every_room_has_its_place_and_no_arrow_points_up() -> None:
    found = arrows()
    assert found.keys() == set(ROOMS)
    for room, others in found.items():
        assert not others - set(ROOMS[: ROOMS.index(room)]), room


def test_training_knows_few_rooms_and_neither_clock_nor_listener() -> None:
    known = arrows()["training"]
    assert len(known) <= 7
    assert not known & {"tracking", "planner", "cli", "console", "report", "generation"}
    for file in sorted((PACKAGE / "training").glob("*.py")):
        if file.name != "probe.py":  # which tries out how long a step takes
            modules = {
                alias.name
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            assert not modules & {"time", "datetime", "perf_counter"}, file


def test_only_bindings_of_the_kernels_meet_torch() -> None:
    csrc = PACKAGE.parent / "csrc"
    for file in csrc.rglob("*"):
        if file.suffix in (".cpp", ".h", ".cu", ".cuh", ".inc") and "bindings" not in str(file.relative_to(csrc)):
            text = file.read_text(encoding="utf-8")
            assert "#include <torch/" not in text, file
            assert "#include <ATen/" not in text, file


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("chargpt.cli", ("torch", "numpy", "mlflow", "dvc", "matplotlib", "jinja2")),
        ("chargpt.config", ("torch", "numpy")),
        ("chargpt.kernels", ("torch._dynamo", "triton", "mlflow")),
        ("chargpt.generation", ("torch._dynamo", "triton", "mlflow", "chargpt.training")),
        ("chargpt.experiment", ("torch._dynamo", "triton", "mlflow", "dvc", "matplotlib", "jinja2")),
    ],
)
def test_imports_are_cheap(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# What changes while it is held, and says so by not being frozen.
CHANGING = {"Asked", "Job", "State"}


def test_a_dataclass_is_frozen_unless_it_is_known_to_change() -> None:
    found = {}
    for module in pkgutil.walk_packages(chargpt.__path__, "chargpt."):
        if module.name.startswith("chargpt._native"):
            continue
        for one in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(one) and dataclasses.is_dataclass(one) and one.__module__ == module.name:
                found[one.__qualname__] = one.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert len(found) > 60
    assert {name for name, frozen in found.items() if not frozen} == CHANGING
