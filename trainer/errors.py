"""Errors that a user can cause: one line, exit status 2, no traceback.

Each program imports this module first: importing it hides the traceback of Ctrl-C during the imports that follow.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from types import TracebackType


def _quiet_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _quiet_interrupt


MOST_CHARACTERS = 4000


class UserError(Exception):
    """An error that the user can cause. The message says in one line what is wrong, where, and what would be right.

    The middle of a message over MOST_CHARACTERS is left out: it holds a value of a file.
    """

    def __init__(self, message: str):
        half = MOST_CHARACTERS // 2
        if len(message) > MOST_CHARACTERS:
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(" ".join(message.splitlines()))


def first_line(e: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(e).splitlines() or [""])[0]


_exit_handlers_run = [True]


def skip_exit_handlers() -> None:
    """Make `run_script` end the process without the exit handlers of libraries, which may hang or print."""
    _exit_handlers_run[0] = False


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Call a script's main with the command line's arguments and exit with its status.

    2 for a UserError, 130 after Ctrl-C, 141 if the reader of stdout has closed it.
    """
    _exit_handlers_run[0] = True
    # None if the caller has closed them
    sys.stdout, sys.stderr = (f or open(os.devnull, "w") for f in (sys.stdout, sys.stderr))
    try:
        status = main(sys.argv[1:])
    except UserError as e:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: {e}\n")  # one write: ranks share the terminal
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of stdout has closed it, as `head` does
        status = 141
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has closed the pipe
        sys.stdout = open(os.devnull, "w")
    if not _exit_handlers_run[0]:
        os._exit(status or 0)
    raise SystemExit(status or 0)
