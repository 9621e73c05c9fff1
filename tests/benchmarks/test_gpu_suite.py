"""What `make gpu` does besides measuring: steps, budgets, restarts, reports. All of it runs as `make gpu DRY=1`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import attention, build, cases, counters, program, report, sanitize, time_to_loss, training_step
from benchmarks.gpu.program import BROKEN, Program

ROOT = Path(__file__).parents[2]


Planned = list[tuple[suite.Step, list[suite.Step]]]


def fake_steps(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> Planned:
    """Steps whose programs are these texts; RESULT is where they write. The names of programs are unique."""
    package = folder / "fake_steps"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    for name, text in programs.items():
        start = "import json, pathlib, sys, time\nRESULT = pathlib.Path(sys.argv[sys.argv.index('--result') + 1])\n"
        (package / f"{name}.py").write_text(start + text, encoding="utf-8")
    monkeypatch.setattr(suite, "MODULE", "fake_steps")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return [(suite.Step(name, name, 3), []) for name in programs]


KEEP = "RESULT.write_text(json.dumps({'notes': {'kept': True}, 'measurements': []}))\n"
CARD = "RESULT.write_text(json.dumps({'notes': {'machine': {'device': 'Tesla T4'}}}))\n"


def run(planned: Planned, folder: Path, seconds: float = 12) -> tuple[list[str], dict[str, Any]]:
    failed = suite.run(planned, folder, folder / "results", dry=True, seconds=seconds)
    return failed, json.loads((folder / "results" / "gpu-unknown.json").read_text(encoding="utf-8"))


def test_a_step_that_fails_or_hangs_costs_no_other_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs = KEEP + "import subprocess; subprocess.Popen(['sleep', '60']).wait()"
    planned = fake_steps(monkeypatch, tmp_path, good=KEEP, bad=KEEP + "sys.exit('the reason')", hangs=hangs, last=KEEP)
    started = time.time()
    failed, content = run(planned, tmp_path)
    assert time.time() - started < 30
    assert failed == ["bad", "hangs"]
    statuses = {name: step["status"] for name, step in content["steps"].items()}
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
    planned = fake_steps(monkeypatch, tmp_path, build=CARD, good=KEEP + "print('said')")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    suite.run(planned, tmp_path, tmp_path / "results", dry=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"gpu-tesla-t4.{end}" for end in ("json", "md", "log")}
    assert "said" in (tmp_path / "out" / "gpu-tesla-t4.log").read_text(encoding="utf-8")


def test_what_a_running_step_has_found_survives_a_kill_of_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole suite is killed while its second step runs, as a machine that is taken away does it."""
    fake_steps(monkeypatch, tmp_path, build=CARD, slow=KEEP + "time.sleep(60)")
    program = f"""
import pathlib
from benchmarks.gpu import __main__ as suite
suite.MODULE, suite.OFTEN = "fake_steps", 0.2
folder = pathlib.Path({str(tmp_path)!r})
suite.run([(suite.Step(name, name, 30), []) for name in ("build", "slow")], folder, folder / "results", dry=False)
"""
    found = tmp_path / "out" / "gpu-tesla-t4.json"
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    running = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: found.exists() and "slow" in json.loads(found.read_text(encoding="utf-8")))
    finally:
        running.kill()
        running.wait()
        subprocess.run(["pkill", "-f", "fake_steps.slow"], check=False)
    content = json.loads(found.read_text(encoding="utf-8"))
    assert content["slow"]["notes"]["kept"]
    assert content["steps"]["slow"]["status"] == "running"
    assert "| slow |" in found.with_suffix(".md").read_text(encoding="utf-8")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    started = time.time()
    while not condition():
        assert time.time() - started < seconds
        time.sleep(0.1)


def test_a_second_run_keeps_what_the_first_one_found_on_this_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    other = KEEP.replace("'kept'", "'again'")
    for programs in ({"build": CARD, "one": KEEP, "two": KEEP}, {"build": CARD, "two": other, "three": KEEP}):
        scratch = tmp_path / "-".join(programs)
        scratch.mkdir()
        suite.run(fake_steps(monkeypatch, tmp_path, **programs), scratch, results, dry=False)
    content = json.loads((results / "gpu-tesla-t4.json").read_text(encoding="utf-8"))
    assert {*content["steps"]} == {"build", "one", "two", "three"}
    assert content["one"]["notes"] == {"kept": True}
    assert content["two"]["notes"] == {"again": True}


