"""Writing in one piece: whatever happens inside the block, readers see the old content or the new, and no leftovers."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chargpt import files
from chargpt.files import replaced_file, replaced_folder, sweep

FAILURES = [ValueError, KeyboardInterrupt, SystemExit, MemoryError]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_takes_its_name_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    with replaced_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.seek(0)
        assert file.read() == b"half"  # open to read too
    assert path.read_bytes() == b"half"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failing_block_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, old: bytes | None, failure: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(failure), replaced_file(path) as file:  # noqa: PT012
        file.write(b"half of the ne")
        raise failure
    assert names(tmp_path) == ([] if old is None else ["file.bin"])
    assert old is None or path.read_bytes() == old


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)  # where a full disk shows at the latest
    with pytest.raises(OSError, match="No space"), replaced_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_the_bytes_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "file.bin", []
    monkeypatch.setattr(files.os, "fsync", lambda _: calls.append(path.exists()))
    with replaced_file(path) as file:
        file.write(b"new")
    assert calls == [False]


def test_nested_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with replaced_file(path) as outer:
        outer.write(b"outer")
        with replaced_file(path) as inner:
            inner.write(b"inner")
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"outer"
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_users_umask(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    # The umask belongs to the process, so another process tries it.
    program = (
        "import os, sys; from pathlib import Path; from chargpt.files import replaced_file, replaced_folder\n"
        f"os.umask({umask}); root = Path(sys.argv[1])\n"
        "with replaced_file(root / 'file') as file: file.write(b'x')\n"
        "with replaced_folder(root / 'folder') as folder: (folder / 'x').touch()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parent.parent)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == file_mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == folder_mode


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_an_os_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError), replaced_file(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        tmp_path.chmod(0o700)


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for content in ("first", "second"):
        with replaced_folder(folder) as temporary:
            (temporary / content).mkdir()
            (temporary / content / "file").write_text(content)
            assert not (folder / content).exists()
        assert names(folder) == [content]
    assert names(folder.parent) == ["folder"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failing_block_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, exists: bool, failure: type[BaseException]
) -> None:
    folder = tmp_path / "folder"
    if exists:
        folder.mkdir()
        (folder / "old").touch()
    with pytest.raises(failure), replaced_folder(folder) as temporary:  # noqa: PT012
        (temporary / "new").touch()
        raise failure
    assert names(tmp_path) == (["folder"] if exists else [])
    assert not exists or names(folder) == ["old"]


def test_ctrl_c_while_the_old_folder_is_removed_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    remove = files.shutil.rmtree

    def interrupted(path: Path, **options: bool) -> None:
        monkeypatch.setattr(files.shutil, "rmtree", remove)  # once
        if path.exists():
            (next(path.iterdir())).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as temporary:
        (temporary / "new").touch()
    assert names(folder) in (["old"], ["new"])


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError), replaced_folder(folder) as temporary:
        (temporary / "new").touch()
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["folder"]


# --------------------------------------------------------------------------------------------------------------- sweep


def test_sweep_takes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from chargpt.files import replaced_file, replaced_folder\n"
        "with replaced_folder(Path(sys.argv[1]) / 'folder'), replaced_file(Path(sys.argv[1]) / 'file.txt'): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    left = names(tmp_path)
    assert len(left) == 2
    mine = (
        ".file.txt",
        ".file.txt.abc",
        ".file.txt.0123456z",
        ".file.txt.0123abcd.bak",
        ".other.txt.01234567",
        "file.txt",
    )
    for name in mine:
        (tmp_path / name).write_text("of the user")
    sweep(tmp_path / "file.txt")
    sweep(tmp_path / "folder")
    sweep(tmp_path / "nowhere" / "file.txt")
    assert names(tmp_path) == sorted(mine)


def test_a_full_disk_is_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error, replaced_file(tmp_path / "file.txt") as file:
        file.write(b"x")
    assert error.value.filename == str(tmp_path / "file.txt")
    assert names(tmp_path) == []
