"""Mistakes that a user can make: one line, exit status 2, no traceback."""

import contextlib
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
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: {e}\n")  # in one piece, for ranks share the screen
        status = 2
    except KeyboardInterrupt:
        status = 130
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        sys.stdout = open(os.devnull, "w")
    if not _goodbyes[0]:
        os._exit(status or 0)
    raise SystemExit(status or 0)
