"""Rehearse `make gpu` as a lent machine will run it: its versions, a fresh copy of this tree, carried files.

Run as `make gpu-rehearsal`. Two copies of the tree, as git sees it, lie under build/gpu-rehearsal/. In the first the
native modules are built for Hopper, and kept in build/gpu-modules for a machine to take along. The second gets them and
data/raw, and walks through the whole suite on the CPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.build import INSTALL, MODULES, STAMP, fingerprint

ROOT = Path(__file__).parents[2]
WORK, CARRIED, TEXT = ROOT / "build" / "gpu-rehearsal", Path("build/gpu-modules"), Path("data/raw")
ARCHITECTURE = "9.0"  # H100 and H200


def main() -> None:
    python = sys.executable
    shutil.rmtree(WORK, ignore_errors=True)
    built = copy_tree(WORK / "build")
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    subprocess.run([python, *INSTALL], cwd=built, env=environment, check=True)
    shutil.rmtree(ROOT / CARRIED, ignore_errors=True)
    (ROOT / CARRIED).mkdir(parents=True)
    for path in (built / "chargpt").glob("_native*"):
        shutil.copy(path, ROOT / CARRIED)
    (ROOT / CARRIED / STAMP).write_text(fingerprint(MODULES) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in (ROOT / CARRIED).iterdir())
    print(f"{CARRIED}: {size / 2**20:.1f} MiB", flush=True)

    run = copy_tree(WORK / "run")
    for folder in (CARRIED, TEXT):
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, run / folder)
    command = [python, "-m", "benchmarks.gpu", "--dry", "--prebuilt", str(CARRIED)]
    sys.exit(subprocess.run(command, cwd=run, check=False).returncode)


def copy_tree(to: Path) -> Path:
    """What git has or would take, as a lent machine gets it."""
    command = [shutil.which("git") or "git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


if __name__ == "__main__":
    main()
