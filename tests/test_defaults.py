"""What a user gets who says nothing, and the numbers behind it: a change of any of them is made on purpose.

`python -m tests.test_defaults` writes them anew into tests/defaults.json, whose diff then shows what changed.
"""

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import chargpt
from chargpt.cli import build_parser
from chargpt.config import schema
from chargpt.config.presets import PRESETS

KEPT = Path(__file__).with_name("defaults.json")
# Tiles and launches are the chips', and have tests of their own; the server is an extra.
ELSEWHERE = ("chargpt.kernels", "chargpt._native")


def plain(value: Any) -> Any:
    """As JSON would have it, without prose. Raises TypeError for what it cannot hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return value if len(value.split()) < 3 else "…"
    if isinstance(value, bytes):
        return value.hex()
    if callable(value):
        return value.__name__
    raise TypeError(type(value))


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(chargpt.__path__, "chargpt."):
        if not found.name.startswith(ELSEWHERE) and "__main__" not in found.name:
            yield importlib.import_module(found.name)


def constants() -> dict[str, Any]:
    """The upper-case names that a module assigns itself, but for those that name a place of this machine."""
    found: dict[str, Any] = {}
    for module in modules():
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        for name, value in vars(module).items():
            if not name.isupper() or not any(
                line.startswith((f"{name} =", f"{name}:")) for line in source.splitlines()
            ):
                continue
            try:
                one = plain(value)
            except TypeError:
                continue
            said = json.dumps(one)
            if one != "…" and not any(
                place in said for place in (sys.executable, sys.prefix, str(Path(__file__).parents[1]))
            ):
                found[f"{module.__name__}.{name}"] = one
    return found


def options(parser: argparse.ArgumentParser, command: str = "chargpt") -> dict[str, Any]:
    """What each command's options are where they are left out, and what they may be."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                found |= options(one, f"{command} {name}")
        elif not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            names = "/".join(action.option_strings) or action.dest
            found[f"{command} {names}"] = plain([action.default, action.nargs, action.choices and [*action.choices]])
    return found


def configs() -> dict[str, Any]:
    found = {}
    for name, part in vars(schema).items():
        if isinstance(part, type) and dataclasses.is_dataclass(part) and part.__module__ == schema.__name__:
            for field in dataclasses.fields(part):
                if field.default is not dataclasses.MISSING:
                    found[f"{name}.{field.name}"] = plain(field.default)
    return found


def requests() -> dict[str, Any]:
    from chargpt.serve import api

    kinds = (api.CompletionRequest, api.ChatRequest, api.LookRequest)
    return {
        f"{kind.__name__}.{name}": {word: one for word, one in field.items() if word not in ("title", "description")}
        for kind in kinds
        for name, field in kind.model_json_schema()["properties"].items()
    }


def promised() -> dict[str, Any]:
    return {
        "constants": constants(),
        "options": options(build_parser()),
        "configs": configs(),
        "presets": plain(PRESETS),
        "requests": requests(),
    }


@pytest.mark.parametrize("kind", ["constants", "options", "configs", "presets", "requests"])
def test_a_default_changes_on_purpose_only(kind: str) -> None:
    pytest.importorskip("uvicorn", reason="the server's numbers need chargpt[serve]")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))[kind]
    now = json.loads(json.dumps(promised()[kind]))
    changed = {key: (kept.get(key), now.get(key)) for key in {*kept, *now} if kept.get(key) != now.get(key)}
    assert not changed, "if that is meant: python -m tests.test_defaults"


if __name__ == "__main__":
    KEPT.write_text(json.dumps(promised(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
