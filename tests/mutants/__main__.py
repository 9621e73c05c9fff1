"""Change the code in one small place at a time and see whether a test fails: `make mutants`.

Cosmic Ray knows the places of the Python code and the changes; those of the C++ code are in tests/mutants/native.py. A
seed chooses places at random, and at each of them one change, which is made in a copy of the project under build/.
The tests that run the changed line are run there, or for a line that runs at the import those beside the file and
those that run any line of it; which those are is found once, by Coverage.py. Those of WHOLE come first, then those
beside the changed file, then the shortest. Where it knows of none (what runs in a process of its own), the tests beside
the file run, then those of whole runs and commands. What Ruff or mypy refuses in `make lint` is noticed too. What
nothing notices is printed as a diff.

What was tried is kept in tests/mutants/results.jsonl, so that another run with the same seed resumes behind it; a file
that changed since is tried again, and so is what no test noticed, if the tests changed. Changes that change nothing
anybody could see are listed, with the reason, in tests/mutants/equivalent.txt, and do not count.
"""

import argparse
import ast
import difflib
import hashlib
import json
import math
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutants.native import PATCHES

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "mutants"
RESULTS = Path(__file__).with_name("results.jsonl")  # in git, so that another machine resumes behind it
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
PYTHON = ROOT / ".venv" / "bin" / "python"
INPUTS = {"chargpt/kernels/cases.py"}  # what the tests give to the code
SLOWER = 4  # times as long as unchanged code may tests take before they count as hung
LEAST = 60.0  # seconds that they always get
ENOUGH, MOST = 90.0, 600  # seconds of tests for one change, and tests, so that it does not cost the whole suite

# The tests that stand beside a room's code; by default the folder or file of its name.
NEAR = {
    "models": ["tests/test_models.py", "tests/test_tied.py"],
    "tokenizers": ["tests/test_tokenizers.py"],
    "files": ["tests/test_files.py"],
    "command": ["tests/test_command.py", "tests/test_user_errors.py"],
    "interrupts": ["tests/test_command.py", "tests/training/test_trainer.py"],
    "cli": ["tests/test_cli.py"],
    "console": ["tests/training/test_trainer.py", "tests/test_cli.py"],
    "experiment": ["tests/training/test_trainer.py"],
    "kernels": ["tests/kernels", "--ignore=tests/kernels/triton", "--ignore=tests/kernels/test_lower_code_paths.py"],
    "triton": [
        "tests/kernels/triton/test_interpreter.py",
        "tests/kernels/triton",
        "tests/kernels/test_triton_operators.py",
    ],
    "errors": ["tests/test_command.py"],
}
WHOLE = ("tests/test_defaults.py", "tests/test_rooms.py")  # look at what all modules made when they were imported
FAR = ["tests/training/test_trainer.py", "tests/test_cli.py", "tests/test_user_errors.py"]


