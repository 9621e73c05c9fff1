"""`chargpt sample --interactive` and samples side by side: what a user types, and what then stands in the terminal."""

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from chargpt.checkpoint import save_checkpoint
from chargpt.cli import columns
from chargpt.cli.columns import Columns
from chargpt.cli.interactive import converse
from chargpt.config import SampleConfig, TransformerConfig
from chargpt.errors import ConfigError
from chargpt.generation import Generator, Piece
from chargpt.models import build_model
from chargpt.tokenizers import CharacterTokenizer
from generation.spy import SpyModel

TOKENIZER = CharacterTokenizer("\nabcdefgh ")
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("LINES", "20")


def talk(generator: Generator, typed: str, prompt: str = "", samples: int | None = 2, **options: Any) -> None:
    """`typed`, as if at the keyboard; the end of it would be an error."""
    config = SampleConfig(**{"max_new_tokens": 4, "temperature": 0} | options)
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text(typed)
        converse(generator, prompt, config, samples)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()[1:]]  # the first line is the greeting


# --------------------------------------------------------------------------------------------------------- conversation


def spy() -> Generator:
    return Generator(SpyModel(4, TOKENIZER.vocab_size), TOKENIZER)  # type: ignore[arg-type]


def offer(text: str) -> list[str]:
    return ["1" + 45 * " " + "2", text.ljust(46) + text]


def test_a_prompt_its_answers_and_the_one_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk(spy(), "ab\r2\r/text\r/quit\r")
    end = ["abcdef"]
    after = [*offer("gh")[:1], "gh", "a"]  # the newline of the vocabulary is written too
    shown = lines_of(capsys)
    assert shown[:3] == [*offer("cdef"), *end]
    assert shown[3] == after[0]
    assert shown[-1] == "abcdef"  # /text: what was chosen, not what is offered


def test_undo_new_and_other_answers(capsys: pytest.CaptureFixture[str]) -> None:
    talk(spy(), "a\r1\r/undo\r/undo\r/undo\r\r/new\r/text\r/quit\r", max_new_tokens=2)
    assert lines_of(capsys) == [
        *offer("bc"),
        "abc",
        *offer("de"),
        "a",
        "",
        "there is nothing to take back",
        *offer(" a"),  # behind the newline that an empty text starts from
        "",
    ]


def test_what_cannot_be_is_said_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    talk(spy(), "ab\r3\r/temperature x\r/temperature -1\r/nonsense a\rxyz\r\\/a\r/text\r/quit\r")
    said = "\n".join(lines_of(capsys))
    assert "there are the answers 1 to 2" in said
    assert "/temperature takes a number, as in /temperature 0.8, not 'x'" in said
    assert "temperature must be at least 0" in said
    assert "/nonsense is no command" in said
    assert "has no 'x'" in said
    assert "has no '/'" in said  # taken as text
    assert said.endswith("\nab")


