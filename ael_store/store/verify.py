"""The proof inside the file: that what a database holds is what was committed.

SQLite's own check sees a broken structure; this sees a changed value. In this order:

1. The schema and SQLite's check of the structure, indexes included (`schema_check.py`).
2. The numbers of iterations, commits, units, changes and events have no gaps.
3. Each commit's seal: the digests of everything that it wrote (`digest.py`), which locates what was changed.
4. Rows that are updated in place: their own digests.
5. The state is what replaying its history gives, and so are versions and owners of the keys.
6. Tasks are what their attempts add up to: how many, and what they cost; metrics have as many samples as their hours.
7. Statistics are what the kept units and the kept totals add up to.

Everything is read in one transaction, so that it is one moment, also beside a running loop. Rows from before
revision 0004 carry no digests; for them steps 5 to 7 remain, and the report says how many they are.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ael_store.errors import DatabaseDamaged
from ael_store.model.event import REDACTED
from ael_store.model.records import TickRow
from ael_store.schema.recent import TABLES as RECENT_TABLES
from ael_store.schema.tables import metadata
from ael_store.store.advice import advice
from ael_store.store.digest import GROUPS, Seal, agent_content, event_content, fold, row_digest, tick_content
from ael_store.store.moment import Horizon
from ael_store.store.prune import count_units
from ael_store.store.revision import explain, reading
from ael_store.store.schema_check import check

__all__ = ["VerifyReport", "look_at_newest", "verify", "verify_newest"]

CHUNK = 2000
"""Commits that are looked at together."""
NEWEST, NEWEST_UNITS = 500, 1000
"""How many commits the quick form looks at, at most: so many, or the last ones that have so many units."""
MOST_TOGETHER = 1000
"""How many iterations share a commit at most (`runtime/iteration.py`)."""
SHOWN = 100
"""Problems that are described; the others are counted."""

WITH_DIGEST = tuple(
    table.name for table in metadata.sorted_tables if "digest" in table.c and table.name != "row_digests"
)
GROWING = {"tasks": " OR applied_us IS NULL", "task_attempts": " OR ended_us IS NULL", "metric_samples": ""}
"""Tables with digests that grow without end, and which of their rows are not over."""
REDACTED_IN = {"state_changes": "value", "events": "data"}

TICKS = ", ".join(TickRow._fields)
EVENTS = (
    "SELECT e.id, y.name, s.name, e.data, e.metadata, e.timestamp_us, e.tick_id, e.hops, o.name FROM events e "
    "LEFT JOIN event_types y ON y.id = e.type_id LEFT JOIN event_sources s ON s.id = e.source_id "
    "LEFT JOIN event_sources o ON o.id = e.target_id"
)
ITERATION = "id, run_id, commit_id, clock, started_us, duration_us, ticks, errors, events, missed, tick_id"

UNREADABLE = (sqlite3.DatabaseError, ValueError, TypeError)
"""What changed bits lead to: pages that SQLite refuses, and values that no writer has written."""

Tell = Callable[[str], None]
Row = tuple[Any, ...]


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found."""

    commits: int = 0
    sealed: int = 0
    """How many of them carry digests; the others are older than revision 0004."""
    rows: int = 0
    """Rows whose content was compared with a digest."""
    keys: int = 0
    """Keys whose value was compared with their history."""
    problems: list[str] = field(default_factory=list)
    """One sentence each, with the place; empty where all is well."""
    more: int = 0
    """Problems beyond those that are described."""

    def add(self, problem: str) -> None:
        if len(self.problems) < SHOWN:
            self.problems.append(problem)
        else:
            self.more += 1


