"""What several test files share: the one text that is really downloaded."""

import os
import signal
from pathlib import Path

import pytest
import torch

from chargpt.data import Splits, split_tokens
from chargpt.errors import CorpusError
from chargpt.text import fetch
from chargpt.tokenizers import CharacterTokenizer

# Each of pytest-xdist's processes keeps one core busy; with all threads each they would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A script runs jobs in its background with SIGINT ignored, and so are their children's; the tests send signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

os.environ.pop("MLFLOW_TRACKING_URI", None)  # or the tests would write into the developer's own store


@pytest.fixture(autouse=True)
def _no_store_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlflow.set_tracking_uri sets the variable too, and what starts later would log there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that its absence is what comes back
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


@pytest.fixture(scope="session")
def tiny_shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Shakespeare, through the catalogue and its sources, once per session."""
    path = tmp_path_factory.mktemp("corpus") / "tiny_shakespeare.txt"
    try:
        fetch("tiny_shakespeare", path, progress=False)
    except CorpusError as error:
        pytest.skip(f"no source of Tiny Shakespeare can be reached: {error}")
    return path


@pytest.fixture(scope="session")
def shakespeare_splits(tiny_shakespeare: Path) -> Splits:
    """Its characters as ids, split as in the lecture."""
    text = tiny_shakespeare.read_text(encoding="utf-8")
    tokenizer = CharacterTokenizer(text)
    return split_tokens(tokenizer.encode(text), tokenizer, 0.1)
