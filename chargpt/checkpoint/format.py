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
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from chargpt.checkpoint.folder import DESCRIPTION, sync_folder
from chargpt.config import ModelConfig, parse
from chargpt.errors import ChargptError, CheckpointError, TokenizerError
from chargpt.files import replaced_folder
from chargpt.models import Ensemble, Model, build_model
from chargpt.tokenizers import Tokenizer, load_tokenizer

FORMAT = "chargpt-checkpoint"
VERSION = 1
WEIGHTS, TOKENIZER, STATE = "model.safetensors", "tokenizer.json", "state.safetensors"
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


def load_model(path: str | Path, device: torch.device | str = "cpu", backend: str = "auto") -> tuple[Model, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint (or of the best one in a run folder).

    Raises CheckpointError when the checkpoint is missing, truncated, altered, or of another format.
    """
    folder = find_checkpoint(path)
    content = read_description(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    with damage(folder):
        config: ModelConfig = parse(ModelConfig, content["model"], str(folder / DESCRIPTION))  # type: ignore[arg-type]
        model = build_model(config, int(content["vocab_size"]), seed=0, backend=backend)
        if content["tokenizer"] != tokenizer.fingerprint or tokenizer.vocab_size != model.vocab_size:
            raise CheckpointError(
                f"{folder} holds a model for another tokenizer ({model.vocab_size} symbols) than the one beside it "
                f"({tokenizer.vocab_size} symbols); use the checkpoint as it was saved"
            )
        model.load_state_dict(_from_bytes((folder / WEIGHTS).read_bytes()))
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
    content = read_description(folder)
    if content["training"] is None:
        raise CheckpointError(f"{folder} holds a model to use, not a run to go on with; start a new run")
    with damage(folder):
        weights, state = (_from_bytes((folder / name).read_bytes()) for name in (WEIGHTS, STATE))
    return weights, state, content["training"]


def read_description(folder: Path) -> dict[str, Any]:
    """The checked content of checkpoint.json: its seal, and the SHA-256 of every file it lists."""
    path = folder / DESCRIPTION
    with damage(folder):
        data = path.read_bytes()
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
        for name, digest in content["files"].items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; use another checkpoint")
            if _sha256((folder / name).read_bytes()) != digest:
                raise CheckpointError(f"{folder / name} is truncated or was altered; use another checkpoint")
    return content


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means: the folder itself, or the `best` (else `last`) one of a run folder."""
    path = Path(path)
    for candidate in (path, path / "best", path / "last"):
        if (candidate / DESCRIPTION).is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name the folder of a run or of a checkpoint")
    raise CheckpointError(f"{path} holds no checkpoint (no {DESCRIPTION} in it, in best/ or in last/)")


# --------------------------------------------------------------------------------------------------------- run folders


def require_same_data(path: str | Path, fingerprint: str) -> None:
    """Raise CheckpointError unless the model was trained on the splits with this fingerprint, so saw no other part."""
    folder = find_checkpoint(path)
    if read_description(folder)["summary"].get("data") != fingerprint:
        raise CheckpointError(
            f"{path} was trained on another text, another split of it, or does not say on which: it may have seen the "
            f"validation part. Take runs on this split, or let `chargpt eval` score what --data or --text names"
        )


def export_checkpoint(source: Path, target: Path) -> None:
    """Copy the part of a checkpoint that serves to use it, not to go on training: same bytes for the same model."""
    model, tokenizer = load_model(source)
    save_checkpoint(target, model, tokenizer, read_description(find_checkpoint(source))["summary"])


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
    """Whatever a damaged file makes a reader stumble over becomes one CheckpointError."""
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
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{folder} is damaged ({type(error).__name__}: {error}); use another checkpoint"
        ) from error
