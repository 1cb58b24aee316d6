"""A pytest plugin that writes the outcome of each test to a file at once, so that a crash of the process loses none.

    OUTCOMES=FILE pytest -p benchmark.outcomes

A line of the file is a table of checks, as of benchmark.timing.Report. Tests that the file has are not run again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

TITLE = "tests marked cuda"
STARTED = "the process ended during this test"  # unless a later line has its outcome


def seen() -> dict[str, dict]:
    """The last outcome of each test in the file."""
    lines = Path(os.environ["OUTCOMES"]).read_text(encoding="utf-8").splitlines()
    return {check["name"]: check for line in lines for check in json.loads(line).get("checks", [])}


def write(test: str, ok: bool, detail: str) -> None:
    check = {"name": test.partition("::")[2], "ok": ok, "detail": detail}
    with open(os.environ["OUTCOMES"], "a", encoding="utf-8") as f:
        f.write(json.dumps({"part": "tests", "title": TITLE, "checks": [check]}) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = seen()
    items[:] = [item for item in items if item.nodeid.partition("::")[2] not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    write(nodeid, False, STARTED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed or report.skipped:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else "skipped" if report.skipped else report.longreprtext
        write(report.nodeid, False, " ".join(reason.split())[:300])
    elif report.when == "call":
        write(report.nodeid, True, f"{report.duration:.1f} s")
