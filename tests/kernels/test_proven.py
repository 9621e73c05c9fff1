"""Where "auto" may take a GPU's kernels: only what the GPU suite's results prove, and a file that says exactly that."""

import copy
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chargpt.kernels import describe_backends, proven

ROOT = Path(__file__).parents[2]
H100 = {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "torch": "2.11.0+cu130", "time": "2026-07-01T10:00:00Z"}
OPERATIONS = proven.OPERATIONS
DTYPES = ("float32", "float16", "bfloat16")
NO_MEMORY = "needs 20 GB of the GPU's memory, 11.3 GB are free"


def passed() -> dict[str, Any]:
    """What a run leaves in which nothing is wrong. A check of each implementation found too little memory."""
    rows = [
        f"{operation} {name} {dtype}"
        for name in ("cuda", "triton")
        for operation in OPERATIONS[name]
        for dtype in DTYPES
    ]
    table: dict[str, Any] = {row: {"passed": 59} for row in rows}
    table |= {f"both operations {name} bfloat16": {"passed": 7, "skipped": 1} for name in ("cuda", "triton")}
    skipped = {
        f"both operations {name} bfloat16 attention_beyond_2^31_elements": NO_MEMORY for name in ("cuda", "triton")
    }
    notes = {"checks": 724, "passed": 722, "table": table, "failed": {}, "skipped": skipped}
    steps = {"cases": {"ended": H100["time"], "torch": H100["torch"]}}
    # The build is of a later run of other steps, as the suite merges them.
    machine = H100 | {"torch": "2.12.0", "time": "2026-08-01T10:00:00Z"}
    return {"dry": False, "steps": steps, "build": {"notes": {"machine": machine}}, "cases": {"notes": notes}}


def put(folder: Path, name: str, content: Any, ended: str = H100["time"], **machine: str) -> None:
    content = copy.deepcopy(content)
    content["steps"]["cases"]["ended"] = ended
    content["build"]["notes"]["machine"] |= machine
    (folder / name).write_text(json.dumps(content))


def test_the_package_says_what_the_results_of_this_repository_prove() -> None:
    assert proven.read(proven.FILE) == proven.record(ROOT / "benchmarks" / "results")


def test_the_file_is_a_part_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert proven.FILE.name in declared["chargpt.kernels"]


def test_a_run_without_a_fault_is_a_pass_of_both(tmp_path: Path) -> None:
    assert proven.record(tmp_path) == {"cuda": {}, "triton": {}}
    put(tmp_path, "gpu-h100.json", passed())
    put(tmp_path, "gpu-rtx-4090.json", passed(), capability="8.9", device="NVIDIA GeForce RTX 4090")
    (tmp_path / "attention.json").write_text("{}")  # the results of a CPU lie in the same folder
    entry = {name: H100[name] for name in ("device", "time", "torch")} | {"results": "gpu-h100.json", "checks": 361}
    other = entry | {"device": "NVIDIA GeForce RTX 4090", "results": "gpu-rtx-4090.json"}
    kinds = {"9.0": entry, "8.9": other}
    more = {kind: one | {"checks": 361 + 3 * 59} for kind, one in kinds.items()}  # it has the norm, in three dtypes
    assert proven.record(tmp_path) == {"cuda": kinds, "triton": more}


def fail(name: str) -> Callable[[dict[str, Any]], None]:
    """As `benchmarks.gpu.cases` notes a check that failed or was not run."""

    def change(content: dict[str, Any]) -> None:
        notes = content["cases"]["notes"]
        row = notes["table"][" ".join(name.split()[:-1])]
        row |= {"passed": row["passed"] - 1, "failed": 1}
        notes["failed"][name] = ["was not run: no time was left"]

    return change


