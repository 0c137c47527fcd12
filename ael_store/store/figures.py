"""Figures for a monitoring system: totals as they stand, and how long what is new has taken.

Everything is told by durable rows, so it does not matter which process asks, or whether the loop runs. Histograms are
counted from where the last question ended; each question reads by ranges of primary keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ael_store.store.answers import Answers, Ask

__all__ = ["LAG_S", "SECONDS", "Counted", "Figures", "News", "Ownership", "Reached", "figures", "news", "ownership"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of durations."""
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of lags."""

MOST_ROWS = 200_000
"""How many rows one question counts; what is left is counted with the next one."""
MOST_PENDING = 100_000

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figures:
    """What stands in the database now."""

    agents: list[Row]
    """Name, status, ticks, errors, events and seconds of each."""
    pending: dict[str, int]
    """What waits for each subscriber, none included."""
    dead_letters: dict[str, int]
    metrics: list[Row]
    events: int
    tasks_submitted: int
    task_attempts: int
    started_us: int | None
    """When the last iteration began."""


def figures(reader: Answers) -> Figures:
    """Return what stands in the database; one moment of it."""
    with reader.asking() as ask:
        return Figures(
            agents=ask(
                "SELECT v.name AS name, v.status AS status, s.ticks AS ticks, s.errors AS errors, s.events AS events, "
                "s.total_us / 1000000.0 AS seconds FROM v_agents v JOIN agents a ON a.name = v.name "
                "JOIN agent_stats s ON s.agent_id = a.id ORDER BY v.name"
            ),
            pending={row["subscriber"]: 0 for row in ask("SELECT subscriber FROM subscriptions WHERE ended_us IS NULL")}
            | _counts(
                ask,
                "SELECT subscriber AS name, count(*) AS n FROM (SELECT subscriber FROM v_pending LIMIT :most) "
                "GROUP BY subscriber",
                most=MOST_PENDING,
            ),
            dead_letters=_counts(
                ask, "SELECT subscriber AS name, count(*) AS n FROM v_dead_letters GROUP BY subscriber"
            ),
            metrics=ask(
                "SELECT channel, name, kind, value, samples, total FROM v_metric_series ORDER BY channel, name"
            ),
            events=_last(ask, "events"),
            tasks_submitted=_last(ask, "tasks"),
            task_attempts=_last(ask, "task_attempts"),
            started_us=next(
                (row["started_us"] for row in ask("SELECT started_us FROM iterations ORDER BY id DESC LIMIT 1")), None
            ),
        )


def _counts(ask: Ask, sql: str, **parameters: Any) -> dict[str, int]:
    return {row["name"]: row["n"] for row in ask(sql, **parameters)}


def _last(ask: Ask, table: str) -> int:
    return int(ask(f"SELECT coalesce(max(id), 0) AS n FROM {table}")[0]["n"])


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who may write, and what the newest iteration is."""

    lease_token: int
    run: int | None
    run_token: int | None
    iteration_run: int | None
    """The run of the newest iteration."""
    started_us: int | None
    """When that began."""


def ownership(reader: Answers) -> Ownership:
    """Return who may write."""
    found = reader.rows(
        "SELECT l.token AS lease_token, r.id AS run, r.token AS run_token, "
        "i.run_id AS iteration_run, i.started_us AS started_us FROM lease l "
        "LEFT JOIN runs r ON r.id = (SELECT max(id) FROM runs) "
        "LEFT JOIN iterations i ON i.id = (SELECT max(id) FROM iterations)"
    )[0]
    return Ownership(**found)


@dataclass(frozen=True, slots=True)
class Reached:
    """The last iteration and the last unit that were counted."""

    iteration: int
    tick: int


@dataclass(slots=True)
class Counted:
    """A histogram: how many were no larger than each bound, how many in all, and their sum."""

    bounds: Sequence[float]
    below: list[int]
    count: int = 0
    total: float = 0.0

    @classmethod
    def none(cls, bounds: Sequence[float]) -> Counted:
        return cls(bounds, [0] * len(bounds))

    def add(self, other: Counted) -> None:
        self.below = [one + more for one, more in zip(self.below, other.below, strict=True)]
        self.count += other.count
        self.total += other.total


@dataclass(frozen=True, slots=True)
class News:
    """What iterations and ticks that were committed since have taken, in seconds."""

    reached: Reached
    iterations: Counted
    ticks: Counted
    lags: Counted
    missed: int


def news(reader: Answers, since: Reached | None) -> News:
    """Return what has come since an earlier question; without one nothing but where to begin.

    A lag is how much later than one `tick_rate` after the one before an iteration of the clock began, within a run.
    Ticks are those that left a row.
    """
    with reader.asking() as ask:
        newest = Reached(_last(ask, "iterations"), _last(ask, "ticks"))
        if since is None or newest.iteration < since.iteration:  # another database lies there now
            return News(newest, Counted.none(SECONDS), Counted.none(SECONDS), Counted.none(LAG_S), 0)
        reached = Reached(min(newest.iteration, since.iteration + MOST_ROWS), min(newest.tick, since.tick + MOST_ROWS))
        range_ = {"after": since.iteration, "until": reached.iteration}
        missed = ask(
            "SELECT coalesce(sum(missed), 0) AS n FROM iterations WHERE id > :after AND id <= :until", **range_
        )[0]["n"]
        return News(
            reached,
            _histogram(
                ask,
                "SELECT duration_us / 1000000.0 AS x FROM iterations WHERE id > :after AND id <= :until",
                SECONDS,
                **range_,
            ),
            _histogram(
                ask,
                "SELECT duration_us / 1000000.0 AS x FROM ticks "
                "WHERE id > :after AND id <= :until AND kind = 0 AND agent_id > 0",
                SECONDS,
                after=since.tick,
                until=reached.tick,
            ),
            _histogram(
                ask,
                "SELECT max(0.0, w.gap - CAST(r.tick_rate AS REAL)) AS x FROM (SELECT id, run_id, "
                "(started_us - lag(started_us) OVER of_run) / 1000000.0 AS gap, "
                "clock - lag(clock) OVER of_run AS slots FROM iterations WHERE id >= :after AND id <= :until "
                "WINDOW of_run AS (PARTITION BY run_id ORDER BY id)) w JOIN runs r ON r.id = w.run_id "
                "WHERE w.id > :after AND w.slots > 0 AND CAST(r.tick_rate AS REAL) > 0",
                LAG_S,
                **range_,
            ),
            int(missed),
        )


def _histogram(ask: Ask, rows: str, bounds: Sequence[float], **parameters: Any) -> Counted:
    """Count the column `x` of a query."""
    sums = ", ".join(f"coalesce(sum(x <= {bound!r}), 0) AS b{place}" for place, bound in enumerate(bounds))
    found = ask(f"SELECT count(x) AS n, coalesce(sum(x), 0.0) AS total, {sums} FROM ({rows})", **parameters)[0]
    return Counted(bounds, [found[f"b{place}"] for place in range(len(bounds))], found["n"], found["total"])
