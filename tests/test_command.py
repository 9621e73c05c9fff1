"""A command's streams and signals: whatever they are, the work is done and kept."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import runs
from chargpt import command
from chargpt.command import REFUSALS, Unbreakable, user_errors
from chargpt.interrupts import Interrupts

ENDLESS = 100_000_000  # steps
BIGRAM = ["--set", "model.kind=bigram", "--set", "device=cpu", "--set", "eval_interval=20"]
COMMAND = [sys.executable, "-c", "from chargpt.cli import main; main()"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def training(folder: Path, steps: int = 60) -> list[str]:
    """A command that trains in `folder`, and its text."""
    (folder / "my.txt").write_text(runs.words(), encoding="utf-8")
    return [*COMMAND, "train", "my.txt", *BIGRAM, "--set", f"max_steps={steps}"]


# -------------------------------------------------------------------------------------------------------------- streams


STREAMS = [
    ("2>&1 | head -1; exit ${PIPESTATUS[0]}", 0),
    (">/dev/full 2>/dev/full", 2),
    ("| true; exit ${PIPESTATUS[0]}", 0),
    ("2>&-", 0),
    ("2>/dev/full", 0),
    (">/dev/full", 2),
]


@pytest.mark.parametrize(
    ("redirections", "code"),
    [("<&- >&- 2>&-", 0), *(pytest.param(*streams, marks=pytest.mark.slow) for streams in STREAMS)],
)
def test_a_run_is_trained_and_kept_whatever_its_streams_are(redirections: str, code: int, tmp_path: Path) -> None:
    command = training(tmp_path)
    shell = ["bash", "-c", f'"$@" {redirections}', "bash", *command]
    done = subprocess.run(shell, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "runs" / "my" / "metrics.json").is_file(), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    if redirections == ">/dev/full":
        assert done.stderr.splitlines()[-1].startswith("chargpt: error: cannot use the output: No space left")
    if redirections == "2>&-":  # messages do not move to stdout
        assert done.stdout.startswith("validation loss")


def test_a_closed_standard_stream_is_not_the_next_file() -> None:
    opening = "print(os.open(os.devnull, os.O_RDONLY))"
    script = f"import os; from chargpt.command import user_errors\nwith user_errors():\n    {opening}"
    shell = ["bash", "-c", '"$@" <&- 2>&-', "bash", sys.executable, "-c", script]
    done = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 3


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "gone"), ValueError("closed file")])
def test_messages_that_cannot_be_written_are_lost_quietly(error: Exception) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise error

        def flush(self) -> None:
            raise error

    stream = Unbreakable(Broken())
    assert stream.write("lost") == 4
    stream.flush()
    assert stream.isatty() is False


def test_an_encoding_without_the_letters_writes_them_with_backslashes(tmp_path: Path) -> None:
    script = "from chargpt.command import user_errors\nwith user_errors():\n    print('caf\\udce9 ä')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(PYTHONIOENCODING="ascii"), capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\udce9 \\xe4\n", b"")


# -------------------------------------------------------------------------------------------------------------- signals


def stopped(folder: Path, number: signal.Signals, ignored: Sequence[signal.Signals] = ()) -> "subprocess.Popen[str]":
    """A training command that got a signal after its first checkpoint; `ignored` are what its parent ignores."""

    def inherit() -> None:
        for other in Interrupts.SIGNALS:
            signal.signal(other, signal.SIG_IGN if other in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        training(folder, steps=ENDLESS),
        cwd=folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=inherit,
    )
    while not (folder / "runs/my/last").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    return process


def test_a_closed_terminal_saves_as_ctrl_c_does(tmp_path: Path) -> None:
    process = stopped(tmp_path, signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "by SIGHUP; everything is saved in runs/my" in err.splitlines()[-1]


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path: Path) -> None:
    process = stopped(tmp_path, signal.SIGHUP, ignored=[signal.SIGHUP, signal.SIGINT])
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "by SIGTERM; everything is saved" in err.splitlines()[-1]


def test_a_swallowed_interrupt_stops_where_work_begins() -> None:
    with Interrupts() as outer:
        with contextlib.suppress(BaseException):  # as in an import that tries what is there
            signal.raise_signal(signal.SIGINT)
        assert outer.requested == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C"), Interrupts():
            raise AssertionError("this work must not begin")
        assert signal.getsignal(signal.SIGINT) == outer._handle


def test_an_interrupt_that_python_cannot_raise_is_noted_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    class Broken:
        def __del__(self) -> None:
            raise ValueError("of another kind")

    former, said = sys.unraisablehook, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", said.append)  # pytest's own would keep them for itself
        with Interrupts() as interrupts:
            Interrupted()
            Broken()
        assert interrupts.requested == "Ctrl-C"
        assert [type(error.exc_value) for error in said] == [ValueError]
    assert sys.unraisablehook == former
    assert capsys.readouterr().err == ""


def test_what_fails_after_a_swallowed_interrupt_is_the_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def swallowing() -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        raise AttributeError("half loaded")

    code, err = outcome(swallowing, capsys)
    assert (code, err) == (2, "chargpt: error: stopped by Ctrl-C; nothing half-written was left behind\n")


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in Interrupts.SIGNALS]
    with user_errors():
        assert [signal.getsignal(number) for number in Interrupts.SIGNALS] != before
    assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before


# --------------------------------------------------------------------------------------------------------------- errors


def outcome(action: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stop, user_errors():
        action()
    return stop.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], Any]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("number", sorted(REFUSALS))
def test_what_a_disk_refuses_is_a_sentence_with_what_helps(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = outcome(raising(OSError(number, os.strerror(number), "some/file")), capsys)
    assert code == 2
    assert err == f"chargpt: error: cannot use some/file: {os.strerror(number)}; {REFUSALS[number]}\n"
    assert ("space" in REFUSALS[number]) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert ("permissions" in REFUSALS[number]) == (number in (errno.EACCES, errno.EPERM))


@pytest.mark.parametrize("name", [None, "some/file"])
def test_an_output_that_refused_is_left_alone_and_others_are_not(
    name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away: list[object] = []
    monkeypatch.setattr(command, "_point_away", away.append)
    outcome(raising(OSError(errno.ENOSPC, "full", name)), capsys)
    assert len(away) == (name is None)


def test_too_little_memory_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(raising(MemoryError()), capsys)[1].startswith("chargpt: error: the memory ran out")
