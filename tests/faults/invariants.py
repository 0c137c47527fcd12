"""What must hold of any database that the agents of `agents.py` have written, seen from outside by SQL.

    found = violations(path)            # everything, from the beginning
    ledger = Ledger(path)               # the same in steps, for a series of faults:
    found += ledger.look()              # what is new since the last look, also beside a running loop
    found += ledger.check()             # everything again, and nothing that was ever seen is gone

A violation is a sentence that begins with what kind it is: `lost:` something that was committed is gone, `twice:`
something took effect more than once, `wrong:` anything else. Everything is read by plain sqlite3, read-only.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tests.acceptance.database import Row, reading
from tests.faults.agents import ACCOUNTS, MONEY

__all__ = ["Ledger", "tally", "violations"]

GROWING = {
    "v_iterations": "iteration",
    "v_state_history": "id",
    "v_events": "id",
    "v_ticks": "id",
}
"""The views that only grow, and what numbers their rows without gaps."""

DELIVERIES = {"book": ("book/event", ("paid", "due")), "auditor": ("audit/event", ("paid",))}
"""Subscriber: the key whose history is the list of events that it handled, and the types that it wants."""

NUMBERED = ("paid", "due", "order")
"""Events whose data number them from 1, in the order of their ids."""


def violations(path: Path) -> list[str]:
    """Return everything that is wrong with a database of the crash agents; nothing where all is well."""
    ledger = Ledger(path)
    return ledger.look() + ledger.check()


def tally(found: Iterable[str]) -> dict[str, int]:
    """Count violations as a Report does."""
    kinds = Counter(text.partition(":")[0] for text in found)
    lost, twice = kinds.pop("lost", 0), kinds.pop("twice", 0)
    return {"lost": lost, "duplicated": twice, "silent": kinds.total()}


class Ledger:
    """Everything that was ever seen committed; it may grow, and never change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[Row]] = {view: [] for view in GROWING}
        self.runs: dict[int, Row] = {}
        self.commit_id = 0
        """The last commit seen."""
        self._found: list[str] = []
        self._state: dict[str, str] = {}
        """The value of each key by replay."""
        self._versions: Counter[str] = Counter()
        self._units: dict[str, Counter[tuple[str, str]]] = {}
        self._wanted: dict[str, list[int]] = {name: [] for name in DELIVERIES}
        self._handled: dict[str, list[int]] = {name: [] for name in DELIVERIES}
        self._numbers: Counter[str] = Counter()
        self._events_of: Counter[int] = Counter()
        self._tick: Row = (0, 0, 0)
        """id, last change and last event of the last tick seen."""

    @property
    def iteration(self) -> int:
        """The last iteration seen."""
        return len(self.rows["v_iterations"])

    @property
    def keys(self) -> set[str]:
        """The keys of the state at the last look."""
        return set(self._state)

    def value(self, key: str) -> str | None:
        """Return the JSON text of a key as it was at the last look."""
        return self._state.get(key)

    def look(self) -> list[str]:
        """Take up what is new since the last time, and return what is wrong with it."""
        self._found = []
        if self._is_there():
            try:
                with reading(self.path) as connection:
                    self._take_up(connection)
            except sqlite3.Error as error:
                self._wrong(f"the database can't be read: {error}")
        return self._found

    def check(self) -> list[str]:
        """Compare all of what was seen with what the database says now, and have SQLite look at every page."""
        self._found = []
        if self._is_there():
            try:
                with reading(self.path) as connection:
                    self._check_sound(connection)
                    for view, key in GROWING.items():
                        now = connection.execute(f"SELECT * FROM {view} ORDER BY {key}").fetchall()
                        self._compare(view, self.rows[view], now)
            except sqlite3.Error as error:
                self._wrong(f"the database can't be read: {error}")
        return self._found

    def _is_there(self) -> bool:
        """A database that was never seen may be missing; one that is there is complete."""
        there = self.path.exists()
        if not there and self.commit_id:
            self._lost("the database is gone")
        return there

    # -- telling --

    def _lost(self, text: str) -> None:
        self._found.append(f"lost: {text}")

    def _twice(self, text: str) -> None:
        self._found.append(f"twice: {text}")

    def _wrong(self, text: str) -> None:
        self._found.append(f"wrong: {text}")

    def _equal(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self._wrong(f"{what} is {found!r:.300}, wanted is {wanted!r:.300}")

    # -- what is new --

    def _take_up(self, connection: sqlite3.Connection) -> None:
        self._follow_commits(connection)
        new = {view: self._new_rows(connection, view) for view in GROWING}
        self._follow_history(new["v_state_history"])
        self._follow_events(new["v_events"])
        self._follow_ticks(connection, new["v_ticks"])
        self._check_runs(connection, new["v_iterations"])
        self._check_state(connection)
        self._check_counts(connection)
        self._check_books(connection)
        self._check_deliveries(connection)

    def _follow_commits(self, connection: sqlite3.Connection) -> None:
        """Commits are numbered without gaps, in the order of iterations, and none is there twice."""
        last, last_iteration = self.commit_id, self.iteration
        others = connection.execute("SELECT id FROM commits WHERE id > ?", (last,))
        numbers = Counter(number for (number,) in others)
        rows = connection.execute("SELECT commit_id FROM iterations WHERE id > ? ORDER BY id", (last_iteration,))
        ordered = [number for (number,) in rows]
        if ordered != sorted(ordered) or (ordered and ordered[0] <= last):
            self._wrong(f"iterations after {last_iteration} belong to commits {ordered[:20]}")
        numbers.update(set(ordered))
        newest = max(numbers, default=last)
        for number in range(last + 1, newest + 1):
            if numbers[number] != 1:
                self._wrong(f"commit {number} is there {numbers[number]} times")
        if (
            last
            and not connection.execute(
                "SELECT 1 FROM commits WHERE id = ? UNION ALL SELECT 1 FROM iterations WHERE id = ? AND commit_id = ?",
                (last, last_iteration, last),
            ).fetchone()
        ):
            self._lost(f"commit {last} was seen and is gone")
        self.commit_id = newest

    def _new_rows(self, connection: sqlite3.Connection, view: str) -> list[Row]:
        """Return the rows after the last one seen, which must still be as it was."""
        key, known = GROWING[view], self.rows[view]
        last = known[-1][0] if known else 0
        rows = connection.execute(f"SELECT * FROM {view} WHERE {key} >= ? ORDER BY {key}", (last,)).fetchall()
        if known:
            self._compare(view, known[-1:], rows[:1])
            rows = [row for row in rows if row[0] > last]
        for wanted, row in enumerate(rows, last + 1):
            if row[0] != wanted:
                self._lost(f"{view}: {key} {wanted} is missing, the next one is {row[0]}")
                break
        known += rows
        return rows

    def _compare(self, view: str, seen: list[Row], now: list[Row]) -> None:
        """Whatever was seen is still there, unchanged."""
        present = {row[0]: row for row in now}
        for row in seen:
            found = present.get(row[0])
            if found is None:
                self._lost(f"{view}: {row} was seen and is gone")
            elif found != row:
                self._wrong(f"{view}: what was {row} is now {found}")

    def _follow_history(self, rows: list[Row]) -> None:
        """Each change says what was there before it; replayed, the changes give the state."""
        for number, key, operation, old, new, *_ in rows:
            before = self._state.get(key)
            if old != before:
                self._wrong(f"change {number} of {key!r} replaced {old}, but the key held {before}")
            if operation == "delete":
                self._state.pop(key, None)
                self._versions.pop(key, None)
            else:
                self._state[key] = new
                self._versions[key] += 1
            if key == "clumsy/leak":
                self._wrong(f"change {number} of {key!r} is from a tick that failed")
            for subscriber, (effect, _) in DELIVERIES.items():
                if key == effect:
                    self._handled[subscriber].append(int(new))

    def _follow_events(self, rows: list[Row]) -> None:
        """Events that their data number come once each, in order; those of failed ticks do not exist."""
        for number, type, _, data, _, iteration, *_ in rows:
            self._events_of[iteration] += 1
            if type == "leak":
                self._wrong(f"event {number} is from a tick that failed")
            if type in NUMBERED:
                found, last = json.loads(data)["number"], self._numbers[type]
                if found <= last:
                    self._twice(f"event {number}, {type} {found}, comes after {type} {last}")
                elif found > last + 1:
                    self._lost(f"event {number} is {type} {found}, the one before it was {type} {last}")
                self._numbers[type] = found
            for subscriber, (_, types) in DELIVERIES.items():
                if type in types:
                    self._wanted[subscriber].append(number)

    def _follow_ticks(self, connection: sqlite3.Connection, rows: list[Row]) -> None:
        """Ticks share out all changes and events among them, and those that failed have none."""
        for _, agent, _, kind, outcome, *_ in rows:
            self._units.setdefault(agent, Counter())[kind, outcome] += 1
        last, change, event = self._tick
        found = connection.execute(
            "SELECT id, change_id, event_id, changes, events, outcome, iteration FROM ticks WHERE id > ? ORDER BY id",
            (last,),
        ).fetchall()
        for number, after_change, after_event, changes, events, outcome, _ in found:
            if (after_change, after_event) != (change, event):
                self._wrong(
                    f"tick {number} begins after change {after_change} and event {after_event}, "
                    f"the one before it ended with {change} and {event}"
                )
            if outcome != 0 and changes:
                self._wrong(f"tick {number} failed and changed {changes} values")
            last, change, event = number, after_change + changes, after_event + events
        self._tick = (last, change, event)
        for name, wanted in (("v_state_history", change), ("v_events", event), ("v_ticks", last)):
            kept = self.rows[name][-1][0] if self.rows[name] else 0
            if kept != wanted:
                self._wrong(f"{name} ends with {kept}, the ticks say {wanted}")

    # -- what must hold now --

    def _check_runs(self, connection: sqlite3.Connection, new: list[Row]) -> None:
        """Runs follow each other without gaps; all but the last have ended; each iteration belongs to one."""
        rows = connection.execute(
            "SELECT id, status, first_iteration, last_iteration, token FROM runs ORDER BY id"
        ).fetchall()
        for earlier, later in pairwise(rows):
            if earlier[1] == "running":
                self._wrong(f"run {earlier[0]} is {earlier[1]}, and {later[0]} came after it")
            if earlier[3] is None or earlier[3] + 1 != later[2]:
                self._wrong(f"run {earlier[0]} ended with iteration {earlier[3]}, the next one began with {later[2]}")
            if later[4] <= earlier[4]:
                self._wrong(f"the tokens of runs {earlier[0]} and {later[0]} are {earlier[4]} and {later[4]}")
        self._equal("the numbers of runs", [row[0] for row in rows], list(range(1, len(rows) + 1)))
        token = connection.execute("SELECT token FROM lease").fetchone()[0]
        if rows and token < rows[-1][4]:
            self._wrong(f"the token of the lease is {token}, that of the last run {rows[-1][4]}")
        for row in rows:
            seen = self.runs.get(row[0])
            if seen is not None and seen[1] != "running" and seen != row:
                self._wrong(f"run {seen} is now {row}")
            self.runs[row[0]] = row
        for gone in self.runs.keys() - {row[0] for row in rows}:
            self._lost(f"run {gone} was seen and is gone")
            del self.runs[gone]
        ends = {row[3] for row in rows}
        for iteration, run_id, *_, events, _ in new:
            run = self.runs.get(run_id)
            if run is None or not run[2] <= iteration <= (iteration if run[3] is None else run[3]):
                self._wrong(f"iteration {iteration} says that it is of run {run_id}, which is {run}")
            found = self._events_of[iteration]
            # start and shutdown count with the last iteration of a run
            if events > found or (events < found and iteration not in ends and iteration != self.iteration):
                self._wrong(f"iteration {iteration} says {events} events, there are {found}")

    def _check_state(self, connection: sqlite3.Connection) -> None:
        now = {
            key: (value, version)
            for key, value, version in connection.execute("SELECT key, value, version FROM v_state")
        }
        replayed = {key: (value, self._versions[key]) for key, value in self._state.items()}
        if now != replayed:
            for key in sorted(now.keys() | replayed.keys()):
                if now.get(key) != replayed.get(key):
                    self._wrong(f"{key!r} is {now.get(key)}, its history says {replayed.get(key)}")

    def _check_counts(self, connection: sqlite3.Connection) -> None:
        """The statistics say what the log of ticks says."""
        for name, *found in connection.execute("SELECT name, tick_count, error_count, event_count FROM v_agents"):
            units = self._units.get(name, Counter())
            failed = sum(number for (_, outcome), number in units.items() if outcome in ("error", "timeout"))
            wanted = [units["tick", "success"], failed, units["event", "success"]]
            self._equal(f"(ticks, errors, events) of {name}", found, wanted)

    def _check_books(self, connection: sqlite3.Connection) -> None:
        """What the agents have done adds up."""
        state = {key: int(value) for key, value in self._state.items() if value.lstrip("-").isdigit()}
        agents = {
            name: row
            for name, *row in connection.execute("SELECT name, tick_count, error_count, metadata FROM v_agents")
        }
        if "account/0" in state:
            self._equal("all money", sum(state.get(f"account/{n}", 0) for n in range(ACCOUNTS)), ACCOUNTS * MONEY)
        ticks = {name: row[0] for name, row in agents.items()}
        for key, wanted in (
            ("twin/ticks", ticks.get("twins", 0)),
            ("twin/left", ticks.get("twins", 0)),
            ("twin/right", ticks.get("twins", 0)),
            ("slow/ticks", ticks.get("slow", 0)),
            ("clumsy/errors", agents["clumsy"][1] if "clumsy" in agents else 0),
            ("agent/payer/paid", self._numbers["paid"]),
            ("orders", self._numbers["order"]),
        ):
            found = state.get(key, 0)
            if found < wanted:
                self._lost(f"{key!r} is {found}, {wanted} were counted")
            elif found > wanted:
                self._twice(f"{key!r} is {found}, {wanted} were counted")
        if ticks.get("twins"):
            self._equal("metadata of twins", agents["twins"][2], f'{{"ticks":{ticks["twins"]}}}')
        happened, waiting = connection.execute(
            "SELECT count(event_id), count(*) - count(event_id) FROM delayed_events WHERE type = 'due'"
        ).fetchone()
        self._equal("the number of delayed events", happened + waiting, state.get("agent/payer/due", 0))
        self._equal("the number of delayed events that happened", happened, self._numbers["due"])

    def _check_deliveries(self, connection: sqlite3.Connection) -> None:
        """Every event had its effect once and in order, or still waits for it."""
        pending: dict[str, list[int]] = {name: [] for name in DELIVERIES}
        for subscriber, number in connection.execute("SELECT subscriber, event_id FROM v_pending ORDER BY 2"):
            if subscriber in pending:
                pending[subscriber].append(number)
        for subscriber, wanted in self._wanted.items():
            handled = self._handled[subscriber]
            if handled == wanted[: len(handled)] and pending[subscriber] == wanted[len(handled) :]:
                continue
            effects = Counter(handled)
            for number, times in effects.items():
                if times > 1:
                    self._twice(f"{subscriber} handled event {number} {times} times")
                if number in pending[subscriber]:
                    self._twice(f"{subscriber} handled event {number}, which still waits for it")
            for number in set(wanted) - set(handled) - set(pending[subscriber]):
                self._lost(f"{subscriber} never handled event {number}, which does not wait for it either")
            if handled != sorted(handled) or set(handled) - set(wanted):
                self._wrong(f"{subscriber} handled {handled[-20:]}, there were {wanted[-20:]}")

    def _check_sound(self, connection: sqlite3.Connection) -> None:
        self._equal("integrity_check", connection.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
        self._equal("foreign_key_check", connection.execute("PRAGMA foreign_key_check").fetchall(), [])
