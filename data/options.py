"""The command line of the preparers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from data.tokenizer import TOKENIZERS
from trainer import cli


@dataclass
class Options:
    out: Path
    sources: list[Path] = field(default_factory=list)
    input: Path | None = None
    tokenizer: str = TOKENIZERS[0]
    jobs: int = 1
    force: bool = False


def read_options(arguments: list[str], usage: str, out: Path, names: tuple[str, ...]) -> Options:
    """Parse a command line. `names` are the preparer's options besides --out, --jobs and --force.

    If 'sources' is among them, arguments without dashes are paths. Raises UserError for a wrong option or value, and
    SystemExit after --help.
    """
    # chronomoe imports torch; here, so that the processes that tokenize do not import it
    from chronomoe.options import option, options_of

    @dataclass
    class Declared:
        out: str | None = option(None, "folder to write to; None: the folder of this script")
        input: str | None = option(None, "text to read; None: the dataset's usual source")
        tokenizer: str = option("bytes", "'bytes': one token per byte; 'gpt2': GPT-2's BPE", choices=TOKENIZERS)
        jobs: int | None = option(None, "processes that tokenize; None: one per CPU core", least=1)
        force: bool = option(False, "prepare the dataset again even if it is complete")

    known = {name: o for name, o in options_of(Declared).items() if name in ("out", "jobs", "force", *names)}
    if cli.asks_for_help(arguments):
        print(cli.help_text(usage, known))
        raise SystemExit(0)
    line = cli.parse(arguments, known, positional="sources" in names)
    given = line.options
    return Options(
        out=Path(given.get("out") or out),
        sources=[Path(argument) for argument in line.arguments],
        input=Path(given["input"]) if given.get("input") else None,
        tokenizer=given.get("tokenizer", TOKENIZERS[0]),
        jobs=given.get("jobs") or _cores(),
        force=given.get("force", False),
    )


def asks_for_help(arguments: list[str], usage: str) -> bool:
    """Parse the command line of a preparer without options. Prints `usage` for --help, and then returns True.

    Raises UserError for any other argument.
    """
    if cli.asks_for_help(arguments):
        print(usage)
        return True
    cli.parse(arguments, {})
    return False


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