def verify(path: Path, tell: Tell | None = None) -> VerifyReport:
    """Compare everything that a database holds with what was committed. Only reads; may run beside a loop.

    Takes about 10 s for a million changes. Raises what opening a database raises; what is wrong inside is in the
    report, also where SQLite can't read on.
    """
    tell = tell or (lambda line: None)
    report = VerifyReport()
    tell("schema and structure")
    for problem in check(path, thorough=True).problems:
        report.add(problem)
    with reading(path) as connection:
        connection.execute("BEGIN")
        proof = _Proof(connection, report)
        for step, what in (
            (proof.numbers, "numbers"),
            (proof.recent, "rows that no index has yet"),
            (lambda: proof.seals(proof.horizon.commit_id, tell), "commits"),
            (proof.base, "what is kept from before the horizon"),
            (proof.rows_in_place, "rows that are updated in place"),
            (proof.tasks, "tasks against their attempts"),
            (proof.metrics, "metrics against their hours"),
            (proof.redactions, "redacted values"),
            (proof.replay, "state against its history"),
            (proof.recount, "statistics against units"),
        ):
            tell(what)
            try:
                step()
            except UNREADABLE as error:
                report.add(f"{what}: can't be read on: {error}")
    return report


def verify_newest(path: Path) -> None:
    """The quick form, for a start after a crash: the newest commits, and rows that are updated in place.

    Of tasks and their attempts, which grow without end, the newest and those that are not over.

    Raises DatabaseDamaged with the first problem. Takes a fraction of a second, however long the history is.
    """
    try:
        with reading(path) as connection:
            connection.execute("BEGIN")
            report = look_at_newest(connection)
    except sqlite3.DatabaseError as error:
        raise explain(error, path) from error
    if report.problems:
        raise DatabaseDamaged(
            f"{path} is not what was committed: {report.problems[0]}"
            + (f" (and {len(report.problems) - 1 + report.more} more)" if len(report.problems) > 1 else "")
            + f"; nothing was changed. {advice(path)}"
        )


def look_at_newest(connection: sqlite3.Connection) -> VerifyReport:
    """Return what the quick form finds, on a connection that is in a transaction."""
    report = VerifyReport()
    try:
        proof = _Proof(connection, report)
        proof.seals(max(proof.before_newest(), proof.horizon.commit_id), lambda line: None)
        proof.rows_in_place(newest=NEWEST_UNITS)
        if proof.first_change is not None:
            proof.newest_values(max(0, proof.first_change - 1))
    except (ValueError, TypeError) as error:
        report.add(f"it can't be read: {error}")
    return report