# ---------------------------------------------------------------------------------------------------------------- steps


def planned(monkeypatch: pytest.MonkeyPatch, *options: str) -> Planned:
    """What would be run."""
    seen: list[Planned] = []
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    monkeypatch.setattr(suite, "run", lambda planned, *_: seen.append(planned) or [])
    monkeypatch.setattr(suite.proven, "main", lambda: None)
    suite.main()
    return seen[0]


def test_all_steps_in_the_order_of_what_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(monkeypatch)
    assert [step.name for step, _ in steps] == [step.name for step in suite.STEPS]
    beside = {step.name: [other.name for other in others] for step, others in steps if others}
    assert beside == {
        "smoke": ["shapes, compiling", "step, compiling"],
        "cases": ["grid, compiling", "cross_entropy, compiling", "time_to_loss, compiling"],
    }
    assert all("--warm" in other.options for _, others in steps for other in others)


def test_steps_can_be_chosen_and_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(monkeypatch, "--steps", "step,smoke,build", "--prebuilt", "somewhere", "--dry")
    assert [step.name for step, _ in steps] == ["build", "step", "smoke"]
    assert steps[0][0].options == ("--prebuilt", "somewhere", "--dry")
    assert not any(others for _, others in steps)  # a dry run times nothing


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--steps", "smoke,shape"], "no step 'shape'; the steps are build, smoke"), (["--seconds", "0"], "positive")],
)
def test_a_step_that_does_not_exist_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as end:
        planned(monkeypatch, *options)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ carried modules


def carried(folder: Path, **record: Any) -> Path:
    """A folder as the rehearsal makes it."""
    folder.mkdir()
    version = {"python": sys.version.split()[0], "torch": torch.__version__, "problem": None, "cuda": "13.0 for 9.0"}
    (folder / "_native.json").write_text(json.dumps(version | record), encoding="utf-8")
    (folder / "_native_cuda.so").write_text("no module", encoding="utf-8")
    (folder / build.STAMP).write_text(build.fingerprint(build.MODULES), encoding="utf-8")
    return folder


