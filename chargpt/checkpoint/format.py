"""Checkpoints: a folder of safetensors and JSON that needs nothing else, written whole or not at all.

    checkpoint.json      format, model config, what was reached, and the SHA-256 of every other file and of itself
    model.safetensors    the weights to use
    tokenizer.json       the vocabulary they were trained with
    state.safetensors    only where training can go on: optimizer, random streams, position in the data

Loading runs no code from disk.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from chargpt.checkpoint.folder import DESCRIPTION, sync_folder
from chargpt.config import ModelConfig, parse
from chargpt.errors import ChargptError, CheckpointError, ConfigError, TokenizerError
from chargpt.files import read_regular, replaced_folder
from chargpt.models import Ensemble, Model, build_model, parameter_estimate
from chargpt.runtime import is_out_of_memory
from chargpt.tokenizers import Tokenizer, parse_tokenizer

FORMAT = "chargpt-checkpoint"
VERSION = 1
WEIGHTS, TOKENIZER, STATE = "model.safetensors", "tokenizer.json", "state.safetensors"
MOST_JSON = 2**28  # bytes: far above the curve of any run, and any vocabulary
Tensors = dict[str, torch.Tensor]


def save_checkpoint(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    summary: dict[str, Any],
    state: Tensors | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder: everything into a temporary folder beside it, flushed to disk, then one rename.

    `summary` is plain data for readers (step, losses …); `state` and `training` are what resuming needs, as tensors
    and as plain data. Raises CheckpointError when the disk refuses; what was there before stays as it was.
    """
    try:
        with replaced_folder(folder) as temporary:
            _write(temporary / WEIGHTS, _to_bytes(model.state_dict()))
            tokenizer.save(temporary / TOKENIZER)
            if state is not None:
                _write(temporary / STATE, _to_bytes(state))
            content = {
                "format": FORMAT,
                "version": VERSION,
                "model": dataclasses.asdict(model.config),
                "vocab_size": model.vocab_size,
                "tokenizer": tokenizer.fingerprint,
                "summary": summary,
                "training": training,
                "files": {path.name: _sha256(path.read_bytes()) for path in sorted(temporary.iterdir())},
            }
            _write(temporary / DESCRIPTION, _seal(content))
            sync_folder(temporary)
        sync_folder(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise _not_saved(folder, error) from error


def _not_saved(folder: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return CheckpointError(
        f"could not save a checkpoint to {folder}: {reason}; earlier checkpoints are untouched. "
        f"{'Free some disk space' if full else 'Mend it'} and go on"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read once: what was checked is what is used."""

    folder: Path  # as it was named
    content: dict[str, Any]  # of checkpoint.json
    files: dict[str, bytes]  # those that were asked for


def read_checkpoint(path: str | Path, *names: str) -> Checkpoint:
    """The checked description of the checkpoint that `path` means, and the files `names` that it lists.

    `best` and `last` may move on while a run trains, and the checkpoint that they led to vanishes: then it is read
    again. Raises CheckpointError when it is missing, truncated, altered, or of another format.
    """
    while True:
        folder = find_checkpoint(path)
        real = Path(os.path.realpath(folder))
        try:
            return _read(folder, real, names)
        except CheckpointError:
            if os.path.realpath(find_checkpoint(path)) == str(real):
                raise


def read_description(path: str | Path) -> dict[str, Any]:
    """The checked content of checkpoint.json; errors as of `read_checkpoint`. No other file is read."""
    return read_checkpoint(path).content


def load_model(path: str | Path, device: torch.device | str = "cpu", backend: str = "auto") -> tuple[Model, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint (or of the best one in a run folder).

    Raises CheckpointError when the checkpoint is missing, truncated, altered, or of another format.
    """
    return _model(read_checkpoint(path, TOKENIZER, WEIGHTS), device, backend)


def _model(read: Checkpoint, device: torch.device | str = "cpu", backend: str = "auto") -> tuple[Model, Tokenizer]:
    folder, content = read.folder, read.content
    tokenizer = parse_tokenizer(read.files[TOKENIZER], folder / TOKENIZER)
    with damage(folder):
        model = build_model(_config(content, folder), content["vocab_size"], seed=0, backend=backend)
        if content["tokenizer"] != tokenizer.fingerprint or tokenizer.vocab_size != model.vocab_size:
            raise CheckpointError(
                f"{folder} holds a model for another tokenizer ({model.vocab_size} symbols) than the one beside it "
                f"({tokenizer.vocab_size} symbols); use the checkpoint as it was saved"
            )
        weights = _from_bytes(read.files[WEIGHTS])
        require_tensors(weights, model.state_dict(), folder / WEIGHTS)
        model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer


def load_ensemble(
    paths: Sequence[str | Path], device: torch.device | str = "cpu", backend: str = "auto"
) -> tuple[Model | Ensemble, Tokenizer]:
    """As `load_model`, of one or more checkpoints: several predict together, with the mean of their probabilities.

    Raises TokenizerError when two of them have different tokenizers.
    """
    (model, tokenizer), *others = [load_model(path, device, backend) for path in paths]
    for path, (_, other) in zip(paths[1:], others, strict=True):
        if other.fingerprint != tokenizer.fingerprint:
            raise TokenizerError(
                f"{path} has another tokenizer ({other.vocab_size} symbols) than {paths[0]} ({tokenizer.vocab_size} "
                f"symbols); models that predict together must be trained on the same text's symbols"
            )
    return Ensemble([model, *(member for member, _ in others)], backend).eval() if others else model, tokenizer


def load_state(folder: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """What resuming needs: the delivered weights, the state tensors, and the plain data that was saved with them."""
    if read_description(folder)["training"] is None:
        raise CheckpointError(f"{folder} holds a model to use, not a run to go on with; start a new run")
    read = read_checkpoint(folder, WEIGHTS, STATE)
    with damage(folder):
        return _from_bytes(read.files[WEIGHTS]), _from_bytes(read.files[STATE]), read.content["training"]


def require_tensors(found: Tensors, expected: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise CheckpointError unless `found` has the names, dtypes and shapes of `expected`, no more and no fewer.

    Optimizers and kernels trust what they are given: a tensor of another shape may end the process.
    """
    for name in sorted(found.keys() | expected.keys()):
        here, wanted = (
            "nothing" if name not in tensors else f"{tensors[name].dtype} {list(tensors[name].shape)}"
            for tensors in (found, expected)
        )
        if here != wanted:
            raise CheckpointError(f"{where} has {here} for {name}, where {wanted} belongs; use another checkpoint")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means: the folder itself, or the `best` (else `last`) one of a run folder."""
    path = Path(path)
    for candidate in (path, path / "best", path / "last"):
        if (candidate / DESCRIPTION).is_file():
            return candidate
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist; name the folder of a run or of a checkpoint")
    raise CheckpointError(f"{path} holds no checkpoint (no {DESCRIPTION} in it, in best/ or in last/)")


# ------------------------------------------------------------------------------------------------------ what is checked


class Summary(dict[str, Any]):
    """What a checkpoint says about itself. Raises CheckpointError for what it does not say."""

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"the checkpoint does not say its {key}; use another checkpoint")


# Type and least value of what is read.
SUMMARY: dict[str, tuple[type, int]] = {
    "variant": (str, 0),
    "seed": (int, 0),
    "step": (int, 0),
    "corpus": (str, 0),
    "batch_size": (int, 1),
    "data": (str, 0),
    "train_tokens": (int, 1),
}


def _read(folder: Path, real: Path, names: Sequence[str]) -> Checkpoint:
    """The checkpoint at `real`, called `folder` in errors."""
    path = folder / DESCRIPTION
    with damage(folder):
        data = read_regular(real / DESCRIPTION, MOST_JSON)
        content: dict[str, Any] = json.loads(data)["content"]
        if data != _seal(content):  # so not a single byte of the file can differ
            raise CheckpointError(f"{path} was altered after it was saved; use another checkpoint")
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise CheckpointError(
                f"{path} is of format {content['format']} {content['version']}, this version reads {FORMAT} {VERSION}"
            )
        needed = {WEIGHTS, TOKENIZER} | ({STATE} if content["training"] is not None else set())
        if content["files"].keys() != needed:
            raise CheckpointError(
                f"{path} lists the files {', '.join(content['files'])} where a checkpoint has "
                f"{', '.join(sorted(needed))}; use another checkpoint"
            )
        for name in needed:
            if not (real / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; use another checkpoint")
        _require_fields(content)
        content["summary"] = Summary(content["summary"])
        files = {}
        for name in names:
            files[name] = read_regular(real / name, _most_bytes(content, folder, name))
            if _sha256(files[name]) != content["files"][name]:
                raise CheckpointError(f"{folder / name} is truncated or was altered; use another checkpoint")
        if WEIGHTS in files and len(files[WEIGHTS]) < 4 * _numbers(content, folder):
            raise ValueError(f"{WEIGHTS} is too short for the model that {DESCRIPTION} describes")
    return Checkpoint(folder, content, files)


def _config(content: dict[str, Any], folder: Path) -> ModelConfig:
    try:
        return parse(ModelConfig, content["model"], str(folder / DESCRIPTION))  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _numbers(content: dict[str, Any], folder: Path) -> int:
    return parameter_estimate(_config(content, folder), content["vocab_size"])


def _most_bytes(content: dict[str, Any], folder: Path, name: str) -> int:
    """The most that a file can have, from the description alone, so that nothing larger is read."""
    if name == TOKENIZER:
        return MOST_JSON
    # Twice for biases and gains, more for the names of tensors; the state has weights, average and two moments.
    weights = 2 * 4 * _numbers(content, folder) + 2**24
    return weights if name == WEIGHTS else 5 * weights


def _require_fields(content: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError unless the fields that are used have their types and ranges."""
    _require(type(content["vocab_size"]) is int and content["vocab_size"] >= 1, "vocab_size")
    _require(isinstance(content["summary"], dict), "summary")
    for key, (kind, least) in SUMMARY.items():
        if key in content["summary"]:
            value = content["summary"][key]
            _require(type(value) is kind, f"summary.{key}")
            _require(kind is str or int(value) >= least, f"summary.{key}")
    training = content["training"]
    if training is not None:
        _require(isinstance(training["identity"], dict), "training.identity")
        at = training["step"]
        _require(type(at) is int and at >= 0, "training.step")
        _require(isinstance(training["history"], list) and training["history"] != [], "training.history")
        for step, metrics in training["history"]:
            _require(type(step) is int and 0 <= step <= at, "training.history")
            _require(all(map(_is_number, metrics.values())), "training.history")
        step, loss = training["best"]
        _require(type(step) is int and 0 <= step <= at and _is_number(loss), "training.best")


def _require(condition: bool, field: str) -> None:
    if not condition:
        raise ValueError(f"{field} in {DESCRIPTION} is not what was saved")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# --------------------------------------------------------------------------------------------------------- run folders


def require_same_data(path: str | Path, fingerprint: str) -> None:
    """Raise CheckpointError unless the model was trained on the splits with this fingerprint, so saw no other part."""
    if read_description(path)["summary"].get("data") != fingerprint:
        raise CheckpointError(
            f"{path} was trained on another text, another split of it, or does not say on which: it may have seen the "
            f"validation part. Take runs on this split, or let `chargpt eval` score what --data or --text names"
        )


def export_checkpoint(source: Path, target: Path) -> None:
    """Copy the part of a checkpoint that serves to use it, not to go on training: same bytes for the same model."""
    read = read_checkpoint(source, TOKENIZER, WEIGHTS)
    save_checkpoint(target, *_model(read), read.content["summary"])


# ------------------------------------------------------------------------------------------------------- bytes on disk


def _seal(content: dict[str, Any]) -> bytes:
    digest = _sha256(_canonical(content))
    return json.dumps({"sha256": digest, "content": content}, indent=1, ensure_ascii=False).encode() + b"\n"


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _to_bytes(tensors: Tensors) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _from_bytes(data: bytes) -> Tensors:
    return safetensors.torch.load(data)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def damage(folder: Path) -> Any:
    """Whatever a damaged file makes a reader stumble over becomes one CheckpointError; so does what is no damage."""
    try:
        yield
    except ChargptError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        if is_out_of_memory(error):
            message = f"the memory ran out while {folder} was loaded; close other programs, or use a smaller model"
        elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
            message = f"{error.filename or folder} may not be read ({error.strerror}); change its permissions"
        elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            message = f"{folder} cannot be read: {error.strerror}; close other programs"
        else:
            message = f"{folder} is damaged ({type(error).__name__}: {error}); use another checkpoint"
        raise CheckpointError(message) from error
