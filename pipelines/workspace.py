"""Not a stage: what the folder lacks in which `dvc exp run --queue` and `--temp` run the stages.

The one idea to know: that folder is a fresh checkout inside .dvc/tmp, so the compiled kernels, which git ignores, are
not in it. They are borrowed from the project it came from, where the sources they are built from are the same.
"""

import os
import sys
from pathlib import Path


def borrow_native_module() -> None:
    """Link the project's native module into this folder if it has none. Call it before `chargpt.kernels` is imported.

    Prints one line when the experiment has other kernel sources; then torch computes, and the metrics say so.
    """
    project = Path(os.environ.get("DVC_ROOT", "."))  # DVC sets it for stages, to the real project in every folder
    if Path("chargpt/_native.json").exists() or not (project / "chargpt/_native.json").exists():
        return
    if _sources(project) != _sources(Path()):
        print(
            f"the native module of {project} is built from another csrc/ than this experiment's, so it is not used",
            file=sys.stderr,
        )
        return
    for file in sorted((project / "chargpt").glob("_native*"), reverse=True):  # the record, `.json`, comes last
        Path("chargpt", file.name).symlink_to(file.resolve())


def _sources(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in (root / "csrc").rglob("*") if path.is_file()}