class _Proof:
    """The steps, on one connection in one transaction."""

    def __init__(self, connection: sqlite3.Connection, report: VerifyReport) -> None:
        self.connection = connection
        self.report = report
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")  # changed bits may be no text
        self.first_change: int | None = None
        """The first change that `seals` met; None where no commit had a seal."""
        self.kept: dict[tuple[str, int], int] = {
            (kind, number): digest
            for kind, number, digest in connection.execute(
                "SELECT kind, row_id, digest FROM row_digests WHERE why = 'redacted'"
            )
        }
        found = connection.execute("SELECT value FROM positions WHERE name = 'horizon'").fetchone()
        self.horizon = Horizon() if found is None else Horizon(**json.loads(found[0]))

    def rows(self, sql: str, *parameters: object) -> list[Row]:
        return self.connection.execute(sql, parameters).fetchall()

    def before_newest(self) -> int:
        """Return the commit after which the newest begin."""
        ((last_iteration, last_commit),) = self.rows(
            "SELECT coalesce(max(id), 0), max(coalesce((SELECT max(id) FROM commits), 0), coalesce((SELECT commit_id "
            "FROM iterations ORDER BY id DESC LIMIT 1), 0)) FROM iterations"
        )
        units, after = 0, None
        for commit, raw in self.rows(
            "SELECT commit_id, seal FROM iterations WHERE id > ? AND seal IS NOT NULL ORDER BY id DESC LIMIT ?",
            last_iteration - NEWEST * MOST_TOGETHER,
            NEWEST,
        ):
            seal = Seal.unpack(raw)
            units += 0 if seal is None else seal.ticks
            if after is None or units <= NEWEST_UNITS:
                after = int(commit) - 1
            if units > NEWEST_UNITS:
                break
        # Those of a schema without seals may be millions, and can't be proven.
        return max(0, last_commit - NEWEST if after is None else after)

    # -- numbers --

    def numbers(self) -> None:
        """No gaps: each table's ids are as many as from its first to its last; known losses do not count."""
        known = self._known_losses()
        horizon = self.horizon
        for table, begin in (
            ("iterations", horizon.iteration),
            ("ticks", horizon.tick_id),
            ("state_changes", horizon.change_id),
            ("events", horizon.forgotten_event_id),
            ("metric_samples", 0),
        ):
            ((first, last, count),) = self.rows(f"SELECT min(id), max(id), count(*) FROM {table} WHERE id > ?", begin)
            missing = (last - first + 1 - count if count else 0) - _within(known.get(table, []), first, last)
            if missing > 0:
                self.report.add(f"table {table}: {missing} rows between {first} and {last} are missing")
        ((first, last, count),) = self.rows(
            "SELECT min(id), max(id), count(*) FROM (SELECT id FROM commits UNION SELECT commit_id FROM iterations) "
            "WHERE id > ?",
            horizon.commit_id,
        )
        missing = (last - first + 1 - count if count else 0) - _within(known.get("commits", []), first, last)
        if missing > 0:
            self.report.add(f"{missing} commits between {first} and {last} are missing")

    def recent(self) -> None:
        """What no index has yet is the newest of its table, else a question by key or type would not find it."""
        for table in RECENT_TABLES:
            ((hidden,),) = self.rows(
                f"SELECT count(*) FROM {table} WHERE recent = 1 AND id < (SELECT max(id) FROM {table} "
                "WHERE recent IS NULL)"
            )
            if hidden:
                self.report.add(f"table {table}: {hidden} rows before indexed ones are in no index")

    def _known_losses(self) -> dict[str, list[tuple[int, int]]]:
        """The ranges that `ael db recover` could not save, by table."""
        noted = self.rows("SELECT value FROM meta WHERE name = 'recovered'")
        return dict(json.loads(noted[0][0])["missing"]) if noted else {}

    # -- seals --

    def seals(self, after: int, tell: Tell) -> None:
        """Compare each commit after `after` with its seal."""
        before: Seal | None = None
        for chunk in self._commits(after):
            content = _Content(self, chunk)
            if self.first_change is None and any(commit.seal is not None for commit in chunk):
                self.first_change = content.first_change
            for commit in chunk:
                self.report.commits += 1
                if commit.seal is None:
                    before = None
                    continue
                self.report.sealed += 1
                seal = Seal.unpack(commit.seal)
                if seal is None:
                    self.report.add(f"{commit}: its seal is damaged")
                    before = None
                    continue
                if before is not None and before.tick_id != seal.tick_id - seal.ticks:
                    self.report.add(f"{commit}: its units do not follow those of the commit before")
                before = seal
                found = content.digests(commit, seal)
                self.report.rows += sum(map(len, found))
                for group, digests, sealed in zip(GROUPS, found, seal.digests, strict=True):
                    if group == "events" and content.first_event(seal) <= self.horizon.forgotten_event_id:
                        continue  # its events were removed before the rest of it
                    if fold(digests) != sealed:
                        self.report.add(f"{commit}: {content.place(group, seal)} not what was committed")
            tell(f"commits: up to {chunk[-1].id}")

    def _commits(self, after: int) -> Iterator[list[_Commit]]:
        """Yield the commits in order, in chunks."""
        while True:
            chunk: dict[int, _Commit] = {}
            until = after + CHUNK
            for row in self.rows(
                "SELECT id, kind, iteration, run_id, at_us, seal FROM commits WHERE id > ? AND id <= ?", after, until
            ):
                chunk[row[0]] = _Commit(row[0], row[:5], row[5])
            for row in self.rows(
                f"SELECT {ITERATION}, seal FROM iterations WHERE id > ? ORDER BY id LIMIT ?",
                self._iteration_before(after),
                8 * CHUNK,
            ):
                if row[2] > until:
                    break
                commit = chunk.get(row[2])
                if commit is None:
                    commit = chunk[row[2]] = _Commit(row[2], None, None)
                commit.iterations.append(row[:-1])
                if row[-1] is not None:
                    commit.seal = row[-1]
            else:
                last = max((number for number in chunk), default=until)
                until = min(until, last)
            if not chunk:
                return
            wanted = [chunk[number] for number in sorted(chunk) if number <= until]
            if not wanted:
                return
            yield wanted
            after = wanted[-1].id

    def _iteration_before(self, commit_id: int) -> int:
        """Return the last iteration up to a commit: their numbers grow together, so a search by halves finds it."""
        ((low, high),) = self.rows("SELECT coalesce(min(id), 1) - 1, coalesce(max(id), 0) FROM iterations")
        while low < high:
            middle = (low + high + 1) // 2
            found = self.rows("SELECT commit_id FROM iterations WHERE id >= ? ORDER BY id LIMIT 1", middle)
            if found and found[0][0] <= commit_id:
                low = middle
            else:
                high = middle - 1
        return int(low)

    # -- what a prune has kept --

    def base(self) -> None:
        """Compare what is kept from before the horizon with the digests that were taken when it was kept."""
        wanted = {
            "state_changes": (
                "SELECT c.id, k.name, c.value, c.previous_id, c.tick_id FROM state_changes c "
                "LEFT JOIN keys k ON k.id = c.key_id WHERE c.id IN ({})"
            ),
            "events": f"{EVENTS} WHERE e.id IN ({{}})",
            "ticks": f"SELECT {TICKS} FROM ticks WHERE id IN ({{}})",
            "moves": "SELECT id, commit_id, kind, subject, value FROM moves WHERE id IN ({})",
        }
        for kind, query in wanted.items():
            digests: dict[int, int] = dict(
                self.rows("SELECT row_id, digest FROM row_digests WHERE kind = ? AND why = 'base'", kind)
            )
            numbers = list(digests)
            for start in range(0, len(numbers), CHUNK):
                piece = numbers[start : start + CHUNK]
                for row in self.rows(query.format(", ".join("?" * len(piece))), *piece):
                    self.report.rows += 1
                    content = {"events": lambda row: event_content(*row), "ticks": tick_content}.get(kind, tuple)(row)
                    if _digest(content) != digests.pop(row[0]):
                        self.report.add(f"table {kind}, row {row[0]}, kept from before the horizon: not what it was")
            for number in digests:
                self.report.add(f"table {kind}, row {number}, kept from before the horizon: it is gone")

    # -- rows that are updated in place --

    def rows_in_place(self, newest: int = 0) -> None:
        """Compare rows with their digests; with `newest` no more than so many of tables that grow without end."""
        patterns: dict[int, list[str]] = {}
        for number, pattern in self.rows("SELECT subscription_id, pattern FROM subscription_patterns"):
            patterns.setdefault(number, []).append(pattern)
        for table in WITH_DIGEST:
            columns = [column.name for column in metadata.tables[table].c if column.name != "digest"]
            where = ""
            if newest and table in GROWING:
                where = f" WHERE id > (SELECT max(id) FROM {table}) - {newest}{GROWING[table]}"
            for row in self.rows(f"SELECT {', '.join(map(_quoted, columns))}, digest FROM {table}{where}"):
                content, digest = row[:-1], row[-1]
                if digest is None:
                    continue
                self.report.rows += 1
                if table == "subscriptions":
                    content = (*content, sorted(patterns.get(row[0], [])))
                elif table == "agents":
                    content = agent_content(content)
                if _digest(content) != digest:
                    self.report.add(f"table {table}, row {row[0]!r}: not what was committed")

    def redactions(self) -> None:
        """What was redacted shows nothing else."""
        for kind, column in REDACTED_IN.items():
            for (number,) in self.rows(
                f"SELECT t.id FROM row_digests d JOIN {kind} t ON t.id = d.row_id "
                f"WHERE d.kind = ? AND d.why = 'redacted' AND t.{column} IS NOT ?",
                kind,
                REDACTED,
            ):
                self.report.add(f"table {kind}, row {number}: redacted, but it shows a value")

    # -- tasks --

    def tasks(self) -> None:
        """Each task has as many attempts as it says, and costs what they do; what is over has its result."""
        if not self.rows("SELECT 1 FROM sqlite_schema WHERE name = 'task_attempts'"):
            return  # an older schema, which had no attempts
        # A task that has been in an older schema has lost its first attempts, or all of them.
        old = self.rows("SELECT value FROM meta WHERE name = 'tasks_without_attempts'")
        for number, attempts, found in self.rows(
            "SELECT t.id, t.attempts, count(a.id) FROM tasks t LEFT JOIN task_attempts a ON a.task_id = t.id "
            "WHERE t.digest IS NOT NULL GROUP BY t.id HAVING count(a.id) <> t.attempts - "
            "CASE WHEN t.id <= ? THEN coalesce(min(a.number) - 1, t.attempts) ELSE 0 END",
            int(old[0][0]) if old else 0,
        ):
            self.report.add(f"task {number}: counts {attempts} attempts, there are {found}")
        for number, cost, found in self.rows(
            "SELECT t.id, t.cost_usd, a.cost FROM tasks t JOIN (SELECT task_id, "
            "sum(CAST(cost_usd AS REAL)) AS cost FROM task_attempts GROUP BY task_id) a ON a.task_id = t.id "
            "WHERE t.digest IS NOT NULL AND "
            "abs(coalesce(CAST(t.cost_usd AS REAL), 0) - coalesce(a.cost, 0)) > 1e-9 * (1 + coalesce(a.cost, 0))"
        ):
            self.report.add(f"task {number}: costs {cost}, its attempts {found}")
        for (number,) in self.rows(
            "SELECT a.id FROM task_attempts a LEFT JOIN tasks t ON t.id = a.task_id "
            "WHERE t.id IS NULL AND a.digest IS NOT NULL"
        ):
            self.report.add(f"attempt {number}: its task is missing")
        for number, status in self.rows(
            "SELECT id, status FROM tasks WHERE digest IS NOT NULL AND "
            "((status IN ('done', 'failed', 'cancelled')) <> (ended_us IS NOT NULL) "
            "OR (status = 'done') <> (result IS NOT NULL) OR (applied_us IS NOT NULL AND ended_us IS NULL))"
        ):
            self.report.add(f"task {number}: its status {status!r} does not fit its result and its end")

    # -- metrics --

    def metrics(self) -> None:
        """Each metric counts as many samples as its hours, those that are over and the one that is not."""
        for channel, name, samples, found in self.rows(
            "SELECT m.channel, m.name, m.samples, m.hour_samples + coalesce(h.samples, 0) FROM metrics m LEFT JOIN "
            "(SELECT metric_id, sum(samples) AS samples FROM metric_hours GROUP BY metric_id) h ON h.metric_id = m.id "
            "WHERE m.samples <> m.hour_samples + coalesce(h.samples, 0)"
        ):
            self.report.add(f"metric {name!r} of channel {channel!r}: counts {samples} samples, its hours {found}")

    # -- replay --

    def replay(self) -> None:
        """Play all changes, and compare what they add up to with the state."""
        live: dict[int, tuple[int, str, int, int | None]] = {}
        cursor = self.connection.execute(
            "SELECT c.id, c.key_id, c.value, c.previous_id, t.agent_id FROM state_changes c "
            "LEFT JOIN ticks t ON t.id = c.tick_id ORDER BY c.id"
        )
        horizon = self.horizon.change_id
        based: set[int] = set()
        """Keys whose first change is not there, so that how many there were can't be told."""
        for number, key, value, previous, agent in cursor:
            known = live.get(key)
            if number <= horizon:
                previous = None if known is None else known[0]
                based.add(key)
            if previous != (None if known is None else known[0]):
                self.report.add(f"change {number}: it does not follow the change of its key before it")
            if value is None:
                live.pop(key, None)
            else:
                live[key] = (number, value, 1 if known is None else known[2] + 1, agent)
        names: dict[int, str] = dict(self.rows("SELECT id, name FROM keys"))
        for key, value, version, change, agent in self.connection.execute(
            "SELECT key_id, value, version, change_id, agent_id FROM state"
        ):
            self.report.keys += 1
            expected = live.pop(key, None)
            name = names.get(key, f"number {key}")
            if expected is None:
                self.report.add(f"state key {name!r}: its history says that it does not exist")
            elif (
                (change, value) != expected[:2]
                or (version < expected[2] if key in based else version != expected[2])
                or expected[3] not in (None, agent)
            ):
                self.report.add(f"state key {name!r}: not what its history says (change {expected[0]})")
        for key in live:
            self.report.add(f"state key {names.get(key, f'number {key}')!r}: its history says that it exists")

    def newest_values(self, after: int) -> None:
        """The same for the keys changed after a change, without playing all of the history."""
        for name, number in self.rows(
            "SELECT k.name, c.id FROM (SELECT key_id, max(id) AS id FROM state_changes WHERE id > ? GROUP BY key_id) n "
            "JOIN state_changes c ON c.id = n.id JOIN keys k ON k.id = c.key_id "
            "LEFT JOIN state s ON s.key_id = c.key_id "
            "WHERE s.value IS NOT c.value OR (c.value IS NOT NULL AND s.change_id <> c.id)",
            after,
        ):
            self.report.add(f"state key {name!r}: not what its history says (change {number})")

    # -- statistics --

    def recount(self) -> None:
        """Compare the counts of each agent with its units, and with the totals of those that are gone."""
        totals = {row[0]: row[1:] for row in self.rows("SELECT agent_id, ticks, errors, events FROM agent_totals")}
        names: dict[int, str] = dict(self.rows("SELECT id, name FROM agents"))
        counted: dict[int, list[int]] = {}
        for agent, kind, outcome, number in self.rows(
            "SELECT t.agent_id, t.kind, t.outcome, count(*) FROM ticks t "
            "LEFT JOIN agent_totals b ON b.agent_id = t.agent_id "
            "WHERE t.id > coalesce(b.tick_id, 0) GROUP BY 1, 2, 3"
        ):
            count_units(counted.setdefault(agent, [0, 0, 0]), kind, outcome, number)
        for agent, ticks, errors, events, measured in self.rows(
            "SELECT agent_id, ticks, errors, events, measured FROM agent_stats WHERE agent_id > 0"
        ):
            base = totals.get(agent, (0, 0, 0))
            kept = [one + other for one, other in zip(counted.get(agent, [0, 0, 0]), base, strict=True)]
            name = names.get(agent, f"number {agent}")
            if errors != kept[1]:
                self.report.add(f"agent {name!r}: counts {errors} errors, its units {kept[1]}")
            if events != kept[2]:
                self.report.add(f"agent {name!r}: counts {events} events, its units {kept[2]}")
            if not kept[0] <= ticks <= measured:  # those that changed nothing leave no row
                self.report.add(f"agent {name!r}: counts {ticks} ticks of {measured} measured, its units {kept[0]}")