def test_temperature_changes_the_answers_and_empty_lines_ask_for_others(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model(TransformerConfig(block_size=8, n_layer=1, n_head=1, n_embd=8), TOKENIZER.vocab_size, 1)
    generator = Generator(model.eval(), TOKENIZER)
    talk(generator, "\r/temperature 0\r\r/quit\r", "ab", temperature=3.0, max_new_tokens=12, ban="\n")
    first, other, cold, again = lines_of(capsys)[1::2]
    assert first != other
    assert cold == again
    assert cold[:12] == cold[46:]
    assert first[:12] != first[46:]


def test_pasted_lines_are_one_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    pasted = "abc\n" * 2500
    talk(spy(), f"\x1b[200~{pasted}\x1b[201~\r/text\r/quit\r")
    assert "\n".join(lines_of(capsys)).endswith("abc\n" * 2499 + "abc\n")


def test_help_and_the_end_of_the_input(capsys: pytest.CaptureFixture[str]) -> None:
    talk(spy(), f"/help\r{CTRL_D}")
    assert any(line.startswith("/undo") for line in lines_of(capsys))


def test_ctrl_c_twice_leaves_and_once_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    talk(spy(), f"{CTRL_C}ab\r{CTRL_C}{CTRL_C}")
    shown = lines_of(capsys)
    assert shown == ["Ctrl-C again leaves.", *offer("cdef"), "Ctrl-C again leaves."]


class Stopped(Generator):
    """Ctrl-C comes after the first piece."""

    def stream(self, prompt: str, config: SampleConfig | None = None) -> Iterator[list[Piece]]:
        steps = super().stream(prompt, config)

        def pieces() -> Iterator[list[Piece]]:
            yield next(steps)
            raise KeyboardInterrupt

        return pieces()


def test_ctrl_c_stops_an_answer_which_can_still_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    generator = Stopped(SpyModel(4, TOKENIZER.vocab_size), TOKENIZER)  # type: ignore[arg-type]
    talk(generator, f"ab\r/text\r1\r{CTRL_C}")  # after a stopped answer one Ctrl-C leaves
    assert lines_of(capsys) == [*offer("c"), "ab", "abc", *offer("d")]


# -------------------------------------------------------------------------------------------------------------- columns


def piece(text: str) -> Piece:
    return Piece(text, [0], [0.0], None)


def test_columns_show_all_at_the_end_and_the_newest_lines_meanwhile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "REFRESH", 0.0)
    board, pictures = Columns(2), []
    table = board._table
    monkeypatch.setattr(board, "_table", lambda height=None: pictures.append(height) or table(height))
    board.show([piece(f"{number}\n"), piece("x" * 50)] for number in range(40))
    shown = lines_of(capsys)
    assert [line[:2].strip() for line in shown[:39]] == [str(number) for number in range(1, 40)]
    assert sum(line.count("x") for line in shown) > 40 * 50 - 2 * 44
    assert pictures == [19] * 40 + [None]
    board.console.print(table(19))
    newest = capsys.readouterr().out.splitlines()
    assert len(newest) == 19
    assert newest[-2].startswith("39")


def test_pictures_are_few_however_fast_the_pieces_come(monkeypatch: pytest.MonkeyPatch) -> None:
    board, pictures = Columns(1), []
    monkeypatch.setattr(board, "_table", lambda height=None: pictures.append(height) or "")
    start = time.monotonic()
    board.show([piece("a")] for _ in range(5000))
    assert len(pictures) <= 3 + 15 * (time.monotonic() - start)
    assert board.texts == ["a" * 5000]


def test_columns_count_their_tokens_and_number_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    board = Columns(2, numbered=True)
    assert board.tokens == 0
    board.show([[piece("a b"), piece("c")], [piece("d")]])
    assert board.tokens == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.strip()] == [["1", "2"], ["a", "bd", "c"]]
    board.console.print(Columns(2)._table())
    assert "1" not in capsys.readouterr().out


def test_a_narrow_terminal_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Columns(4).texts == [""] * 4
    with pytest.raises(ConfigError, match="of 90 characters shows at most 4 samples side by side"):
        Columns(5)
    monkeypatch.setenv("COLUMNS", "9")
    assert Columns(1).texts == [""]


def test_text_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Columns(1).show([[piece("a\x1b[2Jb\rc\x07\x9bd\x7f[bold]e\tf")]])
    assert capsys.readouterr().out.splitlines()[0].rstrip() == "a␛[2Jb␍c␇�d␡[bold]e f"


# ------------------------------------------------------------------------------------------------------ a real terminal


@pytest.mark.parametrize("words", [["--interactive"], ["--stream", "--num-samples", "2", "--prompt", "ab"]])
def test_in_a_terminal(words: list[str], tmp_path: Path) -> None:
    model = build_model(TransformerConfig(block_size=8, n_layer=1, n_head=1, n_embd=8), TOKENIZER.vocab_size, 1)
    save_checkpoint(tmp_path / "model", model, TOKENIZER, {"step": 0})
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    program = "import sys; from chargpt.cli import main; sys.exit(main())"
    arguments = ["sample", str(tmp_path / "model"), *words, "--max-new-tokens", "50", "--ban", "\n"]
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    if "--interactive" in words:
        os.write(ours, b"ab\r2\r/text\r/quit\r")
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    text = shown.decode()
    if "--interactive" in words:
        assert "\x1b[1m2" in text  # the number of an answer, in bold
        assert "ab" in text
    else:
        assert "100 tokens in" in text
