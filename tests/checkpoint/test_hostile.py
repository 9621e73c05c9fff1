"""Checkpoints made on purpose, sealed as we seal them: each is one sentence, in bounded time and memory."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import reseal

import runs
from chargpt import checkpoint
from chargpt.checkpoint import load_model, load_state
from chargpt.config import TransformerConfig, override
from chargpt.errors import ChargptError, CheckpointError
from chargpt.models import build_model
from chargpt.tokenizers import CharacterTokenizer

CASES = {
    "adamw": override(runs.CASES["bigram-random-ema"], ["max_steps=4", "eval_interval=2", "log_interval=3"]),
    "muon": override(runs.CASES["transformer-muon-random-ema"], ["max_steps=4", "eval_interval=2", "log_interval=3"]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with runs.one_thread():
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of each case that could go on."""
    folders = {}
    for name, config in CASES.items():
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        runs.train(folders[name], config)
        (folders[name] / "metrics.json").unlink()
    return folders


@pytest.fixture
def run(stopped: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    case = getattr(request.node, "callspec", None)
    case = "muon" if case is None else case.params.get("case", "muon")
    return Path(shutil.copytree(stopped[case], tmp_path / "run", symlinks=True))


# -------------------------------------------------------------------------------------------------------------- tensors

OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda x: torch.zeros(0, dtype=x.dtype),
    "a number": lambda x: torch.zeros((), dtype=x.dtype) if x.dim() else torch.zeros(1, dtype=x.dtype),
    "longer": lambda x: torch.cat([x.flatten(), x.flatten()[:1]]),
    "one axis more": lambda x: x[None],
    "bool": lambda x: x.bool(),
    "int8": lambda x: x.to(torch.int8),
    "int32": lambda x: x.to(torch.int32),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_a_run_has_its_name_dtype_and_shape_or_is_refused(case: str, run: Path) -> None:
    """Among them optimizer states of another shape, which once ended the process."""
    rng = random.Random(case)
    for file in ("state.safetensors", "model.safetensors"):
        path = run / "last" / file
        whole = load_file(path)
        for name, tensor in whole.items():
            for what in rng.sample(sorted(OTHERS), 4):
                other = OTHERS[what](tensor).contiguous()
                if (other.dtype, other.shape) == (tensor.dtype, tensor.shape):
                    continue
                save_file(whole | {name: other}, path)
                reseal(run / "last")
                if name == "losses" and what == "longer":
                    continue  # any number of them may wait for the next point of the curve
                with pytest.raises(CheckpointError, match=r"belongs; use another checkpoint|damaged"):
                    runs.train(run, CASES[case])
            for changed in ({k: v for k, v in whole.items() if k != name}, whole | {name + "x": tensor.clone()}):
                if name != "losses" or len(changed) > len(whole):
                    save_file(changed, path)
                    reseal(run / "last")
                    with pytest.raises(CheckpointError):
                        runs.train(run, CASES[case])
        save_file(whole, path)
        reseal(run / "last")
    runs.train(run, CASES[case])  # and whole it goes on


@pytest.mark.parametrize("position", [-1, 2**62])
def test_a_position_outside_any_run_is_damage(position: int, run: Path) -> None:
    path = run / "last" / "state.safetensors"
    save_file(load_file(path) | {"batches/position": torch.tensor(position)}, path)
    reseal(run / "last")
    with pytest.raises(CheckpointError, match="damaged"):
        runs.train(run, CASES["muon"])


# ----------------------------------------------------------------------------------------------------------------- JSON

VALUES: list[Any] = [None, True, -1, 0, 1.5, float("nan"), 10**30, "", "x", [], [1], {}, {"x": 1}, [[]], [[1, 2]]]


def fields(content: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict) and key not in ("identity", "files"):
            yield from fields(value, (*path, key))


def test_every_field_with_every_kind_of_value_is_fine_or_one_sentence(run: Path) -> None:
    last = run / "last"
    whole = (last / "checkpoint.json").read_bytes()
    refusals = 0
    for path in list(fields(json.loads(whole)["content"])):
        for value in VALUES:

            def change(content: dict[str, Any], path: tuple[str, ...] = path, value: Any = value) -> None:
                for key in path[:-1]:
                    content = content[key]
                content[path[-1]] = value

            (last / "checkpoint.json").write_bytes(whole)
            reseal(last, change)
            for use in (load_model, load_state, lambda folder: runs.train(run, CASES["muon"])):
                if use is load_state or path[0] != "summary":
                    try:
                        use(last)
                        (run / "metrics.json").unlink(missing_ok=True)
                    except ChargptError:
                        refusals += 1
    assert refusals > 500


@pytest.mark.parametrize(
    "history",
    [
        *([1], [[1]], [[1, 2]], [[1, {}, 3]], [["1", {}]], [[1, {"val/loss": "low"}]], [[1, {"val/loss": None}]]),
        *([[1, {"val/loss": float("inf")}]], [[-1, {"val/loss": 1.0}]], [[True, {"val/loss": 1.0}]], {"1": {}}),
    ],
)
def test_a_curve_that_is_none_is_damage(history: Any, run: Path) -> None:
    reseal(run / "last", lambda content: content["training"].update(history=history))
    with pytest.raises(CheckpointError, match=r"damaged"):
        load_state(run / "last")


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**6},
        {"n_layer": 20_000},
        {"n_embd": 10**5},
        {"mlp_width": 1e6},
        {"mlp_width": 1e308},
        {"block_size": 10**12},
        {"block_size": 10**12, "position": "rotary"},
        {"n_embd": 10**4000},
    ],
    ids=str,
)
def test_a_model_larger_than_its_weights_is_refused_before_it_is_built(change: dict[str, Any], run: Path) -> None:
    reseal(run / "last", lambda content: content["model"].update(change))
    with limited_memory(), pytest.raises(CheckpointError):
        load_model(run / "last")


