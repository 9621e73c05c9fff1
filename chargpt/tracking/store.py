"""The store: its address, its file on disk, its silence, and what is said when it fails."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from chargpt.config import TrackingConfig
from chargpt.tracking.provenance import git

# ----------------------------------------------------------------------------------------------------------- the store


def project_root() -> Path:
    """Where the store lies: DVC's root, else the top of the git repository around the current folder, else that folder.

    DVC runs queued experiments in a temporary copy that it deletes; DVC_ROOT names the real root there too.
    """
    root = os.environ.get("DVC_ROOT") or git(Path.cwd(), "rev-parse", "--show-toplevel")
    return Path(root).resolve() if root else Path.cwd()


def store_uri(config: TrackingConfig) -> str:
    """The address of the store: the config's, else MLFLOW_TRACKING_URI, else mlflow.db at the project's root.

    A relative SQLite path counts from there too.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{project_root() / path}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite address; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


@contextlib.contextmanager
def initialisation_lock(uri: str) -> Iterator[None]:
    """One process at a time: several that create the tables of one SQLite file at once leave it broken.

    Raises TimeoutError after a minute, sqlite3.Error when the database cannot be used.
    """
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{lock.name} stays locked by another process") from None
                time.sleep(0.1)
        check_sqlite(uri)
        yield


def check_sqlite(uri: str) -> None:
    """Raise sqlite3.Error within seconds if the database is damaged, locked or not writable.

    MLflow would retry such a file for a minute and a half, or wait 20 s for its lock.
    """
    path = sqlite_path(uri)
    if path is not None:
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")  # takes the lock of a writer
            database.rollback()


# -------------------------------------------------------------------------------------------------------- quiet failing

# Set unless the user has set them: no telemetry, no chatter, and a server that is away costs seconds, not minutes.
ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what fails is raised as well, and reported by warn_off
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def quiet_mlflow() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for every retry


def warn_off(
    failure: str,
    config: TrackingConfig,
    error: Exception,
    consequence: str = "tracking is off for the rest of this run, the local curve goes on",
) -> None:
    """One line: what failed, where, why, and what happens now."""
    uri = store_uri(config)
    if isinstance(error, ModuleNotFoundError) and error.name == "mlflow":
        reason = "mlflow is not installed (pip install 'chargpt[pipeline]', or set tracking.enabled to false)"
    else:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    warn(without_login(f"MLflow at {uri} {failure}: {reason}; {consequence}", uri))


def warn(message: str) -> None:
    print(f"chargpt: warning: {message}", file=sys.stderr, flush=True)


def without_login(text: str, uri: str) -> str:
    """`text` without the `user:password@` of the address `uri`."""
    login, at, _ = urlsplit(uri).netloc.rpartition("@")
    return text.replace(login + at, "") if at else text


def sqlite_query(uri: str, query: str, *values: str) -> str | None:
    """The first value that the file answers with; asking MLflow instead would cost its import, seconds, for a link."""
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1)) as database:
        row = database.execute(query, values).fetchone()
        return None if row is None else str(row[0])
    return None


def page(uri: str, path: str) -> str | None:
    return f"{without_login(uri, uri).rstrip('/')}/#/{path}" if is_server(uri) else None
