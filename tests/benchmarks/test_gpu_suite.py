"""What `make gpu` does besides measuring: budgets, restarts, reports. The whole of it runs as `make gpu DRY=1`."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import attention, cases, program, report, sanitize, time_to_loss
from benchmarks.gpu.program import BROKEN, Program

ROOT = Path(__file__).parents[2]


def fake_steps(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> tuple[suite.Stage, ...]:
    """Stages of one step each, whose programs are these texts; RESULT is where they write."""
    package = folder / "fake_steps"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in programs.items():
        start = "import json, pathlib, sys, time\nRESULT = pathlib.Path(sys.argv[sys.argv.index('--result') + 1])\n"
        (package / f"{name}.py").write_text(start + text, encoding="utf-8")
    monkeypatch.setattr(suite, "MODULE", "fake_steps")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tuple(suite.Stage(3, (suite.Step(name, name),)) for name in programs)


KEEP = "RESULT.write_text(json.dumps({'notes': {'kept': True}, 'measurements': []}))\n"


def run(stages: tuple[suite.Stage, ...], folder: Path) -> tuple[list[str], dict[str, Any]]:
    failed = suite.run(stages, folder, folder / "results", dry=True)
    return failed, json.loads((folder / "results" / "gpu-unknown.json").read_text(encoding="utf-8"))


def test_a_step_that_fails_or_hangs_costs_no_other_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs = KEEP + "import subprocess; subprocess.Popen(['sleep', '60']).wait()"
    stages = fake_steps(monkeypatch, tmp_path, good=KEEP, bad=KEEP + "sys.exit('the reason')", hangs=hangs, last=KEEP)
    started = time.time()
    failed, content = run(stages, tmp_path)
    assert time.time() - started < 30
    assert failed == ["bad", "hangs"]
    statuses = {step["step"]: step["status"] for step in content["steps"]}
    assert statuses == {
        "good": "done",
        "bad": "failed with exit code 1",
        "hangs": "stopped, out of time",
        "last": "done",
    }
    assert all(content[name]["notes"]["kept"] for name in statuses)
    assert "the reason" in capsys.readouterr().out


def test_a_program_that_lost_its_gpu_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = f"if not RESULT.exists():\n    {KEEP}    sys.exit({BROKEN})"
    failed, content = run(fake_steps(monkeypatch, tmp_path, breaks=broken), tmp_path)
    assert failed == []
    assert content["breaks"]["notes"]["kept"]


def test_copies_go_to_the_folder_that_the_caller_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages = fake_steps(monkeypatch, tmp_path, good=KEEP + "print('said')")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    suite.run(stages, tmp_path, tmp_path / "results", dry=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"gpu-unknown.{e}" for e in ("json", "md", "log")}
    assert "said" in (tmp_path / "out" / "gpu-unknown.log").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- programs


@pytest.fixture
def dry_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return make_program(monkeypatch, tmp_path)


def make_program(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> Program:
    monkeypatch.setattr(sys, "argv", ["program", "--dry", "--result", str(folder / "result.json"), *options])
    before = torch.get_num_threads()
    try:
        return Program("")
    finally:
        torch.set_num_threads(before)


def test_who_refuses_is_recorded_with_the_reason(dry_program: Program) -> None:
    def refuse() -> None:
        raise RuntimeError("no kernel for this\nand more")

    times = dry_program.time(
        "case", {"a": lambda: time.sleep(0.002), "b": refuse, "c": int}, {"d": "absent"}, seconds=0
    )
    assert times is not None
    assert times.refused == {"b": "no kernel for this", "d": "absent"}
    assert times.summary()["rounds"] == 5
    assert times.best(["a", "b", "c"]) == "c"
    assert times.ratio("a", "c") > 10


def test_without_time_a_case_is_skipped_and_on_a_second_run_what_is_done_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    late = make_program(monkeypatch, tmp_path, "--deadline", "1")
    assert late.time("first", {"a": int}, {}, seconds=0) is None
    assert late.content["measurements"] == [{"case": "first", "skipped": "no time was left"}]
    again = make_program(monkeypatch, tmp_path)
    assert again.time("first", {"a": int}, {}, seconds=0) is None
    assert again.time("second", {"a": int}, {}, seconds=0) is not None


def test_who_broke_the_context_is_left_out_of_the_next_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = []

    def synchronize() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first = make_program(monkeypatch, tmp_path)
    monkeypatch.setattr(first, "synchronize", synchronize)
    with pytest.raises(SystemExit) as end:
        first.time("case", {"good": int, "bad": lambda: broken.append(1), "later": int}, {}, seconds=0)
    assert end.value.code == BROKEN
    second = make_program(monkeypatch, tmp_path)
    times = second.time("case", {"good": int, "bad": int, "later": int}, {}, seconds=0)
    assert times is not None
    assert [*times.times] == ["good", "later"]
    assert times.refused["bad"].startswith("broke the CUDA context in case: CUDA error")


def test_attention_competes_with_every_backend(dry_program: Program) -> None:
    attention.measure(dry_program, (2, 3, 8, 16))
    forward, both = json.loads(dry_program.result.read_text(encoding="utf-8"))["measurements"]
    for measured in (forward, both):
        assert {*measured["tflops"], *measured["refused"]} >= {"torch", "flash", "cudnn", "efficient", "math"}
        assert measured["best_backend"] in ("flash", "math")
    useful = 2 * 2 * 3 * 8 * 8 * 16
    assert forward["tflops"]["math"] == pytest.approx(useful / (1e9 * forward["milliseconds"]["math"]))


def test_twins_of_the_training_model_agree() -> None:
    from benchmarks.gpu.training import TINY, TORCH, build

    idx = torch.randint(65, (2, TINY.block_size))
    losses = []
    for kernels in ("torch", TORCH):
        model = build(TINY, 65, kernels, torch.device("cpu")).eval()
        losses.append(model(idx, idx)[1])
    torch.testing.assert_close(losses[0], losses[1])


def test_another_text_than_tiny_shakespeare_is_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time_to_loss, "CORPUS", tmp_path / "corpus.txt")
    assert "is not here" in str(time_to_loss.shakespeare())
    (tmp_path / "corpus.txt").write_text("Call me Ishmael.", encoding="utf-8")
    assert "is not Tiny Shakespeare" in str(time_to_loss.shakespeare())


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 3),
        ("killed", None),
    ],
)
def test_the_sanitizers_summary_is_understood(text: str, errors: int | None) -> None:
    assert sanitize.count_errors(text) == errors


# ---------------------------------------------------------------------------------------------------------------- cases


def test_a_check_that_ends_its_process_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The worker is a stand-in that dies of its second check, and stops for a broken context at its third."""
    share = [
        cases.Check(name, "operation", "impl", "dtype", "family", list) for name in ("one", "two", "three", "four")
    ]
    stand_in = f"""
import json, os, sys
skip, lines = (int(sys.argv[sys.argv.index("--skip") + 1]), sys.argv[sys.argv.index("--result") + 1])
for name in {[str(check) for check in share]!r}[skip:]:
    if name.endswith("two"):
        os._exit(139)
    with open(lines, "a") as file:
        file.write(json.dumps({{"check": name, "problems": ["wrong"] if name.endswith("three") else []}}) + "\\n")
    if name.endswith("three"):
        os._exit({BROKEN})
"""
    worker = cases.Worker([sys.executable, "-c", stand_in], 0, share, tmp_path / "result.json")
    started = time.time()
    while worker.goes_on() and time.time() - started < 60:
        time.sleep(0.05)
    summary = cases.summary(share, worker.stop())
    assert summary["table"] == {"operation impl dtype": {"passed": 2, "failed": 2}}
    assert summary["failed"] == {
        "operation impl dtype two": ["ended the process with exit code 139"],
        "operation impl dtype three": ["wrong"],
    }


