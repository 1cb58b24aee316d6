"""Errors that a user can cause: one line, exit status 2, no traceback.

Each program imports this module first: importing it hides the traceback of Ctrl-C during the imports that follow.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable


def _quiet_interrupt(kind, error, traceback) -> None:  # type: ignore[no-untyped-def]
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def _is_imported_by_program() -> bool:
    """Whether the program that runs, such as train.py, imports this module itself."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_globals is globals() or "importlib" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_globals.get("__name__") == "__main__"


sys.excepthook = _quiet_interrupt
# Libraries turn a KeyboardInterrupt that interrupts their import into other errors, or ignore it. So Ctrl-C ends the
# process without an exception, until run_script.
_ends_at_once = _is_imported_by_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _ends_at_once:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    try:
        return (str(e).splitlines() or [""])[0]
    except Exception:  # of a class that a config file defines
        return "its message cannot be written"


def _report(message: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {message}\n")  # one write: ranks share the terminal


_exit_handlers_run = [True]


def skip_exit_handlers() -> None:
    """Make `run_script` end the process without the exit handlers of libraries, which may hang or print."""
    _exit_handlers_run[0] = False


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Call a script's main with the command line's arguments and exit with its status.

    2 for a UserError or if stdout cannot be written, 130 after Ctrl-C, 141 if the reader of stdout has closed it.
    """
    _exit_handlers_run[0] = True
    # None if the caller has closed them
    sys.stdout, sys.stderr = (f or open(os.devnull, "w") for f in (sys.stdout, sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding does not have, as on stderr
    status: int | None = None
    try:
        if _ends_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as e:
        _report(str(e))
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of stdout has closed it, as `head` does
        status = status or 141
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) or e.filename is not None:
            raise
        _report(f"cannot write to stdout: {e.strerror}")
        status = status or 2
    if _ends_at_once:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would flush it again at its exit, and report the error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not _exit_handlers_run[0]:
        os._exit(status or 0)
    raise SystemExit(status or 0)
