"""Past moments of a database: the end of the last commit that carries an iteration, as numbers.

An iteration knows the last unit before it, and a unit the last change and event before its own, so a moment takes a
few seeks by primary key, whatever the length of the history. Before the *horizon* nothing is left but what the present
is made of: a moment before it is refused.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select

from ael_store.clock import iso, to_us
from ael_store.errors import HistoryGone, UsageError
from ael_store.schema.tables import metadata

__all__ = [
    "HORIZON",
    "REMOVED_TASKS",
    "Horizon",
    "Moment",
    "horizon_of",
    "moment_at",
    "read_moment",
    "refuse_gone",
    "started_by",
]

T = metadata.tables

HORIZON = "horizon"
"""Name of the row in `positions` that says up to where history was removed."""

REMOVED_TASKS = "tasks_removed"
"""Name of the row in `positions` that says which numbers of tasks and attempts were given out before the last went."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The end of the last commit that carries an iteration; each number is the last one up to it."""

    iteration: int
    started_us: int | None
    """When the iteration began; None for 0, before the first."""
    tick_id: int
    change_id: int
    event_id: int
    commit_id: int

    @property
    def at(self) -> str | None:
        """When the iteration began, as the views print times."""
        return None if self.started_us is None else iso(self.started_us)


@dataclass(frozen=True, slots=True)
class Horizon:
    """The moment up to which history was removed, and the last event of those that were removed earlier."""

    iteration: int = 0
    started_us: int | None = None
    tick_id: int = 0
    change_id: int = 0
    event_id: int = 0
    commit_id: int = 0
    forgotten_event_id: int = 0
    """Events up to this one were removed; never less than `event_id`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def horizon_of(connection: Connection) -> Horizon:
    """Return where history begins; all zero where nothing was removed."""
    p = T["positions"]
    text = connection.execute(select(p.c.value).where(p.c.name == HORIZON)).scalar()
    return Horizon() if text is None else Horizon(**json.loads(text))


def read_moment(text: str) -> int | datetime:
    """Return the iteration or the time that a text names; raises UsageError."""
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no moment: write the number of an iteration, or a time like 2026-01-31T12:00:00Z"
        ) from None


def moment_at(connection: Connection, at: int | str | datetime | None) -> Moment:
    """Return the moment of an iteration, or of the last iteration that had started by a time (naive is UTC).

    None stands for the newest. Where the wall clock was set back a time may have been twice, and one of these is
    meant. Raises HistoryGone before the beginning of the history, UsageError for what has not been yet.
    """
    if isinstance(at, str):
        at = read_moment(at)
    i = T["iterations"]
    last = connection.execute(select(func.max(i.c.id))).scalar() or 0
    horizon = horizon_of(connection)
    if at is None:
        number = last
    elif isinstance(at, datetime):
        _refuse_future(connection, at, last)
        number = started_by(connection, to_us(at), horizon.iteration, last)
        if horizon.iteration and number <= horizon.iteration and (horizon.started_us or 0) > to_us(at):
            raise _gone(horizon, f"{at.isoformat()} is before that")
    elif type(at) is not int or at < 0:
        raise UsageError(f"{at!r} is no moment: pass the number of an iteration from 0, or a time")
    else:
        number = at
    if number < horizon.iteration:
        raise _gone(horizon, f"iteration {number} is before that")
    if number > last:
        raise UsageError(f"there is no iteration {number} yet; the last one is {last}")
    return _moment_of(connection, number, last)


def refuse_gone(connection: Connection, moment: Moment) -> None:
    """Raise HistoryGone where the beginning of the history has moved past a moment that was known before."""
    horizon = horizon_of(connection)
    if moment.iteration < horizon.iteration:
        raise _gone(horizon, f"iteration {moment.iteration} is before that")


def _refuse_future(connection: Connection, at: datetime, last: int) -> None:
    i = T["iterations"]
    newest_us = connection.execute(select(i.c.started_us).where(i.c.id == last)).scalar() or 0
    if to_us(at) > max(newest_us, time.time_ns() // 1000):  # the clock of the loop may be ahead, or virtual
        raise UsageError(f"{at.isoformat()} is still to come")


def _gone(horizon: Horizon, why: str) -> HistoryGone:
    began = "" if horizon.started_us is None else f", {iso(horizon.started_us)}"
    return HistoryGone(
        f"history begins at iteration {horizon.iteration}{began}, and {why}; what was there was removed, as the "
        "settings history_days, history_rows or history_bytes say"
    )


def started_by(connection: Connection, moment_us: int, low: int, high: int) -> int:
    """Return the last iteration that began at an instant or before it; numbers grow with time, so by halving."""
    i = T["iterations"]
    while low < high:
        middle = (low + high + 1) // 2
        started_us = connection.execute(select(i.c.started_us).where(i.c.id == middle)).scalar()
        if started_us is None or started_us <= moment_us:  # one that `ael db recover` could not save counts as past
            low = middle
        else:
            high = middle - 1
    return low


def _moment_of(connection: Connection, number: int, last: int) -> Moment:
    i, t, c, e, commits = T["iterations"], T["ticks"], T["state_changes"], T["events"], T["commits"]

    def scalar(query: Any) -> Any:
        return connection.execute(query).scalar()

    started_us = scalar(select(i.c.started_us).where(i.c.id == number))
    if number == last:  # everything there is
        newest = scalar(select(func.max(commits.c.id))) or 0
        carrying = scalar(select(i.c.commit_id).where(i.c.id == last)) or 0
        return Moment(
            number,
            started_us,
            scalar(select(func.max(t.c.id))) or 0,
            scalar(select(func.max(c.c.id))) or 0,
            scalar(select(func.max(e.c.id))) or 0,
            max(newest, carrying),
        )
    following = connection.execute(
        select(i.c.tick_id, i.c.commit_id).where(i.c.id > number).order_by(i.c.id).limit(1)
    ).one()
    after = connection.execute(
        select(t.c.change_id, t.c.event_id).where(t.c.id > following[0]).order_by(t.c.id).limit(1)
    ).first()
    if after is None:
        change_id, event_id = scalar(select(func.max(c.c.id))) or 0, scalar(select(func.max(e.c.id))) or 0
    else:
        change_id, event_id = after
    return Moment(number, started_us, following[0], change_id, event_id, following[1] - 1)