def test_a_check_that_hangs_is_reported_and_what_was_not_run_too(tmp_path: Path) -> None:
    share = [cases.Check(name, "operation", "impl", "dtype", "family", list) for name in ("one", "two")]
    worker = cases.Worker([sys.executable, "-c", "import time; time.sleep(60)"], 0, share, tmp_path / "result.json")
    assert worker.goes_on()
    failed = cases.summary(share, worker.stop())["failed"]
    assert [*failed.values()] == [["had not ended when the time was over"], ["was not run: no time was left"]]


# --------------------------------------------------------------------------------------------------------------- report


def attention_result(T: int, passes: str, **ratio: float) -> dict[str, Any]:
    shape = (1, 2, T, 64)
    tflops = {"cuda": 1.0, "flash": 2.0}
    kept = {"refused": {"cudnn": "no plan"}, "spread": {"cuda": 0.01}, "tflops": tflops, "best_backend": "flash"}
    return {"case": f"{shape} {passes}", "shape": shape, "passes": passes, "ratio": ratio, **kept}


def verdicts(**steps: Any) -> dict[str, tuple[str, str]]:
    return {goal: (verdict, told) for goal, verdict, told in report.judged({"dry": False, "steps": [], **steps})}


def test_a_goal_holds_where_its_worst_case_does() -> None:
    measured = [attention_result(T, "forward", cuda=r, triton=0.8) for T, r in ((64, 1.3), (512, 1.21), (1024, 0.5))]
    found = verdicts(attention={"measurements": measured})
    (cuda,) = (value for goal, value in found.items() if goal.startswith("CUDA") and goal.endswith("forward"))
    assert cuda == ("met", "least 1.21, at (1, 2, 512, 64) forward; reached in 2 of 2 cases")
    (triton,) = (value for goal, value in found.items() if goal.startswith("Triton") and goal.endswith("forward"))
    assert triton[0] == "missed"
    measured.append(attention_result(128, "forward", cuda=1.19))
    assert "missed" in str(verdicts(attention={"measurements": measured}))
    measured.append(attention_result(256, "forward", triton=1.0))  # cuda did not run
    found = verdicts(attention={"measurements": measured})
    assert any(goal.startswith("CUDA") and value[0] == "not measured" for goal, value in found.items())


