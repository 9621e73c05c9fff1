"""A plugin of pytest that notes which test runs which lines of the code, and how long each test takes.

`pytest -p tests.mutants.covering` writes one JSON file for each of its processes into the folder CHARGPT_COVERING:
{"seconds": {test: seconds}, "lines": {file: {line: [tests]}}}. Coverage.py counts the lines; it starts when this
module is imported, before anything of chargpt.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path.cwd()
_coverage = coverage.Coverage(
    data_file=None, source=[str(ROOT / "chargpt"), str(ROOT / "pipelines")], config_file=False
)
_coverage.start()
_seconds: dict[str, float] = defaultdict(float)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _coverage.switch_context(item.nodeid)
    result = yield
    _coverage.switch_context("")
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration


def pytest_sessionfinish() -> None:
    _coverage.stop()
    data, lines = _coverage.get_data(), {}
    for file in data.measured_files():
        by_line = {line: sorted(set(tests) - {""}) for line, tests in data.contexts_by_lineno(file).items()}
        lines[os.path.relpath(file, ROOT)] = {line: tests for line, tests in by_line.items() if tests}
    path = Path(os.environ["CHARGPT_COVERING"], f"{os.getpid()}.json")
    path.write_text(json.dumps({"seconds": _seconds, "lines": lines}))