@dataclass(frozen=True)
class Mutant:
    path: str
    operator: str  # of Cosmic Ray, or "patch"
    occurrence: int
    line: int
    before: str  # the file's SHA-256
    after: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="of changes to Python code (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="changes tried at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these; run again to go on")
    parser.add_argument("--report", action="store_true", help="only say what was found so far")
    options = parser.parse_args()
    chosen = [*native(), *sample(options.number, options.seed)]
    found, same, without_effect = known(), digest(), excused()
    done = {
        mutant
        for mutant, entry in found.items()
        if entry["outcome"] != "survived" or entry["tests"] == same or changed(mutant, found) in without_effect
    }
    waiting: queue.SimpleQueue[tuple[Mutant, str]] = queue.SimpleQueue()
    for mutant, code in sorted(chosen, key=lambda one: "/triton/" in one[0].path):  # whose tests take the longest
        if mutant not in done:
            waiting.put((mutant, code))
    if not options.report:
        print(f"{len(chosen)} changes, {len(chosen) - waiting.qsize()} of them tried before", flush=True)
        for linter in ("ruff", "mypy"):
            if refused(ROOT, ["chargpt", "pipelines"], linter):
                sys.exit(f"{linter} refuses the code without any change; mend that first")
        covering = covered()
        end = time.monotonic() + 60 * options.minutes
        threads = [
            threading.Thread(target=work, args=(number, waiting, covering, end)) for number in range(options.jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tell([mutant for mutant, _ in chosen], known())


# ------------------------------------------------------------------------------------------------------------- choosing


def sample(number: int, seed: int) -> list[tuple[Mutant, str]]:
    """Places at random, equally likely, and of the changes at a place one: (mutant, the file's new text)."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    places: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = {}
    sources: dict[str, str] = {}
    for path in sorted([*(ROOT / "chargpt").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")]):
        name = str(path.relative_to(ROOT))
        if name in INPUTS:
            continue
        sources[name] = path.read_text(encoding="utf-8")
        tree, types = get_ast(sources[name]), annotations(sources[name])
        for operator in operator_names():
            kind = get_operator(operator)
            if kind.arguments():
                continue
            positions = (start for node in ast_nodes(tree) for start, _ in kind().mutation_positions(node))
            for occurrence, start in enumerate(positions):
                if not any(first <= tuple(start) < last for first, last in types):
                    places.setdefault((name, tuple(start)), []).append((operator, occurrence))

    def luck(place: tuple[str, tuple[int, int]]) -> str:
        """By the text around a place, so that a change elsewhere chooses no others."""
        name, (line, column) = place
        around = sources[name].splitlines()[max(0, line - 2) : line + 1]
        return hashlib.sha256(f"{seed} {name} {column} {around}".encode()).hexdigest()

    chosen = []
    for name, start in sorted(places, key=luck):
        operator, occurrence = random.Random(luck((name, start))).choice(places[name, start])
        try:
            code = mutate_code(sources[name], get_operator(operator)(), occurrence)
        except AttributeError:  # ExceptionReplacer knows no dotted names
            continue
        if code is not None and code != sources[name]:
            chosen.append((made(name, operator, occurrence, start[0], sources[name], code), code))
        if len(chosen) == number:
            break
    return chosen


def native() -> list[tuple[Mutant, str]]:
    """The changes of C++ code."""
    chosen = []
    for number, (path, old, new) in enumerate(PATCHES):
        source = (ROOT / path).read_text(encoding="utf-8")
        if source.count(old) != 1:
            sys.exit(f"tests/mutants/native.py: {old!r} does not stand in {path} exactly once")
        code = source.replace(old, new)
        chosen.append((made(path, "native", number, source[: source.index(old)].count("\n") + 1, source, code), code))
    return chosen


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types stand, as (line, column): a change there fails at the import, if at all, and mypy reads them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if (kind := getattr(node, name, None)) is not None:
                found.append(((kind.lineno, kind.col_offset), (kind.end_lineno, kind.end_col_offset)))
    return found


def made(path: str, operator: str, occurrence: int, line: int, before: str, after: str) -> Mutant:
    digests = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (before, after))
    return Mutant(path, operator, occurrence, line, *digests)


# ------------------------------------------------------------------------------------------------------ which tests run


@dataclass(frozen=True)
class Covering:
    """Which tests run which lines."""

    seconds: dict[str, float]  # of each test
    lines: dict[str, dict[str, list[str]]]  # file, line, tests

    def tests(self, path: str, source: str, line: int) -> tuple[str, ...]:
        """The tests that run a line's statement: WHOLE's first, then those beside its file, then the shortest.

        At most MOST of them, as many as take ENOUGH seconds.
        """
        if "/triton/" in path or (path not in self.lines and not path.startswith("chargpt/")):
            return ()  # C++, and what no test runs in its own process
        by_line = self.lines.get(path, {})
        found = {test for number in statement(source, line) for test in by_line.get(str(number), [])}
        near = beside(path)
        if not found or at_import(source, line):  # a test may look at what that made, and run no line
            found |= {test for tests in by_line.values() for test in tests}
            found |= {test for test in self.seconds if test.startswith((*near, *WHOLE))}
        chosen: list[str] = []
        budget = ENOUGH

        def order(test: str) -> tuple[bool, bool, float, str]:
            return not test.startswith(WHOLE), not test.startswith(tuple(near)), self.seconds[test], test

        for test in sorted(found, key=order):
            if chosen and ((budget := budget - self.seconds[test]) < 0 or len(chosen) == MOST):
                break
            chosen.append(test)
        return tuple(chosen)


def at_import(source: str, line: int) -> bool:
    """Whether a line runs when its file is imported: outside the bodies of functions."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return not any(node.body[0].lineno <= line <= (node.end_lineno or line) for node in functions)


def statement(source: str, line: int) -> range:
    """The lines of the smallest statement around a line; of one with a body, its head."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):  # outer ones first
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if isinstance(body, list) else node.end_lineno or line
            if line <= max(last, node.lineno):
                found = range(node.lineno, max(last, node.lineno) + 1)
    return found


def digest() -> str:
    """Of the tests, this program left out."""
    hashed = hashlib.sha256()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.parent.name != "mutants":
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def covered() -> Covering:
    """Run all tests once, unless neither they nor the code changed since."""
    hashed = hashlib.sha256(digest().encode())
    for path in sorted([*(ROOT / "chargpt").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]):
        hashed.update(path.read_bytes())
    kept = BUILD / f"covering-{hashed.hexdigest()[:16]}.json"
    if not kept.exists():
        print("all tests run once, to know which of them run which lines", flush=True)
        tree, parts = copied(BUILD / "tree-0"), BUILD / "covering"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        command = [str(PYTHON), "-m", "pytest", "-q", "-rfE", "-n", "2", "--dist", "worksteal"]
        command += ["-p", "no:cacheprovider"]
        command += ["-p", "tests.mutants.covering", "--timeout", "900"]
        environs = environment(tree) | {"CHARGPT_COVERING": str(parts)}
        done = subprocess.run(command, cwd=tree, env=environs, stdout=subprocess.PIPE, text=True, check=False)
        failed = failures(done.stdout)
        if done.returncode and (not failed or run(tree, tuple(failed), math.inf)[0] != "survived"):
            print(done.stdout)
            sys.exit("tests fail without any change, alone too; mend that first")
        seconds: dict[str, float] = {}
        lines: dict[str, dict[str, list[str]]] = {}
        for part in sorted(parts.iterdir()):
            read = json.loads(part.read_text())
            seconds |= read["seconds"]
            for path, by_line in read["lines"].items():
                for line, tests in by_line.items():
                    lines.setdefault(path, {}).setdefault(line, []).extend(tests)
        for former in BUILD.glob("covering-*.json"):
            former.unlink()
        kept.write_text(json.dumps({"seconds": seconds, "lines": lines}))
    return Covering(**json.loads(kept.read_text()))


# --------------------------------------------------------------------------------------------------------------- trying


def work(number: int, waiting: "queue.SimpleQueue[tuple[Mutant, str]]", covering: Covering, end: float) -> None:
    """Try what waits, one after the other, in a copy of the project of this thread's own."""
    tree = copied(BUILD / f"tree-{number}")
    took: dict[tuple[str, ...], float] = {}
    passed: set[str] = set()  # single tests that were seen to pass without any change
    while time.monotonic() < end:
        try:
            mutant, code = waiting.get_nowait()
        except queue.Empty:
            return
        path = tree / mutant.path
        original = path.read_text(encoding="utf-8")
        outcome, failed = "survived", None
        near = covering.tests(mutant.path, original, mutant.line)
        took[near] = sum(covering.seconds[test] for test in near)
        for tests in [near] if near else suites(mutant.path, tree):
            if tests not in took:
                took[tests] = time.monotonic()
                if not passing(tree, tests):
                    print(f"{' '.join(tests)} fail without any change; mend that first", flush=True)
                    return
                took[tests] = time.monotonic() - took[tests]
            path.write_text(code, encoding="utf-8")
            try:
                built = build(tree) if mutant.operator == "native" else not refused(tree, [mutant.path], "ruff")
                outcome, failed = run(tree, tests, max(LEAST, SLOWER * took[tests])) if built else ("killed", None)
            finally:
                path.write_text(original, encoding="utf-8")
                if mutant.operator == "native":
                    take_native_module(tree)
            if outcome != "survived":
                break
        if outcome == "survived" and mutant.operator != "native":
            path.write_text(code, encoding="utf-8")
            outcome = "killed" if refused(tree, [mutant.path], "mypy") else "survived"
            path.write_text(original, encoding="utf-8")
        if failed and failed not in passed:
            if not passing(tree, (failed,)):
                print(f"{failed} fails without any change; mend that first", flush=True)
                return
            passed.add(failed)
        with RESULTS.open("a", encoding="utf-8") as file:
            entry = {"outcome": outcome, "tests": digest()}
            if outcome == "survived":
                entry["diff"] = difference(mutant.path, original, code)
            file.write(json.dumps(asdict(mutant) | entry) + "\n")
        print(f"{outcome:8s} {mutant.path}:{mutant.line} {mutant.operator}", flush=True)


def copied(tree: Path) -> Path:
    """What git has or would take, and the native module."""
    shutil.rmtree(tree, ignore_errors=True)
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    take_native_module(tree)
    git = ["git", "-c", "user.name=mutants", "-c", "user.email=mutants@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):  # tests ask git for the root and a commit
        subprocess.run([*git, *words], cwd=tree, check=True)
    return tree


def take_native_module(tree: Path) -> None:
    for path in (ROOT / "chargpt").glob("_native*"):
        shutil.copy(path, tree / "chargpt")


def build(tree: Path) -> bool:
    """Make the native module of the copy; whether its code compiles."""
    command = [str(PYTHON), "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, capture_output=True, check=False).returncode == 0


def refused(tree: Path, paths: list[str], linter: str) -> bool:
    """Whether `make lint` would fail for it: Ruff's rules, without those for spaces, or mypy, which takes a minute."""
    command = {
        "ruff": [str(PYTHON), "-m", "ruff", "check", "--no-cache", "-q", *paths],
        "mypy": [str(PYTHON), "-m", "mypy", "--cache-dir", str(BUILD / f"{tree.name}.mypy"), *paths],
    }[linter]
    return subprocess.run(command, cwd=tree, capture_output=True, check=False).returncode != 0


def suites(path: str, tree: Path) -> Iterator[tuple[str, ...]]:
    """The tests to run, those that most likely fail first."""
    near = beside(path)
    if "/triton/" in path:
        yield near[:1]  # without the slow ones
    if all((tree / test).exists() for test in near if not test.startswith("-")):
        yield near
    if not path.startswith(("pipelines/", "csrc/", "chargpt/kernels/")):
        yield tuple(test for test in FAR if test not in near)


def beside(path: str) -> tuple[str, ...]:
    """The tests of a file's room, as words for pytest."""
    if path.startswith("pipelines/"):
        return ("tests/pipeline",)
    if path.startswith("csrc/"):
        return ("tests/kernels", "--ignore=tests/kernels/triton")
    room = "triton" if "/triton/" in path else Path(path).parts[1].removesuffix(".py")
    return tuple(NEAR.get(room, [f"tests/{room}"]))


def run(tree: Path, tests: tuple[str, ...], seconds: float) -> tuple[str, str | None]:
    """(what became of the change, the test that failed)."""
    listed = tree.with_suffix(".txt")  # thousands are too many for a command line
    listed.write_text("\n".join(tests), encoding="utf-8")
    command = [str(PYTHON), "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if tests == beside("/triton/"):  # most of Triton's are slow
        command += ["-m", ""]
    try:
        done = subprocess.run(
            [*command, f"@{listed}"],
            cwd=tree,
            env=environment(tree),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=None if seconds == math.inf else seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hung", None
    if done.returncode == 0:
        return "survived", None
    named = failures(done.stdout)[-1:]
    return "killed", named[0] if named and named[0] in tests else None


def passing(tree: Path, tests: tuple[str, ...]) -> bool:
    """Whether they pass without any change, at the second time if not at the first: the machine may be busy."""
    return any(run(tree, tests, math.inf)[0] == "survived" for _ in range(2))


def failures(said: str) -> list[str]:
    """The tests that failed, as pytest says them at its end."""
    lines = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [line.split(" ", 1)[1].split(" - ")[0] for line in lines]


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def difference(path: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), path, path, n=1, lineterm="")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- telling


def known() -> dict[Mutant, dict[str, str]]:
    """What was found of each mutant so far."""
    if not RESULTS.exists():
        return {}
    entries = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    names = Mutant.__dataclass_fields__
    return {Mutant(**{name: entry[name] for name in names}): entry for entry in entries}


def tell(chosen: list[Mutant], found: dict[Mutant, dict[str, str]]) -> None:
    without_effect = excused()
    tried = [mutant for mutant in chosen if mutant in found]
    survivors = [mutant for mutant in tried if found[mutant]["outcome"] == "survived"]
    equivalent = {mutant for mutant in survivors if changed(mutant, found) in without_effect}
    counted = [mutant for mutant in tried if mutant not in equivalent]
    outcomes = Counter(found[mutant]["outcome"] for mutant in counted)
    for mutant in survivors:
        if mutant not in equivalent:
            print(f"\n{changed(mutant, found)}\n{found[mutant]['diff']}")
    noticed, total = outcomes["killed"] + outcomes["hung"], len(counted)
    print(f"\n{total} of {len(chosen)} tried, {len(tried) - total} more change nothing: {dict(outcomes)}")
    if total:
        low, high = wilson(noticed, total)
        print(f"noticed: {noticed / total:.1%}, with 95% confidence between {low:.1%} and {high:.1%}")


def excused() -> set[str]:
    """The changes that change nothing anybody could see."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def changed(mutant: Mutant, found: dict[Mutant, dict[str, str]]) -> str:
    """As it would stand among the excused ones: the file, and the lines that it got."""
    lines = [line[1:].strip() for line in found[mutant]["diff"].splitlines()[2:] if line.startswith("+")]
    return f"{mutant.path}: {' '.join(lines)}"


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """An interval for a share, at 95%. Wilson 1927, "Probable inference, the law of succession, …", JASA 22."""
    share = hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


if __name__ == "__main__":
    BUILD.mkdir(parents=True, exist_ok=True)
    sys.exit(main())