class _Commit:
    """One commit: its row where it is of no iteration, its iterations, its seal."""

    __slots__ = ("id", "iterations", "row", "seal")

    def __init__(self, id: int, row: Row | None, seal: bytes | None) -> None:
        self.id = id
        self.row = row
        self.seal = seal
        self.iterations: list[Row] = []

    def __str__(self) -> str:
        if self.row is not None:
            return f"commit {self.id} ({self.row[1]}, after iteration {self.row[2]})"
        if not self.iterations:
            return f"commit {self.id}"
        first, last = self.iterations[0][0], self.iterations[-1][0]
        which = f"iteration {first}" if first == last else f"iterations {first} to {last}"
        return f"commit {self.id} ({which})"


class _Content:
    """The rows of a chunk of commits, read together."""

    def __init__(self, proof: _Proof, chunk: Sequence[_Commit]) -> None:
        self.kept = proof.kept
        seals = [seal for commit in chunk if commit.seal is not None and (seal := Seal.unpack(commit.seal)) is not None]
        first = min((seal.tick_id - seal.ticks for seal in seals), default=0)
        last = max((seal.tick_id for seal in seals), default=0)
        rows = proof.rows
        between = "BETWEEN ? AND ?"
        self.ticks = {row[0]: row for row in rows(f"SELECT {TICKS} FROM ticks WHERE id {between}", first + 1, last)}
        self.errors = {
            row[0]: row
            for row in rows(
                f"SELECT tick_id, type, message, traceback FROM tick_errors WHERE tick_id {between}", first + 1, last
            )
        }
        at = TickRow._fields.index
        ends = [self.ticks[number] for number in (min(self.ticks, default=0), max(self.ticks, default=0)) if number]

        def span(before: str, number: str) -> tuple[int, int]:
            """The first and the last row that the units made."""
            return (ends[0][at(before)] + 1, ends[-1][at(before)] + ends[-1][at(number)]) if ends else (1, 0)

        self.first_change, last_change = span("change_id", "changes")
        first_event, last_event = span("event_id", "events")
        self.changes: dict[int, list[Row]] = {}
        for row in rows(
            "SELECT c.id, k.name, c.value, c.previous_id, c.tick_id FROM state_changes c "
            f"LEFT JOIN keys k ON k.id = c.key_id WHERE c.id {between} ORDER BY c.id",
            self.first_change,
            last_change,
        ):
            self.changes.setdefault(row[4], []).append(row)
        self.events: dict[int, list[Row]] = {}
        for row in rows(
            f"{EVENTS} WHERE e.id {between} ORDER BY e.id",
            first_event,
            last_event,
        ):
            self.events.setdefault(row[6], []).append(event_content(*row))
        commits = (chunk[0].id, chunk[-1].id)
        self.commands: dict[int, list[Row]] = {}
        for row in rows(
            "SELECT id, commit_id, at_us, actor, name, arguments, error FROM commands "
            f"WHERE commit_id {between} ORDER BY id",
            *commits,
        ):
            self.commands.setdefault(row[1], []).append(row)
        self.moves: dict[int, list[Row]] = {}
        for row in rows(
            f"SELECT id, commit_id, kind, subject, value FROM moves WHERE commit_id {between} ORDER BY id", *commits
        ):
            self.moves.setdefault(row[1], []).append(row)

    def digests(self, commit: _Commit, seal: Seal) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return the digests of a commit's rows, in the order of `digest.seal`."""
        units = range(seal.tick_id - seal.ticks + 1, seal.tick_id + 1)
        rest = [] if commit.row is None else [_digest(commit.row)]
        rest += [_digest(row) for row in commit.iterations]
        rest += [self._digest("commands", row) for row in self.commands.get(commit.id, ())]
        rest += [_digest(row) for row in self.moves.get(commit.id, ())]
        return (
            [_digest(tick_content(self.ticks[number])) for number in units if number in self.ticks]
            + [_digest(self.errors[number]) for number in units if number in self.errors],
            [self._digest("state_changes", row) for number in units for row in self.changes.get(number, ())],
            [self._digest("events", row) for number in units for row in self.events.get(number, ())],
            rest,
        )

    def _digest(self, kind: str, row: Row) -> int:
        kept = self.kept.get((kind, row[0])) if self.kept else None
        return _digest(row) if kept is None else kept

    def first_event(self, seal: Seal) -> int:
        """Return the first event of a commit; a number beyond all where it has none."""
        begin = seal.tick_id - seal.ticks + 1
        row = next((self.ticks[number] for number in range(begin, seal.tick_id + 1) if number in self.ticks), None)
        return 2**62 if row is None else int(row[TickRow._fields.index("event_id")]) + 1

    def place(self, group: str, seal: Seal) -> str:
        """Say which rows of a group a commit has."""
        units = range(seal.tick_id - seal.ticks + 1, seal.tick_id + 1)
        if group == "ticks":
            return f"its units ({_span(units)}) are"
        if group not in ("state_changes", "events"):
            return "its iterations, commands or moves are"
        rows = self.changes if group == "state_changes" else self.events
        numbers = [row[0] for number in units for row in rows.get(number, ())]
        return f"its rows in {group} ({_span(numbers)}) are"


def _within(ranges: Sequence[tuple[int, int]], first: int | None, last: int | None) -> int:
    """Return how many numbers of these ranges lie between two others."""
    if first is None or last is None:
        return 0
    return sum(max(0, min(end, last) - max(begin, first) + 1) for begin, end in ranges)


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none found"
    return str(numbers[0]) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _digest(content: Row) -> int:
    """Return the digest of a row that was read; 0 where it holds what no writer could have written."""
    try:
        return row_digest(content)
    except TypeError:
        return 0


def _quoted(name: str) -> str:
    return f'"{name}"'