def test_the_faster_entry_of_triton_counts() -> None:
    measured = [attention_result(1024, "forward", **{"triton": 0.8, "triton autotuned": 0.95})]
    found = verdicts(attention={"measurements": measured})
    assert any(goal.startswith("Triton") and value[0] == "met" for goal, value in found.items())


def test_cross_entropy_goals() -> None:
    def measured(V: int, share: float, ratio: float) -> dict[str, Any]:
        case = {"case": f"(8, {V})", "shape": (8, V), "dtype": "bfloat16", "refused": {}, "spread": {}}
        speeds = {"gigabytes_per_second": {"cuda": 3000.0}, "share_of_copy": {"cuda": share}}
        return {**case, **speeds, "ratio": {"cuda": {"eager": 4.0, "compiled": ratio}}}

    def judged(*cases: dict[str, Any]) -> list[str]:
        found = verdicts(cross_entropy={"measurements": list(cases)})
        return [value[0] for goal, value in found.items() if goal.startswith("cuda cross-entropy")]

    assert judged(measured(50257, 0.86, 2.1), measured(65, 0.3, 2.0)) == ["met", "met"]
    assert judged(measured(50257, 0.84, 2.1), measured(65, 0.9, 1.9)) == ["missed", "missed"]
    assert judged(measured(65, 0.9, 3.0)) == ["not measured", "met"]


def test_the_page_shows_what_is_there_and_why_the_rest_is_not() -> None:
    results = {
        "dry": False,
        "steps": [{"step": "attention", "budget": 80, "seconds": 80.0, "status": "stopped, out of time"}],
        "build": {"notes": {"machine": {"device": "NVIDIA H200", "driver": "580"}, "implementations": {}}},
        "cases": {
            "notes": {
                "checks": 2,
                "passed": 1,
                "table": {"causal_attention cuda float32": {"passed": 1, "failed": 1}},
                "failed": {"causal_attention cuda float32 T7": ["dQ is wrong"]},
                "skipped": {},
            }
        },
        "memcheck": {"notes": {"errors": 1, "report": ["Invalid __global__ write"]}},
        "attention": {
            "measurements": [
                attention_result(64, "forward", cuda=1.3),
                {"case": "(1, 2, 64, 64) forward and backward", "skipped": "no time was left"},
            ]
        },
        "time_to_loss": {"notes": {"goal": 1.47}, "measurements": [{"case": "all", "skipped": "no text"}]},
    }
    page = report.markdown(results)
    assert report.file_name(results) == "gpu-h200"
    for expected in (
        "# NVIDIA H200",
        "| attention | 80 of 80 | stopped, out of time |",
        "FAILED causal_attention cuda float32 T7: dQ is wrong",
        "memcheck: 1 errors",
        "Invalid __global__ write",
        "racecheck: did not end",
        "cuda 1.30",
        "cudnn did not run in 1 cases: no plan",
        "(1, 2, 64, 64) forward and backward: skipped, no time was left",
        "all: skipped, no text",
    ):
        assert expected in page


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "gpu-h200"), ("NVIDIA GeForce RTX 4090", "gpu-rtx-4090"), ("Tesla T4", "gpu-tesla-t4")],
)
def test_results_are_named_after_the_device(device: str, name: str) -> None:
    assert report.file_name({"build": {"notes": {"machine": {"device": device}}}}) == name


def test_the_driver_tool_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert program.nvidia_smi() is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_dry_run_walks_through_everything_and_keeps_nothing() -> None:
    results = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == results
    passed, checks = done.stdout.split(" checks passed")[0].split("\n")[-1].split(" of ")
    assert int(passed) == int(checks) >= 500