def test_carried_modules_are_taken_where_they_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    monkeypatch.setattr(build, "state", lambda: {"problem": None})
    assert build.take(carried(tmp_path / "modules")) is None
    assert (tmp_path / "_native_cuda.so").read_text(encoding="utf-8") == "no module"
    monkeypatch.setattr(build, "state", lambda: {"problem": "it failed to load"})
    assert build.take(tmp_path / "modules") == "it failed to load"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"torch": "2.0.0"}, "was built against torch 2.0.0"),
        ({"python": "3.9.1"}, "was built for Python 3.9.1"),
        ({"cuda": None, "cuda_problem": "no nvcc was found"}, "were not built: no nvcc was found"),
    ],
)
def test_carried_modules_of_another_machine_touch_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    assert said in str(build.take(carried(tmp_path / "modules", **record)))
    assert "was not built" in str(build.take(tmp_path / "nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["modules"]


def test_carried_modules_of_other_sources_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    folder = carried(tmp_path / "modules")
    (folder / build.STAMP).write_text("0123456789abcdef", encoding="utf-8")
    assert "built from other sources" in str(build.take(folder))


def test_the_build_sets_what_an_image_may_have_set_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def call(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(env)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.0")
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(subprocess, "run", call)
    build.build(torch.device("cuda"))  # a build that fails is said, and Triton's part goes on
    assert (seen[0]["TORCH_CUDA_ARCH_LIST"], seen[0]["MAX_JOBS"]) == ("9.0", "16")


def test_the_fingerprint_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "csrc" / "tests").mkdir(parents=True)
    (tmp_path / "csrc" / "a.cu").write_text("one", encoding="utf-8")
    first = build.fingerprint(["csrc", "absent.py"])
    (tmp_path / "csrc" / "tests" / "a_test.cpp").write_text("a test", encoding="utf-8")
    (tmp_path / "csrc" / "proven.json").write_text("{}", encoding="utf-8")
    assert build.fingerprint(["csrc", "absent.py"]) == first
    (tmp_path / "csrc" / "a.cu").write_text("two", encoding="utf-8")
    assert build.fingerprint(["csrc", "absent.py"]) != first


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


def break_the_context(monkeypatch: pytest.MonkeyPatch, program: Program) -> Callable[[], None]:
    """What a contender calls to lose the GPU."""
    broken = []

    def synchronize() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(program, "synchronize", synchronize)
    return lambda: broken.append(1)


def test_who_broke_the_context_is_left_out_of_that_case_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = make_program(monkeypatch, tmp_path)
    breaks = break_the_context(monkeypatch, first)
    with pytest.raises(SystemExit) as end:
        first.time("case", {"good": int, "bad": breaks, "later": int}, {}, seconds=0)
    assert end.value.code == BROKEN
    second = make_program(monkeypatch, tmp_path)
    times = second.time("case", {"good": int, "bad": int, "later": int}, {}, seconds=0)
    assert times is not None
    assert [*times.times] == ["good", "later"]
    assert times.refused["bad"].startswith("broke the CUDA context: CUDA error")
    other = second.time("another case", {"good": int, "bad": int}, {}, seconds=0)
    assert other is not None
    assert [*other.times] == ["good", "bad"]


def test_who_breaks_it_again_and_again_is_left_out_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(program.MOST_FAULTS):
        one = make_program(monkeypatch, tmp_path)
        with pytest.raises(SystemExit):
            one.time(f"case {number}", {"bad": break_the_context(monkeypatch, one)}, {}, seconds=0)
    times = make_program(monkeypatch, tmp_path).time("another", {"good": int, "bad": int}, {}, seconds=0)
    assert times is not None
    assert times.refused == {"bad": "left out after faults in case 0, case 1, case 2"}


@pytest.mark.parametrize("when", ["compiling", "timing"])
def test_a_contender_that_hangs_costs_one_case(tmp_path: Path, when: str) -> None:
    """In a process of its own, which the watchdog ends; the next goes on."""
    result = tmp_path / "result.json"
    text = f"""
import sys, time
sys.argv = ["program", "--dry", "--result", {str(result)!r}]
from benchmarks.gpu.program import Program
calls = []
def hang():
    calls.append(1)
    if len(calls) > {0 if when == "compiling" else 2}:
        time.sleep(60)
program = Program("")
for case in ("one", "two"):
    times = program.time(case, {{"good": int, "bad": hang if case == "one" else int}}, {{}}, seconds=0, patience=0.5)
    if times is not None:
        program.record({{"case": case, "ran": list(times.times), "refused": times.refused}})
"""
    codes = []
    while len(codes) < 3 and (not codes or codes[-1] == BROKEN):
        codes.append(subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=False).returncode)
    assert codes == [BROKEN, 0]
    one, two = json.loads(result.read_text(encoding="utf-8"))["measurements"]
    if when == "compiling":
        assert one == {"case": "one", "ran": ["good"], "refused": {"bad": "had not ended after 0.5 s"}}
    else:
        assert one == {"case": "one", "skipped": "had not ended 0.5 s after its time"}
    assert two == {"case": "two", "ran": ["good", "bad"], "refused": {}}


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
        losses.append(model(idx, idx))
    torch.testing.assert_close(losses[0], losses[1])


def test_another_text_than_tiny_shakespeare_is_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time_to_loss, "CORPUS", tmp_path / "corpus.txt")
    assert "is not here" in str(time_to_loss.shakespeare())
    (tmp_path / "corpus.txt").write_text("Call me Ishmael.", encoding="utf-8")
    assert "is not Tiny Shakespeare" in str(time_to_loss.shakespeare())


def test_dropout_competes_with_the_backends_that_take_it(dry_program: Program) -> None:
    attention.measure(dry_program, (2, 3, 8, 16), dropout_p=0.2, warm=True)
    measured = json.loads(dry_program.result.read_text(encoding="utf-8"))["measurements"]
    assert [m["case"] for m in measured] == [
        f"(2, 3, 8, 16) dropout 0.2 {passes}{end}"
        for passes in ("forward", "forward and backward")
        for end in ("", ", warm")
    ]
    assert all(m["dropout_p"] == 0.2 for m in measured)
    assert [m["warm"] for m in measured] == [False, True, False, True]


