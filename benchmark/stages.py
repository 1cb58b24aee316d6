"""Run stages of a long measurement, each in a process of its own, within a time limit for all of them.

A stage that crashes, hangs or raises does not affect the others, and keeps the tables that it has written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.files import parse_json


@dataclass(frozen=True)
class Stage:
    """A command that appends tables, one JSON object per line, to the file that its last argument names.

    Args:
        name: name of the stage, and of its files.
        command: without the last argument.
        seconds: expected duration. A stage is skipped if less than half of it is left, and ended after twice as long.
    """

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass
class Result:
    """What is known of a stage."""

    name: str
    status: str = "not run"  # or "ok", "failed", "timeout", "skipped", "interrupted"
    seconds: float = 0.0
    reason: str = ""
    tables: list[dict] = field(default_factory=list)


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    save: Callable[[list[dict]], None],
    environment: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run the stages in order, and print a line at the start and the end of each.

    Args:
        stages: most important first.
        folder: receives NAME.jsonl (tables) and NAME.log (output) of each stage.
        seconds: time for all stages.
        save: called with the results so far, as JSON, after every stage and on Ctrl-C.
        environment: of the processes; None: this one's.
    """
    end = time.monotonic() + seconds
    results = [Result(stage.name) for stage in stages]
    try:
        for stage, result in zip(stages, results):
            save([asdict(result) for result in results])
            left = end - time.monotonic()
            if left < stage.seconds / 2:
                result.status, result.reason = "skipped", f"{max(left, 0):.0f} s left, {stage.seconds:.0f} s expected"
            else:
                limit = min(left, 2 * stage.seconds)
                print(f"{left:4.0f} s left  {stage.name}: at most {limit:.0f} s", flush=True)
                _run(stage, result, folder, limit, environment)
            reason = f": {result.reason}" if result.reason else ""
            print(f"{'':13} {stage.name}: {result.status}, {result.seconds:.0f} s{reason}", flush=True)
    finally:
        save([asdict(result) for result in results])
    return results


def _run(stage: Stage, result: Result, folder: Path, limit: float, environment: Mapping[str, str] | None) -> None:
    """Run one stage, and fill in its result."""
    file, log = folder / f"{stage.name}.jsonl", folder / f"{stage.name}.log"
    file.write_bytes(b"")
    began = time.monotonic()
    try:
        with log.open("wb") as output, _process_group([*stage.command, str(file)], output, environment) as process:
            status = process.wait(timeout=limit)
        result.status = "ok" if status == 0 else "failed"
        if status != 0:
            result.reason = (
                f"exit status {status}: {_last_line(log)}" if status > 0 else f"{_signal(status)}, see {log.name}"
            )
    except subprocess.TimeoutExpired:
        result.status, result.reason = "timeout", f"ended after {limit:.0f} s"
    except KeyboardInterrupt:
        result.status = "interrupted"
        raise
    finally:
        result.seconds = round(time.monotonic() - began, 1)
        result.tables = merged(file.read_text(encoding="utf-8", errors="replace").splitlines())


@contextlib.contextmanager
def _process_group(command: list[str], output, environment: Mapping[str, str] | None) -> Iterator[subprocess.Popen]:
    """Start a process, and at the end kill it and all processes that it has started."""
    # in a session of its own: Ctrl-C reaches this process only
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _signal(status: int) -> str:
    """The signal that ended a process."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"


def _last_line(log: Path) -> str:
    """The end of a log: the message of an exception, if the process raised one."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


def merged(lines: Sequence[str]) -> list[dict]:
    """The tables in these lines. Tables with the same title become one, and its last entry of each name counts.

    A line that is not JSON, because the process ended while writing it, is ignored.
    """
    found: dict[tuple[str, str], dict] = {}
    for line in lines:
        try:
            table = parse_json(line)
        except ValueError:
            continue
        before = found.setdefault((table["part"], table["title"]), table)
        for kind in {"checks", "numbers"} & table.keys():
            before[kind] = [*{entry["name"]: entry for entry in before[kind] + table[kind]}.values()]
    return [*found.values()]
