"""Plant small faults in the code, one at a time, and list those that no test catches.

    python tests/faults.py                      all faults of tests/faults.txt, two at a time
    python tests/faults.py chronomoe/beta.py    faults in these files
    python tests/faults.py --every=3 --jobs=4   each third fault, four at a time

Each fault runs the tests nearest to it. If they pass, it runs the whole suite. Works on copies of the repository. Exit
status 1 if a fault survives. All of them take some hours on two cores.

A fault in tests/faults.txt is a line `# PATH: DESCRIPTION [TESTS]`, then lines with - that are in the file once, then
lines with + that replace them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_suffix(".txt")
NEAREST_SECONDS, SUITE_SECONDS = 900, 3600


@dataclass
class Fault:
    path: str
    description: str
    tests: list[str]
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


def read_faults(text: str) -> list[Fault]:
    """Parse tests/faults.txt. Raises ValueError for a line that is none of the three kinds."""
    faults: list[Fault] = []
    for line in text.splitlines():
        head = re.fullmatch(r"# (\S+): (.+) \[(.+)\]", line)
        if head:
            faults.append(Fault(head[1], head[2], head[3].split()))
        elif line.startswith(("-", "+")) and faults:
            (faults[-1].old if line[0] == "-" else faults[-1].new).append(line[1:])
        elif line:
            raise ValueError(f"{FAULTS.name}: cannot read the line {line!r}")
    return faults


def planted(fault: Fault, source: str) -> str:
    """The source with the fault. Raises ValueError unless the lines that it replaces are there once."""
    old, new = "\n".join(fault.old), "\n".join(fault.new)
    if source.count(old) != 1:
        raise ValueError(f"{fault.path}: {fault.description}: the lines are there {source.count(old)} times")
    return source.replace(old, new)


def run_tests(folder: Path, tests: list[str], seconds: int) -> str | None:
    """Run tests in a copy of the repository. Returns the first one that fails, 'timeout', or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"exit status {done.returncode}: {(done.stdout + done.stderr)[-200:]}"


def caught_by(fault: Fault, copies: SimpleQueue[Path]) -> str | None:
    """The test that catches a fault, or None."""
    folder = copies.get()
    path = folder / fault.path
    source = path.read_text(encoding="utf-8")
    try:
        path.write_text(planted(fault, source), encoding="utf-8")
        return run_tests(folder, fault.tests, NEAREST_SECONDS) or run_tests(folder, [], SUITE_SECONDS)
    finally:
        path.write_text(source, encoding="utf-8")
        copies.put(folder)


def main(arguments: list[str]) -> int:
    options = dict(a.removeprefix("--").split("=") for a in arguments if a.startswith("--"))
    jobs, every = int(options.get("jobs", 2)), int(options.get("every", 1))
    paths = [a for a in arguments if not a.startswith("--")]
    faults = [f for f in read_faults(FAULTS.read_text(encoding="utf-8")) if not paths or f.path in paths][::every]
    for fault in faults:
        planted(fault, (ROOT / fault.path).read_text(encoding="utf-8"))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    survivors = 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(jobs):
            ignored = shutil.ignore_patterns(".git", "out", "__pycache__", ".venv", "venv")
            copies.put(Path(shutil.copytree(ROOT, Path(scratch) / str(i), ignore=ignored)))
        for fault, test in zip(faults, pool.map(lambda fault: caught_by(fault, copies), faults)):
            survivors += test is None
            print(
                f"{'SURVIVES' if test is None else 'caught'}  {fault.path}: {fault.description}  {test or ''}",
                flush=True,
            )
    print(f"{len(faults)} faults, {survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