# ----------------------------------------------------------------------------------------------- sanitizer and counters


def watched(tmp_path: Path, text: str, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `watch` returns and keeps of a stand-in for the tool; FIRST is the case at which it is to begin."""
    result = tmp_path / "result.json"
    start = (
        "import os, sys\nFIRST = int(sys.argv[sys.argv.index('--inside') + 1])\nprint('========= COMPUTE-SANITIZER')\n"
    )
    found = sanitize.watch([sys.executable, "-c", start + text], names, result, time.time() + 60)
    return found["cases"], json.loads(result.read_text(encoding="utf-8"))["notes"]["cases"]


def test_a_fault_that_the_sanitizer_finds_belongs_to_its_case_and_the_next_ones_run(tmp_path: Path) -> None:
    """The second case ends the process, as an invalid access does; the third reports and goes on."""
    text = """
for number in range(FIRST, 4):
    if number == 1:
        print("========= Invalid __global__ write of size 4 bytes", flush=True)
        os._exit(86)
    if number == 2:
        print("========= Race reported between two threads")
    print(f"over: case {number}", flush=True)
print("========= ERROR SUMMARY: 1 error")
"""
    found, kept = watched(tmp_path, text, ["a", "b", "c", "d"])
    assert found == kept
    assert found == {
        "a": [],
        "b": ["Invalid __global__ write of size 4 bytes"],
        "c": ["Race reported between two threads"],
        "d": [],
    }


def test_a_sanitizer_that_does_not_run_here_is_not_tried_for_every_case(tmp_path: Path) -> None:
    found, _ = watched(tmp_path, "sys.exit('Device not supported')", ["a", "b", "c", "d"])
    assert found == {"a": ["ended the process"], "b": ["ended the process"]}


def test_what_the_sanitizer_says_only_at_the_end_is_kept(tmp_path: Path) -> None:
    found, _ = watched(tmp_path, "print('over: case 0')\nprint('========= Leaked 4 bytes')", ["a"])
    assert found == {"a": [], "at the end": ["Leaked 4 bytes"]}


def test_the_counters_of_each_kernel_are_read_from_behind_what_was_printed() -> None:
    text = """==PROF== Connected to process 7
hello
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","void attention_forward_resident<64>(ForwardCall)","GPU Speed Of Light","Duration","us","25.3",""
"0","7","void attention_forward_resident<64>(ForwardCall)","Occupancy","Achieved Occupancy","%","12.4",""
"0","7","void attention_forward_resident<64>(ForwardCall)","Occupancy","Something else","","1,024",""
"1","7","long_rows(Problem)","GPU Speed Of Light","Duration","ms","1.1",""
==PROF== Disconnected
"""
    assert counters.read(text) == [
        {"kernel": "void attention_forward_resident<64>", "Duration": "25.3 us", "Achieved Occupancy": "12.4 %"},
        {"kernel": "long_rows", "Duration": "1.1 ms"},
    ]
    assert counters.read("==ERROR== no permission") == []


# ------------------------------------------------------------------------------------------------------------ a profile


def test_a_profile_says_how_long_the_gpu_was_busy_and_with_what() -> None:
    """Two steps: kernels that overlap count once as busy time, and a gap does not count."""
    events = [
        ("attention_forward_resident<64>", 0.0, 10.0),
        ("ampere_bf16_gemm", 5.0, 20.0),
        ("attention_forward_resident<64>", 30.0, 40.0),
        ("vectorized_elementwise_kernel", 40.0, 45.0),
    ]
    found = training_step.summary(events, steps=2)
    assert found["busy_share"] == pytest.approx(35 / 45)
    assert found["busy_milliseconds"] == pytest.approx(35 / 2000)
    assert found["launches"] == 2
    assert found["groups"] == pytest.approx(
        {"attention": 20 / 40, "matrix products": 15 / 40, training_step.OTHERS: 5 / 40}
    )
    assert found["kernels"][0] == ["attention_forward_resident<64>", pytest.approx(0.01), 1]
    assert training_step.summary([], steps=1) == {}


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void chargpt::cuda::attention_backward_dk_dv<64, __nv_bfloat16>(BackwardCall)", "attention"),
        ("pytorch_flash::flash_bwd_kernel", "attention"),
        ("key_gradients_kernel", "attention"),
        ("void chargpt::cuda::short_rows<float, 8, 2>(Problem)", "cross-entropy"),
        ("void chargpt::cuda::span_totals<long>(Problem)", "cross-entropy"),
        ("count_kernel", "cross-entropy"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_poi_fused_gelu_3", training_step.OTHERS),
    ],
)
def test_kernels_are_grouped_by_name(kernel: str, group: str) -> None:
    assert training_step.group(kernel) == group


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


def test_a_check_that_hangs_when_the_time_is_over_is_reported_and_what_was_not_run_too(tmp_path: Path) -> None:
    share = [cases.Check(name, "operation", "impl", "dtype", "family", list) for name in ("one", "two")]
    worker = cases.Worker([sys.executable, "-c", "import time; time.sleep(60)"], 0, share, tmp_path / "result.json")
    assert worker.goes_on()
    failed = cases.summary(share, worker.stop())["failed"]
    assert [*failed.values()] == [["had not ended when the time was over"], ["was not run: no time was left"]]


def test_a_check_that_hangs_ends_its_process_with_a_line_about_it(tmp_path: Path) -> None:
    text = f"""
import pathlib, time
from benchmarks.gpu import cases
cases.PATIENCE = 0.5
def check(name, problems):
    return cases.Check(name, "operation", "impl", "dtype", "family", problems)
share = [check("one", list), check("two", lambda: time.sleep(60)), check("three", list)]
cases.work(share, pathlib.Path({str(tmp_path / "lines")!r}))
"""
    assert subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=False).returncode == BROKEN
    one, two = ((json.loads(line)) for line in (tmp_path / "lines").read_text(encoding="utf-8").splitlines())
    assert one["problems"] == []
    assert two["problems"] == ["had not ended after 0.5 s"]


def test_families_share_a_worker_and_what_takes_much_memory_runs_last_and_alone() -> None:
    def check(name: str, family: str, alone: bool = False) -> cases.Check:
        return cases.Check(name, "operation", "impl", "dtype", family, list, alone)

    checks = [check("far", "x", alone=True), check("a", "x"), check("b", "y"), check("c", "x"), check("d", "z")]
    parts = cases.shares(checks, workers=2)
    assert [[check.name for check in part] for part in parts] == [["a", "c", "d"], ["b"], ["far"]]


def test_what_runs_alone_waits_for_the_others(tmp_path: Path) -> None:
    """Each stand-in notes when it begins and ends; the last share begins after the end of the others."""
    parts = [
        [cases.Check(str(number), "operation", "impl", "dtype", "family", list, alone=number == 2)]
        for number in range(3)
    ]
    log = tmp_path / "log"
    stand_in = f"""
import json, sys, time
number, lines = (sys.argv[sys.argv.index(name) + 1] for name in ("--worker", "--result"))
with open({str(log)!r}, "a") as file:
    file.write(f"begin {{number}}\\n")
time.sleep(0.5)
with open(lines, "a") as file:
    file.write(json.dumps({{"check": f"operation impl dtype {{number}}", "problems": []}}) + "\\n")
with open({str(log)!r}, "a") as file:
    file.write(f"end {{number}}\\n")
"""
    command = [sys.executable, "-c", stand_in]
    checks = [check for part in parts for check in part]
    outcomes = cases.run(command, parts, 3, tmp_path / "result.json", time.time() + 60, checks)
    assert len(outcomes) == 3
    lines = log.read_text(encoding="utf-8").split()
    assert lines[-4:] == ["begin", "2", "end", "2"]


# --------------------------------------------------------------------------------------------------------------- report


def attention_result(T: int, D: int = 64, dropout_p: float = 0.0, **ratio: float) -> dict[str, Any]:
    shape, passes = (1, 2, T, D), "forward and backward"
    tflops = {"cuda": 1.0, "flash": 2.0}
    kept = {"refused": {"cudnn": "no plan"}, "spread": {"cuda": 0.01}, "tflops": tflops, "best_backend": "flash"}
    timed = {"dropout_p": dropout_p, "warm": False, "ratio": ratio, "ratio_to_flash": ratio}
    return {"case": f"{shape} {passes}", "shape": shape, "passes": passes, **timed, **kept}


def verdicts(**steps: Any) -> dict[str, tuple[str, str]]:
    return {goal: (verdict, told) for goal, verdict, told in report.judged({"dry": False, "steps": {}, **steps})}


def verdict(start: str, **steps: Any) -> tuple[str, str]:
    (found,) = (value for goal, value in verdicts(**steps).items() if goal.startswith(start))
    return found


def test_a_goal_holds_where_its_worst_case_does() -> None:
    measured = [attention_result(T, cuda=r, triton=0.8) for T, r in ((64, 1.3), (512, 1.21), (1024, 0.5))]
    first = verdict("CUDA, D = 64", grid={"measurements": measured})
    assert first == ("met", "least 1.21, at (1, 2, 512, 64) forward and backward; reached in 2 of 2 cases")
    assert verdict("Triton", grid={"measurements": measured})[0] == "missed"
    measured.append(attention_result(128, cuda=1.19))
    assert verdict("CUDA, D = 64", grid={"measurements": measured})[0] == "missed"
    measured.append(attention_result(256, triton=1.0))  # cuda did not run
    assert verdict("CUDA, D = 64", grid={"measurements": measured})[0] == "not measured"


@pytest.mark.parametrize(
    ("start", "case", "ratio"),
    [
        ("CUDA, D = 64", {"T": 512}, 1.2),
        ("CUDA, D = 32", {"T": 256, "D": 32}, 1.5),
        ("CUDA, D = 128", {"T": 4096, "D": 128}, 0.6),
        ("CUDA with dropout", {"T": 256, "dropout_p": 0.2}, 1.2),
    ],
)
@pytest.mark.parametrize("step", ["shapes", "grid"])
def test_goals_of_the_cuda_kernels(start: str, case: dict[str, Any], ratio: float, step: str) -> None:
    for value, expected in ((ratio, "met"), (ratio - 0.01, "missed")):
        found = verdicts(**{step: {"measurements": [attention_result(**case, cuda=value)]}})
        decided = {goal: told for goal, (told, _) in found.items() if told != "not measured"}
        assert {goal.startswith(start): told for goal, told in decided.items()} == {True: expected}


def test_the_faster_entry_of_triton_counts() -> None:
    measured = [attention_result(1024, **{"triton": 0.8, "triton autotuned": 0.95})]
    assert verdict("Triton", grid={"measurements": measured})[0] == "met"


@pytest.mark.parametrize(("V", "share"), [(65, 0.6), (50_257, 0.85), (50_304, 0.85), (128_256, 0.6)])
def test_cross_entropy_goals(V: int, share: float) -> None:
    def measured(share: float, ratio: float) -> dict[str, Any]:
        case = {"case": f"(8, {V})", "shape": (8, V), "dtype": "bfloat16", "refused": {}, "spread": {}}
        speeds = {"gigabytes_per_second": {"cuda": 3000.0}, "share_of_copy": {"cuda": share}}
        return {**case, **speeds, "ratio": {"cuda": {"eager": 4.0, "compiled": ratio}}}

    def judged(share: float, ratio: float) -> list[str]:
        found = verdicts(cross_entropy={"measurements": [measured(share, ratio)]})
        return [told for goal, (told, _) in found.items() if goal.startswith("cuda cross") and told != "not measured"]

    assert judged(share, 2.0) == ["met"] + ["met"] * (V > 65)
    assert judged(share - 0.01, 1.9) == ["missed"] + ["missed"] * (V > 65)


def step_result(case: str, **tokens: float) -> dict[str, Any]:
    return {"case": case, "tokens_per_second": tokens, "ratio": {}, "milliseconds": dict.fromkeys(tokens, 1.0)}


def test_training_step_goals() -> None:
    def judged(*measured: dict[str, Any]) -> list[str]:
        return [verdict(start, step={"measurements": [*measured]})[0] for start in ("the training step", "compiled")]

    eager = step_result("eager", cuda=1.7, sdpa=1.0)
    assert judged(eager) == ["missed", "not measured"]
    assert judged(eager, step_result("compiled", **{"cuda compiled": 1.8, "sdpa compiled": 1.4})) == ["met", "missed"]
    assert judged(eager, step_result("compiled", **{"cuda compiled": 1.83, "sdpa compiled": 1.4})) == ["met", "met"]


def test_the_page_shows_what_is_there_and_why_the_rest_is_not() -> None:
    ran = {"budget": 80, "seconds": 80.0, "status": "stopped, out of time", "ended": "today", "sources": "abc"}
    profile = {
        "busy_share": 0.5,
        "launches": 336.0,
        "groups": {"matrix products": 0.6, "attention": 0.4},
        "kernels": [["gemm", 1.0, 30.0]],
    }
    results = {
        "dry": False,
        "steps": {"grid": ran},
        "not run": ["racecheck", "smoke"],
        "build": {"notes": {"machine": {"device": "NVIDIA H200", "driver": "580"}, "carried": "no module"}},
        "cases": {
            "notes": {
                "checks": 2,
                "passed": 1,
                "table": {"causal_attention cuda float32": {"passed": 1, "failed": 1}},
                "failed": {"causal_attention cuda float32 T7": ["dQ is wrong"]},
                "skipped": {},
            }
        },
        "memcheck": {"notes": {"cases": {"cuda V65": ["Invalid __global__ write"], "cuda long": []}}},
        "grid": {
            "measurements": [
                attention_result(64, cuda=1.3),
                {"case": "(1, 2, 64, 64) forward and backward", "skipped": "no time was left"},
            ]
        },
        "step": {"notes": {"profiles": {"cuda": profile}}, "measurements": [step_result("eager", cuda=2e6)]},
        "counters": {"notes": {"skipped": "ncu is not here"}},
        "time_to_loss": {"notes": {"goal": 1.47}, "measurements": [{"case": "all", "skipped": "no text"}]},
    }
    page = report.markdown(results)
    assert report.file_name(results) == "gpu-h200"
    for expected in (
        "# NVIDIA H200",
        "Not run: racecheck, smoke.",
        "The carried modules were not used: no module.",
        "| grid | 80 of 80 | stopped, out of time | today | abc |",
        "FAILED causal_attention cuda float32 T7: dQ is wrong",
        "memcheck: 1 of 2 cases clean",
        "cuda V65: Invalid __global__ write",
        "racecheck: not run",
        "cuda 1.30",
        "cudnn did not run in 1 cases: no plan",
        "(1, 2, 64, 64) forward and backward: skipped, no time was left",
        "**cuda** is bound by the host: the GPU is busy for 50% of the time, in 336 launches a step: matrix",
        "skipped, ncu is not here",
        "all: skipped, no text",
    ):
        assert expected in page
    profile["busy_share"] = 0.95
    assert "**cuda** is bound by matrix products" in report.markdown(results)


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
    counts = re.findall(r"^(\d+) of (\d+) checks passed", done.stdout, re.M)  # of smoke, and of the whole list
    assert all(passed == checks for passed, checks in counts)
    assert max(int(checks) for _, checks in counts) >= 500


def test_every_moment_of_a_step_makes_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a step has measured before it ends is on the page within seconds."""
    pages = []
    record = Program.record

    def record_and_look(self: Program, measurement: dict[str, Any]) -> None:
        record(self, measurement)
        pages.append(report.markdown({"dry": True, "steps": {}, "time_to_loss": self.content}))

    dry = make_program(monkeypatch, tmp_path)
    monkeypatch.setattr(Program, "record", record_and_look)
    monkeypatch.setattr(time_to_loss, "Program", lambda _: dry)
    found = {"reached": False, "seconds": None, "best": 2.0, "compile_seconds": 0.0, "curve": [(4, 1.0, 2.0)]}
    monkeypatch.setattr(time_to_loss, "train", lambda *_: found)
    time_to_loss.main()
    assert pages
    assert all("a validation loss of at most 1.47" in page for page in pages)


def test_a_page_that_cannot_be_made_costs_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_: object) -> str:
        raise KeyError("goal")

    monkeypatch.setattr(report, "markdown", fail)
    suite.write({"dry": True, "steps": {}, "step": {"measurements": [1]}}, tmp_path, tmp_path)
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["step"] == {"measurements": [1]}
    assert "KeyError: 'goal'" in kept.with_suffix(".md").read_text(encoding="utf-8")
