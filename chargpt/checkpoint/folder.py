"""A run's folder: checkpoints as `step-000250`, with two links: `last` to go on from, `best` to use.

A link is replaced by a rename, so there is a whole checkpoint at every moment.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from chargpt.errors import TrainingError

LEFTOVERS = (".step-", ".best.", ".last.")  # how the temporary names of this module begin


def point_to(run_folder: Path, name: str, checkpoint: str) -> None:
    """Make the link `name` (best or last) lead to `checkpoint`, in one step."""
    temporary = run_folder / f".{name}.link"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint, target_is_directory=True)
    link = run_folder / name
    if link.is_dir() and not link.is_symlink():  # the run was copied by a tool that follows links
        link.rename(run_folder / f".step-{name}")
    temporary.replace(link)
    sync_folder(run_folder)


def remove_unreferenced(run_folder: Path) -> None:
    """Delete checkpoints that neither best nor last leads to, and what a killed process left half-written."""
    kept = {(run_folder / name).resolve() for name in ("best", "last")}
    for path in run_folder.iterdir():
        if path.name.startswith(("step-", *LEFTOVERS)) and path.resolve() not in kept:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Hold the folder for this process; makes it if need be. Raises TrainingError when another one trains in it."""
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {run_folder}; wait for it, stop it, or choose another folder"
            ) from None
        yield


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