def in_cases(part: str, *names: str, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """Set, or without a value remove, entries of one part of what the checks left."""

    def change(content: dict[str, Any]) -> None:
        for name in names:
            content["cases"]["notes"][part].pop(name, None)
            content["cases"]["notes"][part] |= {} if value is None else {name: value}

    return change


@pytest.mark.parametrize(
    "change",
    [
        fail("causal_attention cuda float32 T7"),
        fail("both operations cuda bfloat16 two_host_threads"),
        in_cases("failed", "softmax_cross_entropy cuda float16 V3", value=["gradient is wrong"]),
        in_cases("table", "softmax_cross_entropy cuda float16", value={"passed": 58, "failed": 1}),
        in_cases("table", "causal_attention cuda bfloat16"),
        in_cases("table", "softmax_cross_entropy cuda float32", value={"skipped": 59}),
        in_cases("table", *(f"softmax_cross_entropy cuda {dtype}" for dtype in DTYPES)),
        in_cases("skipped", "causal_attention cuda float32 T7", value="nobody felt like it"),
    ],
    ids=[
        "failed",
        "failed around",
        "only listed",
        "only counted",
        "a dtype",
        "only skipped",
        "an operation",
        "left out",
    ],
)
def test_one_fault_of_one_implementation_is_no_pass_of_it_alone(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = passed()
    change(content)
    put(tmp_path, "gpu-h100.json", content)
    found = proven.record(tmp_path)
    assert found["cuda"] == {}
    assert list(found["triton"]) == ["9.0"]


@pytest.mark.parametrize("missing", ["cases", "build"])
def test_a_run_that_did_not_get_there_proves_nothing(tmp_path: Path, missing: str) -> None:
    content = passed()
    put(tmp_path, "gpu-dry.json", content | {"dry": True})
    del content[missing]
    (tmp_path / "gpu-h100.json").write_text(json.dumps(content))
    assert proven.record(tmp_path) == {"cuda": {}, "triton": {}}


def test_cards_of_one_kind_must_all_pass(tmp_path: Path) -> None:
    """There is one file for each card, which the next run on it replaces."""
    put(tmp_path, "gpu-h100.json", passed())
    put(tmp_path, "gpu-h200.json", passed(), device="NVIDIA H200", ended="2026-07-02T10:00:00Z")
    found = proven.record(tmp_path)
    assert {kinds["9.0"]["device"] for kinds in found.values()} == {"NVIDIA H200"}  # the newest
    content = passed()
    fail("causal_attention cuda float32 T7")(content)
    put(tmp_path, "gpu-h100.json", content)
    assert {name: list(kinds) for name, kinds in proven.record(tmp_path).items()} == {"cuda": [], "triton": ["9.0"]}
    table = content["cases"]["notes"]["table"]
    for row in [row for row in table if " cuda " in row]:
        del table[row]
    content["cases"]["notes"]["failed"].clear()
    put(tmp_path, "gpu-h100.json", content)  # where CUDA could not be built nothing is said about it
    assert proven.record(tmp_path) == found


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"dry": false, "build": {}, "cases": {"notes": 3}}', json.dumps(passed()).replace("float32", "fp32")],
    ids=["empty", "a list", "parts missing", "names of another kind"],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "gpu-x.json").write_text(content)
    with pytest.raises(ValueError, match=r"gpu-x\.json is no result of `make gpu`"):
        proven.record(tmp_path)


# ------------------------------------------------------------------------------------------------- on a machine's GPUs


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine with these GPUs, and a file that holds `content`."""

    def make(*gpus: tuple[int, int], content: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: gpus[index])
        (tmp_path / "proven.json").write_bytes(content.encode(errors="surrogateescape"))
        monkeypatch.setattr(proven, "FILE", tmp_path / "proven.json")

    return make


@pytest.mark.parametrize(
    ("gpus", "missing"),
    [
        ([], None),
        ([(9, 0)], None),
        ([(9, 0), (8, 0), (9, 0)], None),
        ([(8, 6)], "8.6"),
        ([(12, 0), (9, 0), (8, 6), (12, 0)], "8.6 and 12.0"),
    ],
    ids=str,
)
def test_every_gpu_of_the_machine_must_be_of_a_recorded_kind(
    machine: Callable[..., None], gpus: list[tuple[int, int]], missing: str | None
) -> None:
    machine(*gpus, content=json.dumps({"cuda": {"9.0": {}, "8.0": {}}, "triton": {}}))
    sentence = (
        f"no pass of `make gpu` is recorded for compute capability {missing}; `chargpt info --check` checks them here"
    )
    assert proven.why_not("cuda") == (None if missing is None else sentence)
    assert (proven.why_not("triton") is None) == (not gpus)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"cuda": {}}',
        '{"cuda": [], "triton": {}}',
        '{"cuda": {"9.0": 1}, "triton": {}}',
        "\udcff",
    ],
)
def test_a_damaged_file_is_a_reason_and_no_crash(machine: Callable[..., None], content: str) -> None:
    machine((9, 0), content=content)
    assert proven.why_not("cuda") == (
        f"{proven.FILE}, the record of passes of `make gpu`, is missing or damaged; install chargpt again"
    )
    machine(content=content)
    assert proven.why_not("cuda") is None  # nobody needs it without a GPU


def test_a_missing_file_likewise(machine: Callable[..., None]) -> None:
    machine((9, 0), content="")
    proven.FILE.unlink()
    assert "is missing or damaged; install chargpt again" in str(proven.why_not("triton"))
    assert len(describe_backends()) == 4


def test_importing_the_kernels_does_not_read_it() -> None:
    script = """
import sys
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given)) if event == "open" else None)
import chargpt.kernels
print(*(any(name in given for given in opened) for name in ("proven.py", "proven.json")))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
