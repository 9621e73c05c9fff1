"""Where a run's code comes from: git and DVC, as tags and as a part of its name."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from chargpt.tracking.base import RunDescription

# The files that decide what a run computes; `git.dirty` speaks of these.
PACKAGE = Path(__file__).parents[1]
RESULT_FILES = ("chargpt", "csrc", "pipelines", "params.yaml", "dvc.yaml", "pyproject.toml", "setup.py")


# -------------------------------------------------------------------------------------------------- names, tags and git


@dataclass(frozen=True)
class GitState:
    commit: str  # 40 hexadecimal digits
    dirty: bool  # a file of RESULT_FILES differs from the commit


def code_state() -> GitState | None:
    """The commit of the code that runs, and whether the files that make results differ from it.

    None where chargpt is no part of a repository's files, as when it was installed from a wheel: the repository that a
    user's text or environment lies in says nothing about this code. None too without git, and before a first commit.
    """
    return git_state(PACKAGE)


def git_state(package: Path) -> GitState | None:
    """As `code_state`, of the package at `package`."""
    if git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git(package, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    return GitState(commit, dirty=bool(git(package.parent, "status", "--porcelain", "--", *RESULT_FILES)))


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it cannot. Takes no locks, so it disturbs no git that runs at the same time."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def all_tags(run: RunDescription) -> dict[str, str]:
    tags = run.tags | {"variant": run.variant, "seed": str(run.seed)}
    if run.note:
        tags["mlflow.note.content"] = run.note
    git = code_state()
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
