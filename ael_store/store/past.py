"""A past moment to which a copy of a database is cut back: what lies after it, and what its rows were then.

The history says most of it: units, changes, events, and the moves that no unit tells. What is after the moment is
always there as a whole, because the horizon lies before it; so whatever nothing has touched since is as it was. The
rest is told from what lies before. The order is that of numbers where there are any; of rows that only carry an
instant, those after the beginning of the next iteration came later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select, text

from ael_store.model.records import Commit
from ael_store.schema.tables import metadata
from ael_store.store.digest import Seal
from ael_store.store.moment import Moment, horizon_of

__all__ = ["Past", "PastMove", "Rewind", "records_of"]

T = metadata.tables


@dataclass(frozen=True, slots=True)
class PastMove:
    """A move, with the agent that its subject was the name of."""

    id: int
    commit_id: int
    kind: str
    subject: str
    text: str
    """What it says, as JSON text."""
    agent_id: int | None
    """None where the subject is no agent."""

    @property
    def value(self) -> Any:
        return json.loads(self.text)


@dataclass(slots=True)
class Rewind:
    """What makes a copy what it was: rows to remove, and rows of small tables as they were."""

    commit: Commit
    """Only its rows that are updated in place; it is no commit of the history."""
    removed: dict[str, set[Any]] = field(default_factory=dict)
    """By table, primary keys (of `subscription_patterns` the first column)."""
    untold: list[str] = field(default_factory=list)
    """What the history does not say, as sentences."""

    def remove(self, table: str, *keys: Any) -> None:
        self.removed.setdefault(table, set()).update(keys)


class Past:
    """A moment of a database that an open connection reads; everything in it is as of that transaction."""

    def __init__(self, connection: Connection, moment: Moment) -> None:
        self.connection = connection
        self.moment = moment
        self.horizon = horizon_of(connection)
        following = self.rows(
            "SELECT started_us, run_id FROM iterations WHERE id > :n ORDER BY id LIMIT 1", n=moment.iteration
        )
        self.is_present = not following
        """True where nothing lies after the moment."""
        self.next_us: int | None = following[0][0] if following else None
        """When the next iteration began."""
        # The commit in which a run begins carries the iteration before its first, so it belongs to that moment.
        self.run_id: int = following[0][1] if following else self.number("SELECT max(id) FROM runs")
        self.move_id = self.number("SELECT max(id) FROM moves WHERE commit_id <= :c", c=moment.commit_id)
        """The last move up to it."""
        self.ended_us = self._end()
        """When the moment was over, as far as that is known."""
        self._epochs = self._names()
        self.names: dict[int, str] = {
            number: name
            for name, number in next(names for low, _, names in self._epochs if low <= self.move_id).items()
        }
        """The agents' names at the moment."""
        self.ids = {name: number for number, name in self.names.items()}

    # -- reading --

    def rows(self, sql: str, **parameters: Any) -> Sequence[Any]:
        return self.connection.execute(text(sql), parameters).all()

    def number(self, sql: str, **parameters: Any) -> int:
        """Return the one number of a query, 0 for NULL."""
        return int(self.connection.execute(text(sql), parameters).scalar() or 0)

    def error_of(self, tick_id: int) -> str | None:
        """Return type and message of a unit's failure, as an agent and a dead letter show it."""
        found = self.rows("SELECT type, message FROM tick_errors WHERE tick_id = :t", t=tick_id)
        return None if not found else (f"{found[0][0]}: {found[0][1]}" if found[0][1] else found[0][0])[:500]

    # -- before and after --

    def is_after(self, us: int | None) -> bool:
        """True where an instant lies after the moment; instants are told apart to the microsecond."""
        if us is None or self.next_us is None or us < self.next_us:
            return False
        if us > self.next_us:
            return True
        # Only a virtual clock stands still between two iterations, or between the start of a run and its first.
        return us not in (self.moment.started_us, self.run_started_us)

    def _end(self) -> int:
        moment = self.moment
        started = self.rows("SELECT started_us, ended_us FROM runs WHERE id = :r", r=self.run_id)
        self.run_started_us: int = started[0][0] if started else 0
        known = [
            self.run_started_us,
            self.number("SELECT started_us + duration_us FROM iterations WHERE id = :n", n=moment.iteration),
            self.number("SELECT max(at_us) FROM commits WHERE id <= :c", c=moment.commit_id),
        ]
        return max(known) if self.next_us is None else min(max(known), self.next_us)

    def units_before(self, commit_id: int) -> int:
        """Return the last unit before a commit, as its seal says; of one without a seal, the last up to the moment."""
        for (raw,) in self.rows(
            "SELECT seal FROM commits WHERE id = :c UNION ALL SELECT seal FROM iterations WHERE commit_id = :c",
            c=commit_id,
        ):
            seal = None if raw is None else Seal.unpack(raw)
            if seal is not None:
                return seal.tick_id - seal.ticks
        return self.moment.tick_id

    # -- moves --

    def _names(self) -> list[tuple[int, int, dict[str, int]]]:
        """Return which agent each name meant, newest first: after which move, up to which one, the names.

        An agent that is renamed takes its past with it; what its moves are filed under is its name of then.
        """
        names = {name: number for number, name in self.rows("SELECT id, name FROM agents WHERE id > 0")}
        until = max(self.move_id, self.number("SELECT max(id) FROM moves"))
        epochs = []
        for number, subject, value in self.rows(
            "SELECT id, subject, value FROM moves WHERE kind = 'flag' AND value LIKE '{\"renamed_from\":%' "
            "ORDER BY id DESC"
        ):
            epochs.append((number, until, names))
            agent_id = names.get(subject)
            names, until = dict(names), number - 1
            if agent_id is not None:
                del names[subject]
                names[json.loads(value)["renamed_from"]] = agent_id
            for name, other in list(names.items()):  # a forgotten one of that name had given it up
                if name == f"({subject} {other})":
                    names[subject] = names.pop(name)
        epochs.append((0, until, names))
        return epochs

    def newest_moves(self, kind: str) -> dict[int, PastMove]:
        """Return the newest move of a kind up to the moment, by agent."""
        found: dict[int, PastMove] = {}
        for low, high, names in self._epochs:
            for number, commit_id, subject, value in self.rows(
                "SELECT id, commit_id, subject, value FROM moves WHERE id IN (SELECT max(id) FROM moves "
                "WHERE kind = :kind AND id >= :low AND id <= :high GROUP BY subject)",
                **{"kind": kind, "low": low, "high": min(high, self.move_id)},
            ):
                agent_id = _agent_of(names, subject)
                if agent_id is not None:
                    move = PastMove(number, commit_id, kind, subject, value, agent_id)
                    found.setdefault(agent_id, move)
        return found

    def moved_since(self, kind: str) -> set[int]:
        """Return the agents that have a move of a kind after the moment."""
        found: set[int] = set()
        for low, high, names in self._epochs:
            subjects = self.rows(
                "SELECT DISTINCT subject FROM moves WHERE kind = :kind AND id >= :low AND id <= :high",
                **{"kind": kind, "low": max(low, self.move_id + 1), "high": high},
            )
            found.update(number for (name,) in subjects if (number := _agent_of(names, name)) is not None)
        return found

    def moves(self, kind: str) -> Iterator[PastMove]:
        """Yield all moves of a kind, oldest first: for kinds that are rare."""
        for low, high, names in reversed(self._epochs):
            for number, commit_id, subject, value in self.rows(
                "SELECT id, commit_id, subject, value FROM moves WHERE kind = :kind AND id >= :low AND id <= :high "
                "ORDER BY id",
                **{"kind": kind, "low": low, "high": high},
            ):
                yield PastMove(number, commit_id, kind, subject, value, names.get(subject))


def _agent_of(names: dict[str, int], subject: str) -> int | None:
    """Return the agent that a name meant; schedules of agents that are not there are filed under the number."""
    found = names.get(subject)
    return int(subject) if found is None and subject.isdigit() and int(subject) in names.values() else found


def records_of(past: Past, table: str, record: type, where: str = "1", **parameters: Any) -> list[Any]:
    """Return rows of a table as records, in order of their keys."""
    columns = [column for column in T[table].c if column.name != "digest"]
    query = select(*columns).where(text(where)).order_by(*T[table].primary_key)
    return [record(*row) for row in past.connection.execute(query, parameters)]
