"""Source files as one number: setup.py records that of csrc/, and whoever loads a native module compares.

Without torch, because setup.py runs this file by itself.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path


def digest(folder: Path, suffixes: Collection[str] = (".h", ".cpp", ".cuh", ".cu")) -> str:
    """SHA-256 (hexadecimal) of the names and contents of all such files in the folder but its tests."""
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in suffixes and name.parts[0] != "tests":
            hashed.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
            hashed.update(path.read_bytes())
    return hashed.hexdigest()
