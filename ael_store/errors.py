"""Every error that ael_store raises on its own account.

One root, `AelError`; each class also derives from the built-in that a caller would expect, so that
`except KeyError` and `except ValueError` keep working. `exit_code` is what the command `ael` ends with.
"""

from __future__ import annotations

__all__ = [
    "AelError",
    "AgentNotFound",
    "AgentNotLoadable",
    "DatabaseDamaged",
    "DatabaseNotUsable",
    "DiskFull",
    "EffectBlocked",
    "Fatal",
    "HistoryGone",
    "InvalidAgent",
    "InvalidKey",
    "InvalidSetting",
    "InvalidTask",
    "InvalidTrigger",
    "InvalidValue",
    "InvalidValueType",
    "LoopNotRunning",
    "NotADatabase",
    "NotAllowedHere",
    "OwnedElsewhere",
    "OwnershipLost",
    "RetryAfter",
    "SchemaTooNew",
    "SchemaTooOld",
    "StorageFailed",
    "TaskNotFound",
    "UnitClosed",
    "UsageError",
]


class AelError(Exception):
    """The root of all errors of ael_store."""

    exit_code = 1


# -- what a caller passed ---------------------------------------------------------------------------


class UsageError(AelError, ValueError):
    """An argument, option or file is wrong; nothing was done."""

    exit_code = 2


class InvalidSetting(UsageError):
    """A setting has an unknown name, a wrong type or a value outside its range."""


class InvalidAgent(UsageError):
    """An agent has no name, a wrong priority, a wrong configuration, or a name that is taken."""


class InvalidTrigger(UsageError):
    """A trigger is neither `every …` nor a cron line, or names an unknown time zone."""


class InvalidTask(UsageError):
    """A task can't be submitted, or its function can't be found again after a restart; the message says why."""


class AgentNotLoadable(UsageError):
    """An agent file, module or attribute can't be imported or holds no agents."""


class InvalidKey(UsageError):
    """A state key is empty, too long, reserved, or holds characters that can't be stored."""


class InvalidValue(AelError, ValueError):
    """A value has an accepted type but can't be stored as it is (NaN, too large, too deep)."""

    exit_code = 2


class InvalidValueType(AelError, TypeError):
    """A value is not JSON: the message names the key, the path inside the value and the type."""

    exit_code = 2


class AgentNotFound(AelError, LookupError):
    """No agent of that name is registered or known to the database."""


class DeadLetterNotFound(AelError, LookupError):
    """There is no such dead letter, or its subscription has ended, so that it can't be delivered any more."""


class TaskNotFound(AelError, LookupError):
    """There is no task of that number or key."""


class HistoryGone(AelError, LookupError):
    """A moment, or a row, that retention has removed; the message says from when on history exists."""


# -- what a task raises -----------------------------------------------------------------------------


class RetryAfter(AelError):
    """Raised by a task: not now, try again after so many seconds. Counts as no failure; holds the task's limit.

    `RetryAfter(60)`, `RetryAfter("5m")`, `RetryAfter(60, "the provider is busy")`.
    """

    def __init__(self, after: float | str, why: str = "") -> None:
        super().__init__(why or f"try again after {after}")
        self.after = after


class Fatal(AelError):
    """Raised by a task: no further attempt can succeed, so there is none."""


# -- when something is called -----------------------------------------------------------------------


class UnitClosed(AelError, RuntimeError):
    """The unit of work that this context belonged to has ended; what is written now would be lost."""


class NotAllowedHere(AelError, RuntimeError):
    """The call makes no sense outside (or inside) a unit of work; the message names the way that does."""


class LoopNotRunning(AelError, RuntimeError):
    """The call needs a running loop."""


class EffectBlocked(AelError, RuntimeError):
    """A hook that is replayed tried to reach the network, start a process or write a file."""


# -- the database -----------------------------------------------------------------------------------


class DatabaseNotUsable(AelError, OSError):
    """The database can't be opened: no permission, a folder, a missing file."""

    exit_code = 74


class NotADatabase(AelError):
    """The file is no SQLite database, or a database that ael_store did not make."""

    exit_code = 65


class DatabaseDamaged(AelError):
    """SQLite reports damage; nothing was changed."""

    exit_code = 65


class StorageFailed(AelError, OSError):
    """A write failed: disk full or an I/O error. Whether a COMMIT took effect is known after a restart."""

    exit_code = 74


class DiskFull(StorageFailed):
    """There is no room for a write; nothing of it was written, and it can be tried again."""


class OwnedElsewhere(AelError):
    """Another process owns the database; the message names it. Try again when it has ended."""

    exit_code = 75


class OwnershipLost(AelError):
    """A newer owner has taken the database over: this run can't commit any more."""

    exit_code = 75


class SchemaTooNew(AelError):
    """The database was written by a newer ael_store. Install that version or restore a backup."""

    exit_code = 78


class SchemaTooOld(AelError):
    """The database needs an upgrade that was forbidden. Run `ael db upgrade`."""

    exit_code = 78
