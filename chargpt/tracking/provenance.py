"""Where a run's code comes from: git and DVC, as tags and as a part of its name."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from chargpt.tracking.base import RunDescription

# The files that decide what a run computes; `git.dirty` speaks of these.
RESULT_FILES = ("chargpt", "csrc", "pipelines", "params.yaml", "dvc.yaml", "pyproject.toml", "setup.py")


# -------------------------------------------------------------------------------------------------- names, tags and git


@dataclass(frozen=True)
class GitState:
    commit: str  # 40 hexadecimal digits
    dirty: bool  # a file of RESULT_FILES differs from the commit


def git_state(folder: Path) -> GitState | None:
    """The commit checked out around `folder`, and whether the files that make results differ from it.

    None without git, outside a repository, and before its first commit.
    """
    top = git(folder, "rev-parse", "--show-toplevel")
    commit = git(folder, "rev-parse", "--verify", "HEAD")
    if top is None or commit is None:
        return None
    return GitState(commit, dirty=bool(git(Path(top), "status", "--porcelain", "--", *RESULT_FILES)))


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it cannot. Takes no locks, so it disturbs no git that runs at the same time."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def all_tags(run: RunDescription) -> dict[str, str]:
    tags = run.tags | {"variant": run.variant, "seed": str(run.seed)}
    # The code that runs is around the current folder; under `dvc exp run --temp` DVC_ROOT is elsewhere.
    git = git_state(Path.cwd())
    if git is not None:
        tags |= {"mlflow.source.git.commit": git.commit, "git.dirty": str(git.dirty).lower()}
    for tag, variable in (("dvc.experiment", "DVC_EXP_NAME"), ("dvc.stage", "DVC_STAGE")):
        if os.environ.get(variable):
            tags[tag] = os.environ[variable]
    return tags


def run_name(run: RunDescription, tags: dict[str, str]) -> str:
    """Variant, seed, commit and DVC experiment: without the last two, a chart's legend repeats one name."""
    parts = [f"{run.variant}-s{run.seed}", tags.get("mlflow.source.git.commit", "")[:7], tags.get("dvc.experiment", "")]
    return "-".join(filter(None, parts))
