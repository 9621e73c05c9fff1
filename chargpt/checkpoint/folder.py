"""A run's folder: checkpoints as `step-000250`, with two links: `last` to go on from, `best` to use.

A link is replaced by a rename, so there is a whole checkpoint at every moment.

The one idea to know: a folder is a run only if it has RECORD, which is written before anything else, and only
checkpoints that RECORD lists are ever deleted. So whatever else lies in a folder is safe from us.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from chargpt.errors import CheckpointError, TrainingError
from chargpt.files import replaced_file, sweep

RECORD, LOCK, LINKS = "run.json", ".lock", ("best", "last")
DESCRIPTION = "checkpoint.json"  # what makes a folder a checkpoint
FORMAT, VERSION = "chargpt-run", 1
NAME = re.compile(r"step-\d{6,}")  # of a checkpoint


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def point_to(run_folder: Path, name: str, checkpoint: str) -> None:
    """Make the link `name` (best or last) lead to `checkpoint`, in one step."""
    temporary = run_folder / f".{name}.link"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint, target_is_directory=True)
    link = run_folder / name
    if link.is_dir() and not link.is_symlink():  # the run was copied by a tool that follows links
        link.rename(run_folder / f".{name}.copied")
    temporary.replace(link)
    sync_folder(run_folder)


def list_checkpoint(run_folder: Path, name: str) -> None:
    """Put a checkpoint that is about to be written into the folder's record, so that it may be deleted later.

    Raises TrainingError when something else has its name.
    """
    names = recorded(run_folder)
    if name not in names:
        if os.path.lexists(run_folder / name):
            raise TrainingError(f"{run_folder / name} is not of this run, which needs the name; move it elsewhere")
        _write_record(run_folder, [*names, name])


def remove_unreferenced(run_folder: Path) -> None:
    """Delete the record's checkpoints that neither best nor last leads to, and what a killed process left of them."""
    kept = {Path(os.readlink(run_folder / link)).name for link in LINKS if (run_folder / link).is_symlink()}
    names = recorded(run_folder)
    for name in names:
        path = run_folder / name
        sweep(path)
        if name not in kept and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for link in LINKS:
        (run_folder / f".{link}.link").unlink(missing_ok=True)
        shutil.rmtree(run_folder / f".{link}.copied", ignore_errors=True)
    sweep(run_folder / RECORD)
    left = [name for name in names if (run_folder / name).is_dir()]
    if left != names:
        _write_record(run_folder, left)


@contextlib.contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Hold the folder, which becomes a run if it is new or empty, for this process.

    Raises TrainingError when another process trains in it, or when it holds anything and is no run of ours.
    """
    _require_ours(run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = run_folder / LOCK
    if lock.is_symlink():
        raise TrainingError(f"{lock} is a link, where a run has a file of its own; choose another folder (--out)")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {run_folder}; wait for it, stop it, or choose another folder"
            ) from None
        if not (run_folder / RECORD).is_file():
            _write_record(run_folder, sorted(_linked(run_folder)))
        yield
    finally:
        os.close(descriptor)


def recorded(run_folder: Path) -> list[str]:
    """The checkpoints that the folder's record lists. Raises CheckpointError when the record is damaged."""
    path = run_folder / RECORD
    try:
        content = json.loads(path.read_bytes())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"of format {content['format']} {content['version']}, not {FORMAT} {VERSION}")
        names: list[str] = content["checkpoints"]
        if not (isinstance(names, list) and all(isinstance(name, str) and NAME.fullmatch(name) for name in names)):
            raise ValueError("its checkpoints are no list of names")
        return names
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and the same command makes it again") from None


def _write_record(run_folder: Path, names: Iterable[str]) -> None:
    with replaced_file(run_folder / RECORD) as file:
        content = {"format": FORMAT, "version": VERSION, "checkpoints": list(names)}
        file.write(json.dumps(content).encode() + b"\n")


def _linked(run_folder: Path) -> set[str]:
    """The checkpoints that a folder without a record, made before there were records, has for sure: best and last."""
    targets = {os.readlink(run_folder / link) for link in LINKS if (run_folder / link).is_symlink()}
    return {name for name in targets if NAME.fullmatch(name) and (run_folder / name / DESCRIPTION).is_file()}


def _require_ours(run_folder: Path) -> None:
    """Raise TrainingError unless a run may live in the folder: it is missing, empty, or a run already."""
    made_before = any((run_folder / link / DESCRIPTION).is_file() for link in LINKS)
    if not run_folder.is_dir() or (run_folder / RECORD).is_file() or made_before:
        return
    others = sorted(path.name for path in run_folder.iterdir() if path.name != LOCK)
    if others and not all(re.fullmatch(rf"\.{re.escape(RECORD)}\.[0-9a-f]+", name) for name in others):
        raise TrainingError(
            f"{run_folder} is no run of chargpt and is not empty ({others[0]!r} lies in it); choose another (--out)"
        )


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where its file system can: some network disks refuse."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
