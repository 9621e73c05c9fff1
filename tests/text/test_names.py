"""Names, links and pages that a text may come with."""

import io
from pathlib import Path

import pytest

from chargpt.checkpoint import locked
from chargpt.data import split_tokens, write_splits
from chargpt.errors import CorpusError
from chargpt.text import download, read_text
from chargpt.tokenizers import CharacterTokenizer


@pytest.mark.parametrize(
    "name", ["~draft.txt", "~nosuchuser", "./~draft.txt", "a b.txt", "%20.txt", "#?.txt", "-x", "\n"]
)
def test_a_file_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("to be")
    assert read_text(name) == "to be"


def test_a_home_folder_that_is_none_is_a_sentence() -> None:
    with pytest.raises(CorpusError, match=r"~nosuchuser/x\.txt does not exist"):
        read_text("~nosuchuser/x.txt")


def test_linked_folders_are_read_once_and_cycles_end(tmp_path: Path) -> None:
    (tmp_path / "texts" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "texts" / "inner" / "a.txt").write_text("a")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "inner" / "up").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "self").symlink_to("self")
    assert read_text(tmp_path / "texts") == "a\nb"


def test_what_chargpt_made_in_a_folder_of_texts_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    tokenizer = CharacterTokenizer("abc" * 9)
    write_splits(tmp_path / "runs" / "data" / "x", split_tokens(tokenizer.encode("abc" * 9), tokenizer, 0.3))
    with locked(tmp_path / "runs" / "my"):
        (tmp_path / "runs" / "my" / "sample.txt").write_text("generated")
    assert read_text(tmp_path) == "a"
    assert "made by chargpt, left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "page", [b'{"files":' + b"[" * 100_000, b"<a href='x'>" * 10_000_000, b'{"files": [{"url": 1}]}', b"\xff" * 1000]
)
def test_an_index_page_of_any_kind_is_a_reason_and_no_traceback(page: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_open_url", lambda *_: io.BytesIO(page))
    with pytest.raises(download.SourceError):
        download._address_in_index("https://index", "project", "file.tar.gz")


def test_an_index_page_without_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= download.MOST_PAGE + 1
            return bytes(size)

    monkeypatch.setattr(download, "_open_url", lambda *_: Endless())
    with pytest.raises(download.SourceError, match="more than"):
        download._address_in_index("https://index", "project", "file.tar.gz")
