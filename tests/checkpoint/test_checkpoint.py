"""Checkpoints: whole or not at all, checked to the last byte, and nothing in them is ever run."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from chargpt import training
from chargpt.checkpoint import export_checkpoint, find_checkpoint, load_model, load_state, save_checkpoint
from chargpt.checkpoint import format as checkpoint_format
from chargpt.checkpoint.folder import point_to
from chargpt.config import SampleConfig, TokenizerConfig, override
from chargpt.errors import ChargptError, CheckpointError
from chargpt.generation import generate_text
from chargpt.models import build_model
from chargpt.tokenizers import build_tokenizer

FILES = ("checkpoint.json", "model.safetensors", "state.safetensors", "tokenizer.json")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with runs.one_thread():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with every kind of state."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    runs.train(folder, override(runs.CASES["transformer-muon-random-ema"], ["max_steps=4", "eval_interval=2"]))
    return folder


@pytest.fixture
def saved(trained: Path, tmp_path: Path) -> Path:
    """A copy of its last checkpoint, to be damaged."""
    return Path(shutil.copytree(trained / "last", tmp_path / "saved"))


def refused(folder: Path, name: str = "checkpoint.json") -> None:
    """Both ways to load refuse the folder, where they read the damaged file `name`."""
    for load in {"state.safetensors": [load_state], "tokenizer.json": [load_model]}.get(name, [load_model, load_state]):
        with pytest.raises(CheckpointError) as error:
            load(folder)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Change checkpoint.json as somebody would who knows how it is sealed, and hash every file anew."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_bytes())["content"]
    for name in content["files"]:
        content["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if change is not None:
        change(content)
    path.write_bytes(checkpoint_format._seal(content))


# ------------------------------------------------------------------------------------------------------- what is loaded


def test_what_was_saved_is_loaded(trained: Path) -> None:
    model, tokenizer = load_model(trained / "last")
    assert not model.training
    for name, tensor in load_file(trained / "last" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.decode(tokenizer.encode("to be 🙂 мир")) == "to be 🙂 мир"
    weights, state, plain = load_state(trained / "last")
    assert plain["step"] == 4
    assert {name.partition("/")[0] for name in state} == {"average", "batches", "dropout", "optimizer", "weights"}
    assert weights.keys() == model.state_dict().keys()


def test_loading_touches_no_random_stream(trained: Path) -> None:
    before = torch.get_rng_state()
    load_model(trained)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_folder_means_its_best_checkpoint_else_its_last(trained: Path, tmp_path: Path) -> None:
    assert find_checkpoint(trained) == trained / "best"
    assert find_checkpoint(trained / "last") == trained / "last"
    copy = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    (copy / "best").unlink()
    assert find_checkpoint(copy) == copy / "last"


@pytest.mark.parametrize("name", ["nothing", "empty", "a-file", "a-file/below"])
def test_a_path_without_a_checkpoint_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("text")
    with pytest.raises(CheckpointError, match=r"does not exist|holds no checkpoint"):
        load_model(tmp_path / name)


def test_a_checkpoint_copied_elsewhere_alone_samples_the_same(trained: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(trained / "best", tmp_path / "elsewhere" / "model"))
    texts = [
        generate_text(*load_model(folder), "to be", SampleConfig(max_new_tokens=40)) for folder in (trained, there)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 45


def test_exporting_twice_gives_the_same_bytes_and_no_training_state(trained: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_checkpoint(trained, tmp_path / name)
    export_checkpoint(trained, tmp_path / "b")  # over the one that is there
    export_checkpoint(tmp_path / "a", tmp_path / "c")  # an export of an export
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert contents[0] == contents[1] == contents[2]
    assert contents[0].keys() == {"checkpoint.json", "model.safetensors", "tokenizer.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="not a run to go on with"):
        load_state(tmp_path / "a")
    config = SampleConfig(max_new_tokens=20)
    assert generate_text(*load_model(tmp_path / "a"), "", config) == generate_text(*load_model(trained), "", config)


def test_others_may_read_a_checkpoint(trained: Path) -> None:
    """The temporary folder and files that it was written as are private."""
    folder = (trained / "last").resolve()
    assert folder.stat().st_mode & 0o777 == 0o755
    modes = {path.name: path.stat().st_mode & 0o444 for path in folder.iterdir()}
    assert modes == dict.fromkeys(FILES, 0o444)


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_a_file_truncated_anywhere_is_an_error(name: str, saved: Path) -> None:
    whole = (saved / name).read_bytes()
    rng = random.Random(name)
    for length in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1, *rng.sample(range(len(whole)), 20)}:
        (saved / name).write_bytes(whole[:length])
        refused(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_anywhere_is_an_error(name: str, saved: Path) -> None:
    whole = (saved / name).read_bytes()
    rng = random.Random(name)
    for position in {0, len(whole) - 1, *rng.sample(range(len(whole)), 40)}:
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.randrange(8)
        (saved / name).write_bytes(changed)
        refused(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_is_an_error(name: str, saved: Path) -> None:
    with (saved / name).open("ab") as file:
        file.write(b"\n")
    refused(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error(name: str, saved: Path) -> None:
    (saved / name).unlink()
    refused(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_an_error(name: str, saved: Path) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    refused(saved)


def test_whitespace_changed_in_the_description_is_an_error(saved: Path) -> None:
    """The same JSON in other bytes was not written by us."""
    path = saved / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_bytes())), encoding="utf-8")
    refused(saved)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"content": 1, "sha256": ""}', '{"content": {}}', "[" * 100_000, "\ud800", "1e999"],
    ids=["empty", "null", "list", "object", "number", "unsealed", "deep", "surrogate", "infinity"],
)
def test_json_that_is_no_description_is_an_error(text: str, saved: Path) -> None:
    (saved / "checkpoint.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(version=2),
        lambda content: content.update(format="another"),
        lambda content: content.pop("format"),
        lambda content: content.pop("files"),
        lambda content: content["files"].pop("model.safetensors"),
        lambda content: content["files"].pop("tokenizer.json"),
        lambda content: content["files"].update({"../../etc/passwd": "0" * 64}),
        lambda content: content["files"].update({"/etc/passwd": "0" * 64}),
        lambda content: content["files"].update({"more.safetensors": "0" * 64}),
        lambda content: content.update(files=[]),
        lambda content: content.pop("training"),
    ],
    ids=[
        *("version", "format", "no format", "no files", "weights unlisted", "tokenizer unlisted"),
        *("a path upwards", "an absolute path", "an unknown file", "files a list", "no training"),
    ],
)
def test_a_description_sealed_anew_is_checked_all_the_same(
    change: Callable[[dict[str, Any]], Any], saved: Path
) -> None:
    reseal(saved, change)
    refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(vocab_size=7),
        lambda content: content.update(vocab_size=float("inf")),
        lambda content: content.update(vocab_size=-1),
        lambda content: content.update(vocab_size="many"),
        lambda content: content.update(tokenizer="0" * 64),
        lambda content: content.update(model=None),
        lambda content: content["model"].update(kind="unknown"),
        lambda content: content["model"].update(extra=1),
        lambda content: content["model"].update(n_embd=16),
        lambda content: content["model"].update(n_layer=2),
        lambda content: content["model"].update(n_head=3),
    ],
    ids=[
        *("vocab smaller", "vocab infinite", "vocab negative", "vocab text", "tokenizer", "no model", "kind"),
        *("extra knob", "wider", "deeper", "heads"),
    ],
)
def test_a_model_that_does_not_fit_its_weights_is_an_error(
    change: Callable[[dict[str, Any]], Any], saved: Path
) -> None:
    reseal(saved, change)
    with pytest.raises(ChargptError, match=str(saved)):
        load_model(saved)


def test_a_seal_does_not_hang_on_the_order_of_the_keys() -> None:
    one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert json.loads(checkpoint_format._seal(one)) == json.loads(checkpoint_format._seal(other))


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_tensors_too_few_or_too_many_are_an_error(name: str, trained: Path, tmp_path: Path) -> None:
    for number, change in enumerate(("drop", "add", "reshape")):
        run = Path(shutil.copytree(trained, tmp_path / str(number), symlinks=True))
        (run / "metrics.json").unlink()  # so that it could go on
        path = run / "last" / name
        tensors = load_file(path)
        first = sorted(tensors)[0] if name.startswith("model") else "weights/token_embedding.weight"
        if change == "drop":
            del tensors[first]
        elif change == "add":
            tensors["extra/tensor"] = torch.zeros(3)
        else:
            tensors[first] = tensors[first].flatten()[:-1].clone()
        save_file(tensors, path)
        reseal(run / "last")
        with pytest.raises(CheckpointError):
            runs.train(run, override(runs.CASES["transformer-muon-random-ema"], ["max_steps=4", "eval_interval=2"]))


def test_every_stream_weight_and_count_is_needed_to_go_on(trained: Path, tmp_path: Path) -> None:
    config = override(runs.CASES["transformer-muon-random-ema"], ["max_steps=4", "eval_interval=2"])
    whole = load_file(trained / "last" / "state.safetensors")
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    (run / "metrics.json").unlink()
    for name in (name for name in whole if not name.startswith("optimizer/")):
        save_file({other: tensor for other, tensor in whole.items() if other != name}, run / "last/state.safetensors")
        reseal(run / "last")
        with pytest.raises(CheckpointError):
            runs.train(run, config)


@pytest.mark.parametrize("key", ["identity", "step", "history", "best"])
def test_plain_state_that_lacks_a_part_is_an_error(key: str, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    (run / "metrics.json").unlink()
    reseal(run / "last", lambda content: content["training"].pop(key))
    with pytest.raises(CheckpointError):
        runs.train(run, override(runs.CASES["transformer-muon-random-ema"], ["max_steps=4", "eval_interval=2"]))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_in_place_of_a_file_is_never_run(name: str, resealed: bool, write: str, saved: Path) -> None:
    bomb = Bomb(saved.parent / "exploded")
    if write == "pickle":
        (saved / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"weights": bomb}, saved / name)
    if resealed:
        reseal(saved)
    for load in (load_model, load_state):
        if (load, name) in ((load_state, "tokenizer.json"), (load_model, "state.safetensors")):
            continue  # it does not read that
        with pytest.raises(ChargptError):
            load(saved)
    assert not bomb.path.exists()


def test_the_tokenizer_of_another_text_is_an_error(saved: Path) -> None:
    model, _ = load_model(saved)
    build_tokenizer(TokenizerConfig(), "another text").save(saved / "tokenizer.json")
    refused(saved, "tokenizer.json")
    reseal(saved)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_model(saved)
    # as many symbols, but others
    symbols = "".join(chr(0x4E00 + i) for i in range(model.vocab_size))
    build_tokenizer(TokenizerConfig(), symbols).save(saved / "tokenizer.json")
    reseal(saved)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_model(saved)


def test_going_on_from_a_damaged_checkpoint_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with runs.Moments(folder, stop_at(60)), pytest.raises(KeyboardInterrupt):
        runs.train(folder)
    path = folder / "last" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "run.json"}
    with pytest.raises(CheckpointError, match="truncated or was altered"):
        runs.train(folder)
    assert {file: file.read_bytes() for file in before} == before


# ----------------------------------------------------------------------------------------------- a save that goes wrong


def stop_at(moment: int) -> Callable[[int, str], None]:
    def at(number: int, what: str) -> None:
        if number == moment:
            raise KeyboardInterrupt

    return at


SHORT = override(runs.BIGRAM, ["max_steps=2", "eval_interval=2", "log_interval=3"])


def loadable(folder: Path) -> None:
    for name in ("last", "best"):
        if os.path.lexists(folder / name):
            load_model(folder / name)
            load_state(folder / name)


def test_ctrl_c_at_every_moment_leaves_a_run_that_goes_on_bitwise(tmp_path: Path) -> None:
    moments = runs.count_moments(tmp_path / "whole", SHORT)
    whole = runs.result(tmp_path / "whole")
    for moment in range(1, moments + 1, 2):  # test_resume.py takes every one
        folder = tmp_path / str(moment)
        with runs.Moments(folder, stop_at(moment)), pytest.raises(KeyboardInterrupt):
            runs.train(folder, SHORT)
        loadable(folder)
        if not (folder / "metrics.json").exists():
            runs.train(folder, SHORT)
        assert runs.result(folder) == whole, moment


def test_a_full_disk_at_every_moment_is_one_clear_error_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    moments = runs.count_moments(tmp_path / "whole", SHORT)
    whole = runs.result(tmp_path / "whole")
    failures = 0
    for moment in range(1, moments + 1, 2):  # test_resume.py takes every one
        folder = tmp_path / str(moment)
        failure: Exception | None = None
        try:
            with runs.Moments(folder, runs.disk_full(moment)):
                runs.train(folder, SHORT)
        except (OSError, CheckpointError) as error:
            failure, failures = error, failures + 1
        assert failure is None or "No space left on device" in str(failure)
        if isinstance(failure, OSError):
            assert failure.errno == errno.ENOSPC  # which user_errors turns into a sentence
        loadable(folder)
        if not (folder / "metrics.json").exists():
            runs.train(folder, SHORT)
        assert runs.result(folder) == whole, moment
    assert failures > moments // 4


def test_a_failed_save_keeps_what_was_there_and_leaves_no_trace(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(saved)
    target = tmp_path / "target"
    export_checkpoint(saved, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def no_fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", no_fsync)
    with pytest.raises(CheckpointError, match=r"could not save a checkpoint to .*: Input/output error"):
        save_checkpoint(target, model, tokenizer, {"step": 9})
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "target"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(saved)
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file" / "below", tmp_path / "file" / "further" / "below"):
        with pytest.raises(CheckpointError, match="could not save"):
            save_checkpoint(target, model, tokenizer, {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_one_clear_error_and_the_run_goes_on(small_disk: Path, tmp_path: Path) -> None:
    folder, ballast = small_disk / "run", small_disk / "ballast"
    config = runs.BIGRAM
    runs.train(tmp_path / "whole", config)
    steps = iter(range(100))

    def fill(number: int, what: str) -> None:
        if what == "step" and next(steps) == 8:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))

    with runs.Moments(folder, fill), pytest.raises((CheckpointError, OSError)) as full:
        runs.train(folder, config)
    assert "No space left on device" in str(full.value)
    assert str(folder) in str(full.value)
    loadable(folder)
    assert load_state(folder / "last")[2]["step"] == 6
    ballast.unlink()
    runs.train(folder, config)
    assert runs.result(folder) == runs.result(tmp_path / "whole")


def test_seeding_names_never_share_a_stream() -> None:
    seeds = {training.stream_seed(seed, name) for seed in range(50) for name in ("init", "batches", "dropout")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
    models = [build_model(runs.TRANSFORMER.model, 5, training.stream_seed(seed, "init")) for seed in (1, 1, 2)]
    assert torch.equal(models[0].token_embedding.weight, models[1].token_embedding.weight)
    assert not torch.equal(models[0].token_embedding.weight, models[2].token_embedding.weight)


def test_everything_is_flushed_to_disk_before_a_name_leads_to_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves what was flushed: files, then the folder of their names, then the name of the folder."""
    model, tokenizer = load_model(saved)
    run = tmp_path / "run"
    run.mkdir()
    happened = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def name_of(path: Path) -> str:
        return "(temporary)" if path.name.startswith(".") else path.name

    def sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        happened.append(f"flush {name_of(path)}")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        happened.append(f"rename to {target.name}")
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Path:
        happened.append(f"replace {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    save_checkpoint(run / "step-000001", model, tokenizer, {}, {"x": torch.zeros(1)})
    point_to(run, "last", "step-000001")
    named = happened.index("rename to step-000001")
    flushed = {line.removeprefix("flush ") for line in happened[:named] if line.startswith("flush ")}
    assert {"model.safetensors", "state.safetensors", "checkpoint.json", "(temporary)"} <= flushed
    assert happened[named - 1] == "flush (temporary)"  # the folder, once it has all names
    assert happened[named + 1 :] == ["flush run", "replace last", "flush run"]
