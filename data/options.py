"""The command line of the preparers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import UserError


@dataclass
class Options:
    out: Path
    sources: list[Path] = field(default_factory=list)
    input: Path | None = None
    tokenizer: str = "bytes"
    jobs: int = 1
    force: bool = False


def read_options(arguments: list[str], usage: str, out: Path, names: tuple[str, ...]) -> Options:
    """Parse a command line. `names` are the preparer's options besides --out, --jobs and --force.

    If 'sources' is among them, arguments without dashes are paths. Raises UserError for a wrong option or value, and
    SystemExit after --help.
    """
    if "--help" in arguments or "-h" in arguments:
        print(usage)
        raise SystemExit(0)
    values: dict[str, Any] = {"out": out, "sources": [], "jobs": _cores()}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument == "--force":
            values["force"] = True
        elif not argument.startswith("-") and "sources" in names:
            values["sources"].append(Path(argument))
        elif not (argument.startswith("--") and value and name in ("out", "jobs", *names) and name != "sources"):
            raise UserError(f"{argument} is not an option of this program; --help lists the options")
        elif name == "jobs":
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"{argument} must be an integer of at least 1")
            values["jobs"] = int(value)
        else:
            values[name] = value if name == "tokenizer" else Path(value)
    return Options(**values)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
