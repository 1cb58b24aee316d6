"""Mistakes that a user can make: one line, exit status 2, no traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """The message says what was wrong, where, and what would be right."""


def first_line(e: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(e).splitlines() or [""])[0]


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call a script's main with the command line's arguments and exit with its status, 2 for a UserError."""
    try:
        status = main(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status or 0)
