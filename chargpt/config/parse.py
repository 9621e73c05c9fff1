"""From files, and from assignments on a command line, to the dataclasses of the schema.

`parse` adds what a file needs: types, unknown keys (with the nearest known name), and the place of the mistake.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from chargpt.config.schema import RETIRED, Params, TrainConfig
from chargpt.config.strict_yaml import StrictLoader
from chargpt.errors import ConfigError, nearest, shown
from chargpt.files import read_regular

T = TypeVar("T")
MOST_BYTES = 2**24  # of a file with knobs


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check `params.yaml`.

    Raises ConfigError naming the file, the dotted key and what would be right.
    """
    return parse(Params, _read_yaml(Path(path)), str(path))


def load_train_config(path: str | Path) -> TrainConfig:
    """Read one variant (the fields of TrainConfig) from a YAML file. Raises ConfigError as `load_params` does."""
    return parse(TrainConfig, _read_yaml(Path(path)), str(path))


def parse(cls: type[T], raw: object, source: str) -> T:
    """Turn plain data (dicts, lists, scalars) into the dataclass `cls`; `source` names the file in errors.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, a wrong type, or a value that
    the dataclass refuses; each says where.
    """
    return typing.cast(T, _convert(cls, raw, source, ""))


def override(config: T, assignments: list[str]) -> T:
    """Apply `key.path=value` assignments (values as in YAML) to a config dataclass and check the result.

    Choosing another `model.kind` starts that model from its defaults, wherever in the list it stands. Raises
    ConfigError.
    """
    raw = dataclasses.asdict(typing.cast(Any, config))
    for assignment in sorted(assignments, key=lambda text: not text.startswith("model.kind=")):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, as in model.n_layer=6; got {shown(assignment)}")
        *parents, last = key.split(".")
        target = raw
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                raise ConfigError(
                    f"--set {assignment:.80}: {shown(parent)} is no group of knobs{nearest(parent, target)}"
                )
            target = target[parent]
        parsed = _parse_yaml(value, f"--set {assignment:.80}")
        if last == "kind" and target.get("kind") != parsed and parents == ["model"]:
            target.clear()
        target[last] = parsed
    return parse(type(config), raw, "--set")


def flatten(config: object) -> dict[str, Any]:
    """A config dataclass as one flat dict with dotted keys, as trackers log it."""
    flat: dict[str, Any] = {}

    def walk(value: object, prefix: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = value

    walk(dataclasses.asdict(typing.cast(Any, config)), "")
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old → new` for every key whose value differs between two flat dicts."""
    return [
        f"{key}: {old.get(key, '(not set)')} → {new.get(key, '(not set)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _read_yaml(path: Path) -> object:
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the project's root, or name the file") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no regular file, too long
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506  it is a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # YAMLError is what PyYAML documents; the others escape from it, as for `2020-13-45` or a thousand brackets.
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def _convert(wanted: Any, raw: Any, source: str, key: str) -> Any:
    """`raw` as the type `wanted`, or a ConfigError that names `source` and the dotted `key`."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        return _convert_dataclass(wanted, raw, source, key)
    if origin is types.UnionType:
        if type(None) in arguments:
            return None if raw is None else _convert(arguments[0], raw, source, key)
        return _convert(_by_kind(arguments, raw, source, key), raw, source, key)
    if origin is Literal and raw in arguments:
        return raw
    if origin is tuple and isinstance(raw, (list, tuple)):
        return tuple(_convert(arguments[0], item, source, f"{key}[{index}]") for index, item in enumerate(raw))
    if origin is dict and isinstance(raw, dict):
        return {
            _convert(arguments[0], name, source, f"a name in {key}"): _convert(
                arguments[1], item, source, f"{key}.{name}"
            )
            for name, item in raw.items()
        }
    if wanted is float and isinstance(raw, (str, int)) and not isinstance(raw, bool):
        with contextlib.suppress(ValueError, OverflowError):  # a string, because YAML 1.1 reads 1e-3 as one
            return float(raw)
    if wanted is int and type(raw) is int and abs(raw) >= 2**63:
        raise ConfigError(f"{source}: {key} must be a whole number of at most 63 bits, got {shown(raw)}")
    if isinstance(wanted, type) and type(raw) is wanted:
        return raw
    raise ConfigError(f"{source}: {key or 'the file'} must be {_describe(wanted)}, got {shown(raw)}")


def _convert_dataclass(cls: Any, raw: Any, source: str, key: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: {key or 'the file'} must be a group of knobs, got {shown(raw)}")
    hints = typing.get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in raw:
        if name not in hints:
            name = name if isinstance(name, str) else shown(name)
            raise ConfigError(f"{source}: unknown key {prefix}{name:.80}{_suggestion(name, hints, prefix)}")
    for item in dataclasses.fields(cls):
        no_default = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if no_default and item.name not in raw:
            raise ConfigError(f"{source}: {prefix}{item.name} is missing")
    values = {name: _convert(hints[name], value, source, f"{prefix}{name}") for name, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {prefix.rstrip('.') + ': ' if prefix else ''}{error}") from None


def _suggestion(name: str, hints: dict[str, Any], prefix: str) -> str:
    """A hint for an error: the known key that was meant, with its groups, among those here and in the groups inside."""
    here = {known: prefix + known for known in hints}
    inside: dict[str, str] = {}
    for group, wanted in hints.items():
        for cls in filter(dataclasses.is_dataclass, (wanted, *typing.get_args(wanted))):
            for known in typing.get_type_hints(cls):
                inside.setdefault(known, f"{prefix}{group}.{known}")
    if name in RETIRED:
        return f"; {RETIRED[name]}"
    if name in inside:
        return f"; did you mean {inside[name]}?"
    for keys in (here, inside):
        if match := difflib.get_close_matches(name, keys, n=1):
            return f"; did you mean {keys[match[0]]}?"
    return f"; known: {', '.join(hints)}"


def _by_kind(choices: tuple[Any, ...], raw: Any, source: str, key: str) -> Any:
    """The dataclass among `choices` whose `kind` is the one that `raw` names."""
    kinds = {typing.get_args(typing.get_type_hints(choice)["kind"])[0]: choice for choice in choices}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: {key} must be a group of knobs, got {shown(raw)}")
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        hint = nearest(shown(kind).strip("'"), kinds)
        raise ConfigError(f"{source}: {key}.kind must be one of {', '.join(kinds)}, got {shown(kind)}{hint}")
    return kinds[kind]


def _describe(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if typing.get_origin(wanted) is tuple:
        return "a list"
    if typing.get_origin(wanted) is dict:
        return "a group of named entries"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(wanted, str(wanted))
