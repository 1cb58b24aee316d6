"""Mistakes that a user can make: one line, exit status 2, no traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """The message says what was wrong, where, and what would be right, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def first_line(e: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(e).splitlines() or [""])[0]


_goodbyes = [True]


def leave_without_goodbyes() -> None:
    """Let `run` end the process without what libraries do at its exit, where one of them would hang or complain."""
    _goodbyes[0] = False


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call a script's main with the command line's arguments and exit with its status, 2 for a UserError."""
    _goodbyes[0] = True
    try:
        status = main(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if not _goodbyes[0]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    raise SystemExit(status or 0)