@pytest.mark.parametrize("vocab_size", [30_000, 2**31, 10**30])
@pytest.mark.parametrize("case", CASES)
def test_a_vocabulary_larger_than_its_weights_is_refused(vocab_size: int, case: str, run: Path) -> None:
    reseal(run / "last", lambda content: content.update(vocab_size=vocab_size))
    with limited_memory(), pytest.raises(CheckpointError):
        load_model(run / "last")


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "state.safetensors", "tokenizer.json"])
def test_a_sparse_file_is_not_read(name: str, run: Path) -> None:
    os.truncate(run / "last" / name, 3 * 2**30)
    for load in (load_model, load_state):
        if (load, name) not in ((load_model, "state.safetensors"), (load_state, "tokenizer.json")):
            with limited_memory(), pytest.raises(CheckpointError, match="where at most"):
                load(run / "last")


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "/dev/full", "/proc/self/mem"])
@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "tokenizer.json"])
def test_what_is_no_file_neither_hangs_nor_fills_the_memory(name: str, what: str, run: Path) -> None:
    path = run / "last" / name
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(what)
    with limited_memory(), pytest.raises(CheckpointError):
        load_model(run / "last")


class limited_memory:  # noqa: N801
    """Within it the process may take 1 GiB of address space more than it has."""

    def __enter__(self) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


# ------------------------------------------------------------------------------------------------- damage that is none


def test_out_of_memory_and_permission_are_not_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Callable[..., Any]:
        def build(*_: object, **__: object) -> Any:
            raise error

        return build

    message = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    for error in (MemoryError(), RuntimeError(message), torch.OutOfMemoryError("CUDA out of memory")):
        monkeypatch.setattr(checkpoint.format, "build_model", raising(error))
        with pytest.raises(CheckpointError, match="the memory ran out") as caught:
            load_model(run / "last")
        assert "another checkpoint" not in str(caught.value)
    for number, wanted in ((errno.EACCES, "change its permissions"), (errno.EMFILE, "close other programs")):
        monkeypatch.setattr(checkpoint.format, "read_regular", raising(OSError(number, os.strerror(number), "file")))
        with pytest.raises(CheckpointError, match=wanted) as caught:
            load_model(run / "last")
        assert "damaged" not in str(caught.value)


# ------------------------------------------------------------------------------------------- readers while a run trains


def write_steps(folder: Path, steps: range) -> None:
    """As the trainer does, which never writes the same step twice."""
    tokenizer = CharacterTokenizer("abcdef")
    with checkpoint.locked(folder):
        for step in steps:
            model = build_model(TransformerConfig(n_layer=1, n_embd=8, n_head=2, block_size=4), 6, seed=step)
            name = checkpoint.checkpoint_name(step)
            checkpoint.list_checkpoint(folder, name)
            checkpoint.save_checkpoint(folder / name, model, tokenizer, {"step": step})
            for link in ("last", "best"):
                checkpoint.point_to(folder, link, name)
            checkpoint.remove_unreferenced(folder)


def test_a_reader_gets_a_whole_checkpoint_at_every_moment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_steps(folder, range(1))
    writer = multiprocessing.get_context("spawn").Process(target=write_steps, args=(folder, range(1, 150)))
    writer.start()
    seen = set()
    while writer.is_alive():
        model, _ = load_model(folder)
        seen.add(model.token_embedding.weight.sum().item())
    writer.join()
    assert writer.exitcode == 0
    assert len(seen) > 5
