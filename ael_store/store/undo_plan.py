"""What undoing changes comes to: for each key the newest change that stays decides.

The changes to undo are those of an agent since an iteration or a time, those of an iteration, or one. Of each key that
they have touched, the newest change that is *not* among them is looked up, one walk down the index of the key. Where
that is the newest of all, somebody has changed the key since, and it is kept; else its value is what was there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select, text

from ael_store.clock import to_us
from ael_store.errors import AgentNotFound, HistoryGone, UsageError
from ael_store.schema.recent import CHANGES
from ael_store.schema.tables import metadata
from ael_store.store.moment import Horizon, horizon_of, moment_at, read_moment

__all__ = ["CHANGED", "REDACTED_SINCE", "UndoPlan", "UndoScope", "UndoStep", "plan_undo"]

T = metadata.tables

CHANGED = "changed since"
REDACTED_SINCE = "redacted"
"""Why a key is kept as it is."""


@dataclass(frozen=True, slots=True)
class UndoScope:
    """Which changes are to be undone; what is None does not matter."""

    agent_id: int | None = None
    first_iteration: int | None = None
    since_us: int | None = None
    iteration: int | None = None
    change_id: int | None = None

    def holds(self, change_id: int, agent_id: int, iteration: int, started_us: int) -> bool:
        """True where a change is among them, by its number and the unit that made it."""
        return (
            self.change_id in (None, change_id)
            and self.agent_id in (None, agent_id)
            and self.iteration in (None, iteration)
            and (self.first_iteration is None or iteration >= self.first_iteration)
            and (self.since_us is None or started_us >= self.since_us)
        )

    @property
    def condition(self) -> str:
        """The same in SQL, on a change `c` of a unit `t`; NULL where the unit is gone."""
        parts = {
            "c.id = :change_id": self.change_id,
            "t.agent_id = :agent_id": self.agent_id,
            "t.iteration = :iteration": self.iteration,
            "t.iteration >= :first_iteration": self.first_iteration,
            "t.started_us >= :since_us": self.since_us,
        }
        return " AND ".join(part for part, value in parts.items() if value is not None)


@dataclass(frozen=True, slots=True)
class UndoStep:
    """One key: the JSON text that it has and had before (None for no value), or why it is kept, and whose doing."""

    key: str
    now: str | None
    before: str | None
    kept: str | None = None
    agent: str | None = None
    iteration: int | None = None


@dataclass(frozen=True, slots=True)
class UndoPlan:
    """What undoing comes to, key by key in order."""

    scope: UndoScope
    steps: list[UndoStep]


def plan_undo(
    connection: Connection,
    agent: str | None = None,
    since: int | str | None = None,
    change: int | None = None,
    iteration: int | None = None,
) -> UndoPlan:
    """Return what undoing would do: changes of `agent` since an iteration or a time, one change, or an iteration's.

    With `agent` only that agent's of an iteration. Raises AgentNotFound; HistoryGone where what was there before was
    removed; UsageError for another choice, and for what has not been yet.
    """
    _check_choice(agent, since, change, iteration)
    horizon = horizon_of(connection)
    agent_id = None if agent is None else _agent_id(connection, agent)
    if change is not None:
        scope = UndoScope(change_id=change)
        keys = [_key_of(connection, change, horizon)]
    else:
        scope, after, until = _of_units(connection, agent_id, since, iteration, horizon)
        keys = _keys_of(connection, scope, after, until)
    return UndoPlan(scope, list(_steps(connection, scope, keys)))


def _check_choice(agent: Any, since: Any, change: Any, iteration: Any) -> None:
    for name, value in (("change", change), ("iteration", iteration)):
        if value is not None and (type(value) is not int or value < 0):
            raise UsageError(f"{name} is {value!r}, wanted is a number")
    if agent is not None and type(agent) is not str:
        raise UsageError(f"agent is {agent!r}, wanted is a name")
    given = [value is not None for value in (since, change, iteration)]
    if sum(given) != 1 or (since is not None and agent is None) or (change is not None and agent is not None):
        raise UsageError(
            "say what to undo in one of three ways: --agent NAME --since N (or a time), --change ID, or "
            "--iteration N, with --agent NAME only that agent's"
        )


def _agent_id(connection: Connection, name: str) -> int:
    a = T["agents"]
    found = connection.execute(select(a.c.id).where(a.c.name == name)).scalar()
    if found is None:
        known = connection.execute(select(a.c.name).order_by(a.c.name)).scalars()
        raise AgentNotFound(f"no agent {name!r} has changed anything here; known are: {', '.join(known)}")
    return int(found)


def _key_of(connection: Connection, change: int, horizon: Horizon) -> tuple[int, str]:
    c, k = T["state_changes"], T["keys"]
    query = select(k.c.id, k.c.name).join_from(c, k, k.c.id == c.c.key_id).where(c.c.id == change)
    if 0 < change <= horizon.change_id:
        raise _gone(horizon, f"change {change}")
    found = connection.execute(query).first()
    if found is None:
        newest = connection.execute(select(func.max(c.c.id))).scalar() or 0
        raise UsageError(f"there is no change {change}; the newest is {newest}, and `ael state history KEY` lists them")
    return found[0], found[1]


def _of_units(
    connection: Connection, agent_id: int | None, since: int | str | None, iteration: int | None, horizon: Horizon
) -> tuple[UndoScope, int, int]:
    """Return the scope, and between which units it lies: after the first number, up to the second."""
    at: int | datetime | None = read_moment(since) if isinstance(since, str) else since
    since_us = to_us(at) if isinstance(at, datetime) else None
    moment = moment_at(connection, iteration if at is None else at)
    first = moment.iteration
    if horizon.iteration and first <= horizon.iteration:
        raise _gone(horizon, f"iteration {first}")
    after = moment_at(connection, first - 1).tick_id if first else 0
    if at is None:
        return UndoScope(agent_id=agent_id, iteration=first), after, moment.tick_id
    newest = connection.execute(select(func.max(T["ticks"].c.id))).scalar() or 0
    return UndoScope(agent_id=agent_id, first_iteration=first, since_us=since_us), after, newest


def _gone(horizon: Horizon, what: str) -> HistoryGone:
    return HistoryGone(
        f"history begins after iteration {horizon.iteration}, so what was there before {what} is not known any more"
    )


def _keys_of(connection: Connection, scope: UndoScope, after: int, until: int) -> list[tuple[int, str]]:
    """Return the keys that changes of these units have touched; a unit knows the range of its changes."""
    query = text(
        "SELECT k.id, k.name FROM keys k WHERE k.id IN ("
        "SELECT c.key_id FROM ticks t CROSS JOIN state_changes c ON c.id > t.change_id AND c.id <= t.change_id + "
        f"t.changes WHERE t.id > :after AND t.id <= :until AND {scope.condition}) ORDER BY k.name"
    )
    rows = connection.execute(query, {**_parameters(scope), "after": after, "until": until})
    return [(row[0], row[1]) for row in rows]


def _steps(connection: Connection, scope: UndoScope, keys: list[tuple[int, str]]) -> Iterator[UndoStep]:
    newest = text(f"SELECT id, value FROM {CHANGES} WHERE key_id = :key ORDER BY id DESC LIMIT 1")
    stays = text(  # walks down the index of the key, and ends at the first one that stays
        "SELECT c.id AS id, c.value AS value, a.name AS agent, t.iteration AS iteration, "
        "EXISTS (SELECT 1 FROM row_digests d WHERE d.kind = 'state_changes' AND d.row_id = c.id "
        "AND d.why = 'redacted') AS redacted "
        f"FROM {CHANGES} c LEFT JOIN ticks t ON t.id = c.tick_id LEFT JOIN agents a ON a.id = t.agent_id "
        f"WHERE c.key_id = :key AND ({scope.condition}) IS NOT 1 ORDER BY c.id DESC LIMIT 1"
    )
    parameters = _parameters(scope)
    for number, key in keys:
        newest_id, now = connection.execute(newest, {"key": number}).one()
        base = connection.execute(stays, {**parameters, "key": number}).mappings().first()
        if base is None:
            yield UndoStep(key, now, None)
        elif base["id"] == newest_id:
            yield UndoStep(key, now, now, CHANGED, base["agent"], base["iteration"])
        elif base["redacted"]:
            yield UndoStep(key, now, now, REDACTED_SINCE, base["agent"], base["iteration"])
        else:
            yield UndoStep(key, now, base["value"])


def _parameters(scope: UndoScope) -> dict[str, int]:
    values = {
        "change_id": scope.change_id,
        "agent_id": scope.agent_id,
        "iteration": scope.iteration,
        "first_iteration": scope.first_iteration,
        "since_us": scope.since_us,
    }
    return {name: value for name, value in values.items() if value is not None}
