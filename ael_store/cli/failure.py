"""From an exception to one message on stderr and an exit code; the only place that does this."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable

from ael_store.cli.output import ReaderGone, flush
from ael_store.errors import AelError, StorageFailed
from ael_store.telemetry import printable

__all__ = ["INTERRUPTED", "complain", "finish"]

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def finish(action: Callable[[], int], *, debug: bool) -> int:
    """Do a command and return its exit code, whatever happens; what it printed has left this process then."""
    try:
        code = action()
        flush()
        return code
    except SystemExit as error:
        return _explain_exit(error)
    except BaseException as error:
        code = _explain(error, debug)
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()
    return code


def _explain(error: BaseException, debug: bool) -> int:
    if isinstance(error, BrokenPipeError | ReaderGone):
        _forget_output()
        return 0
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    match error:
        case AelError():
            complain(str(error))
            return error.exit_code
        case KeyboardInterrupt():
            complain("interrupted")
            return INTERRUPTED
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG | errno.EIO):
            file = error.filename or "a file"
            complain(f"{file} can't be written ({error.strerror}): free some space or check the disk")
            return StorageFailed.exit_code
    again = "" if debug else "; run again with --debug to see where"
    complain(f"internal error: {type(error).__name__}: {error}{again}")
    return 1


def _explain_exit(error: SystemExit) -> int:
    """Code of agents has called `sys.exit`."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    complain(str(error.code))
    return 1


def complain(message: str) -> None:
    """Print a message on stderr; further lines of it are indented."""
    lines = [printable(line) for line in message.splitlines()] or [""]
    with contextlib.suppress(OSError):
        print("ael: " + "\n     ".join(lines), file=sys.stderr)


def _forget_output() -> None:
    """Send what is still buffered for a closed or full stdout nowhere, else Python complains when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
