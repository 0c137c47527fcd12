"""What the database keeps, as plain values: the store loads them at start, the loop changes them, a commit writes them.

The fields of a record are the columns of its table, in the same order, but for its digest, which the writer adds;
a test compares them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ael_store.model.event import EventRecord
from ael_store.model.state import Cell, Change

__all__ = [
    "AgentMark",
    "AgentRecord",
    "AgentStats",
    "AgentTotals",
    "AttemptRecord",
    "CommandRecord",
    "Commit",
    "CopyRecord",
    "DeadLetterRecord",
    "DelayedRecord",
    "IterationRecord",
    "LimitRecord",
    "LimitUse",
    "MetricHour",
    "MetricRecord",
    "Move",
    "Redaction",
    "Resumed",
    "RunRecord",
    "SampleRow",
    "ScheduleRecord",
    "SubscriptionRecord",
    "TaskRecord",
    "TickError",
    "TickRow",
]

HOUR_US = 3_600_000_000
LARGEST = sys.float_info.max
MANY_SAMPLES = 1000
"""So many samples do not wait for a commit that has another reason."""


class TickRow(NamedTuple):
    """One unit of work, as in table `ticks`."""

    id: int
    iteration: int
    place: int
    agent_id: int
    kind: int
    outcome: int
    started_us: int
    duration_us: int
    seed: int
    change_id: int
    event_id: int
    changes: int
    events: int
    seen_change_id: int | None
    cause_event_id: int | None
    subscription_id: int | None
    cause_task_id: int | None = None


class TickError(NamedTuple):
    """Why a unit failed, as in table `tick_errors`."""

    tick_id: int
    type: str
    message: str
    traceback: str


@dataclass(slots=True)
class IterationRecord:
    """One iteration, as in table `iterations`."""

    id: int
    run_id: int
    commit_id: int
    clock: int
    started_us: int
    duration_us: int
    ticks: int
    errors: int
    events: int
    missed: int
    tick_id: int


@dataclass(slots=True)
class RunRecord:
    """One run, as in table `runs`."""

    id: int
    status: str
    started_us: int
    ended_us: int | None
    first_iteration: int
    last_iteration: int | None
    pid: int
    host: str
    version: str
    token: int
    tick_rate: str


@dataclass(slots=True)
class AgentRecord:
    """One agent, as in table `agents`."""

    id: int
    name: str
    class_path: str | None
    fingerprint: str | None
    priority: int
    enabled: int
    operator_enabled: int | None
    registered: int
    failures: int
    retry_us: int | None
    quarantined_us: int | None
    metadata: str
    last_error: str | None
    last_error_us: int | None
    created_us: int
    deaths: int
    data_version: int | None = None
    """Younger than digests: it counts where it is not None."""


@dataclass(slots=True)
class AgentStats:
    """Statistics of one agent, as in table `agent_stats`."""

    agent_id: int
    ticks: int = 0
    errors: int = 0
    events: int = 0
    measured: int = 0
    total_us: int = 0
    max_us: int = 0
    ewma_us: int = 0
    last_tick_us: int | None = None

    def measure(self, duration_us: int) -> None:
        """Count the duration of a tick, whatever its outcome."""
        self.ewma_us = duration_us if self.measured == 0 else self.ewma_us + (duration_us - self.ewma_us) // 8
        self.measured += 1
        self.total_us += duration_us
        self.max_us = max(self.max_us, duration_us)


@dataclass(slots=True)
class MetricRecord:
    """One metric and what it stands at, as in table `metrics`."""

    id: int
    channel: str
    name: str
    kind: str
    samples: int = 0
    total: float = 0.0
    value: float = 0.0
    updated_us: int = 0
    hour_us: int = 0
    hour_samples: int = 0
    hour_total: float = 0.0
    hour_least: float = 0.0
    hour_most: float = 0.0

    def add(self, value: float, at_us: int) -> MetricHour | None:
        """Count a sample; returns the hour before it where it is the first of another one."""
        over = None
        hour_us = at_us // HOUR_US * HOUR_US
        if hour_us != self.hour_us or not self.hour_samples:
            if self.hour_samples:
                over = self.hour()
            self.hour_us, self.hour_samples, self.hour_total = hour_us, 0, 0.0
            self.hour_least = self.hour_most = value
        self.samples += 1
        self.total = within(self.total + value)
        self.value, self.updated_us = value, at_us
        self.hour_samples += 1
        self.hour_total = within(self.hour_total + value)
        self.hour_least, self.hour_most = min(self.hour_least, value), max(self.hour_most, value)
        return over

    def hour(self) -> MetricHour:
        """Return the hour that is not over, as it stands."""
        return MetricHour(
            self.id, self.hour_us, self.hour_samples, self.hour_total, self.hour_least, self.hour_most, self.value
        )


class SampleRow(NamedTuple):
    """One value of a metric, as in table `metric_samples`."""

    id: int
    metric_id: int
    agent_id: int
    iteration: int
    at_us: int
    value: float


class MetricHour(NamedTuple):
    """One hour of a metric that is over, as in table `metric_hours`."""

    metric_id: int
    hour_us: int
    samples: int
    total: float
    least: float
    most: float
    last: float

    def joined_to(self, earlier: MetricHour) -> MetricHour:
        """Return the same hour with what was counted of it earlier."""
        return MetricHour(
            self.metric_id,
            self.hour_us,
            earlier.samples + self.samples,
            within(earlier.total + self.total),
            min(earlier.least, self.least),
            max(earlier.most, self.most),
            self.last,
        )


def within(total: float) -> float:
    """Return a sum as it is stored: the largest number there is where it is beyond."""
    return min(max(total, -LARGEST), LARGEST)


class AgentMark(NamedTuple):
    """The counters of an agent when an hour was over, as in table `agent_marks`."""

    agent_id: int
    hour_us: int
    iteration: int
    ticks: int
    errors: int
    events: int
    measured: int
    total_us: int


@dataclass(slots=True)
class AgentTotals:
    """What an agent's units counted whose rows are gone or do not count any more, as in table `agent_totals`."""

    agent_id: int
    tick_id: int
    ticks: int
    errors: int
    events: int


@dataclass(slots=True)
class SubscriptionRecord:
    """One cursor, as in table `subscriptions`; `patterns` are its rows in `subscription_patterns`."""

    id: int
    subscriber: str
    agent_id: int | None
    cursor: int
    attempts: int
    attempt_event_id: int | None
    retry_us: int | None
    created_us: int
    seen_us: int
    ended_us: int | None
    skipped: int
    patterns: tuple[str, ...] = field(default=(), compare=False)


@dataclass(slots=True)
class DeadLetterRecord:
    """A delivery that was given up, as in table `dead_letters`."""

    id: int
    subscription_id: int
    event_id: int
    attempts: int
    error: str
    tick_id: int
    failed_us: int
    redelivered_us: int | None
    requested_us: int | None


@dataclass(slots=True)
class DelayedRecord:
    """An event that is to happen later, as in table `delayed_events`."""

    id: int
    due_us: int
    type: str
    source: str
    data: str | None
    metadata: str | None
    tick_id: int
    event_id: int | None
    hops: int | None


@dataclass(slots=True)
class ScheduleRecord:
    """When an agent with a trigger fires, as in table `schedules`."""

    agent_id: int
    trigger: str
    next_us: int | None
    last_us: int | None


@dataclass(slots=True)
class CommandRecord:
    """A change from outside, as in table `commands`."""

    id: int
    commit_id: int
    at_us: int
    actor: str
    name: str
    arguments: str
    error: str | None


@dataclass(slots=True)
class TaskRecord:
    """One task, as in table `tasks`."""

    id: int
    agent_id: int
    name: str
    key: str
    status: str
    attempts: int
    priority: int
    limit_name: str | None
    args: str
    result: str | None
    error: str | None
    cost_usd: str | None
    created_us: int
    next_us: int | None
    started_us: int | None
    ended_us: int | None
    tick_id: int
    kind: str
    question: str | None
    failures: int
    interruptions: int
    held: str | None
    hops: int | None
    answered_by: str | None
    applied_us: int | None
    applied_tick_id: int | None
    apply_attempts: int
    apply_error: str | None

    @property
    def is_over(self) -> bool:
        """True where nothing is left to do but to take up its result."""
        return self.status in ("done", "failed", "cancelled")


@dataclass(slots=True)
class AttemptRecord:
    """One attempt at a task, as in table `task_attempts`."""

    id: int
    task_id: int
    number: int
    run_id: int
    limit_name: str | None
    outcome: str
    started_us: int
    ended_us: int | None
    reserved_usd: str | None
    cost_usd: str | None
    error: str | None
    traceback: str | None


@dataclass(slots=True)
class LimitRecord:
    """One limit, as in table `limits`."""

    name: str
    concurrency: int | None
    per_minute: int | None
    per_day: int | None
    usd_per_day: str | None
    configured: str
    raised: str
    opened: int
    held_until_us: int | None
    held_because: str | None
    blocked_us: int | None
    blocked_because: str | None
    blocked_until_us: int | None


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """From what a database was restored, recovered or forked, and when."""

    at_us: int
    source: str


@dataclass(frozen=True, slots=True)
class LimitUse:
    """What attempts have used of a limit, as far as it counts now."""

    starts_us: tuple[int, ...]
    """When attempts of the last minute began, in order."""
    starts_today: int
    usd_today: str
    """What they cost, or had reserved where that is not known: a decimal number as text."""
    largest_usd: str
    """The largest cost of a day."""


class Redaction(NamedTuple):
    """What to blank wherever it stands: every value of a state key, or one event."""

    key: str | None
    event_id: int | None


class Move(NamedTuple):
    """A move that no tick row tells, as in table `moves` without its number and commit."""

    kind: str
    subject: str
    value: str


@dataclass(slots=True)
class Commit:
    """Everything that one transaction writes. `Store.commit()` is the only writer.

    `id`s of all rows are assigned already. `changes` are in order; the state that they lead to is the newest
    cell of each key. `patterns` says which subscriptions are new or have other patterns, so that these are written.
    """

    kind: str
    id: int
    token: int
    iteration: int
    run_id: int | None
    at_us: int
    tick_id: int = 0
    """The last unit up to now; the units of this commit are those after the commit before."""
    iterations: list[IterationRecord] = field(default_factory=list)
    ticks: list[TickRow] = field(default_factory=list)
    errors: list[TickError] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)
    agents: dict[int, AgentRecord] = field(default_factory=dict)
    stats: dict[int, AgentStats] = field(default_factory=dict)
    subscriptions: dict[int, SubscriptionRecord] = field(default_factory=dict)
    patterns: list[SubscriptionRecord] = field(default_factory=list)
    dead_letters: dict[int, DeadLetterRecord] = field(default_factory=dict)
    delayed: dict[int, DelayedRecord] = field(default_factory=dict)
    schedules: dict[int, ScheduleRecord] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    commands: list[CommandRecord] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    """Agents whose statistics end."""
    totals: list[AgentTotals] = field(default_factory=list)
    redactions: list[Redaction] = field(default_factory=list)
    marks: list[AgentMark] = field(default_factory=list)
    metrics: dict[int, MetricRecord] = field(default_factory=dict)
    """Metrics that were recorded; the only reason for a commit where they are many."""
    samples: list[SampleRow] = field(default_factory=list)
    metric_hours: list[MetricHour] = field(default_factory=list)
    pruned_samples: int = 0
    """The last of the samples to remove; 0 for none."""
    new_tasks: dict[int, TaskRecord] = field(default_factory=dict)
    tasks: dict[int, TaskRecord] = field(default_factory=dict)
    """Tasks that have changed, those in `new_tasks` not among them."""
    attempts: dict[int, AttemptRecord] = field(default_factory=dict)
    limits: dict[str, LimitRecord] = field(default_factory=dict)
    prune: Any = None
    """A `PruneStep` of `store/prune.py`: a batch of history to remove."""
    shrink_pages: int = 0
    """Free pages to give back to the file system."""
    pruned_tasks: list[int] = field(default_factory=list)
    """Tasks to remove, with their attempts."""
    known_keys: dict[int, int] = field(default_factory=dict)
    """Filled by the store: new tasks that were not written, and the task that has their key."""

    @property
    def rows(self) -> int:
        """About how many rows it writes."""
        rows = 2 * len(self.changes) + len(self.events) + len(self.ticks) + len(self.stats) + len(self.iterations) + 1
        return rows + len(self.samples)

    @property
    def recent_rows(self) -> int:
        """How many rows of history it writes that their indexes are to catch up with."""
        return len(self.ticks) + len(self.changes) + len(self.events)

    @property
    def idle(self) -> bool:
        """True where nothing happened that must not wait: only iterations and counts."""
        return self.kind == "iteration" and not (
            self.ticks
            or self.changes
            or self.events
            or self.runs
            or self.agents
            or self.subscriptions
            or self.dead_letters
            or self.delayed
            or self.moves
            or self.commands
            or self.redactions
            or self.marks
            or self.new_tasks
            or self.tasks
            or self.attempts
            or self.limits
            or self.pruned_tasks
            or self.prune
            or self.shrink_pages
            or self.pruned_samples
            or len(self.samples) >= MANY_SAMPLES
        )


@dataclass(slots=True)
class Resumed:
    """What a database holds when a run begins: everything needed to go on."""

    cells: dict[str, Cell]
    agents: dict[str, AgentRecord]
    stats: dict[int, AgentStats]
    subscriptions: list[SubscriptionRecord]
    delayed: list[DelayedRecord]
    requested: list[DeadLetterRecord]
    """Dead letters that are to be delivered again."""
    schedules: dict[int, ScheduleRecord]
    positions: dict[str, str]
    last_run: RunRecord | None
    token: int
    iteration: int
    clock: int
    last_started_us: int | None
    commit_id: int
    tick_id: int
    change_id: int
    event_id: int
    run_id: int
    agent_id: int
    subscription_id: int
    delayed_id: int
    dead_letter_id: int
    command_id: int
    task_id: int = 0
    attempt_id: int = 0
    tasks: list[TaskRecord] = field(default_factory=list)
    """Those that are not over, or whose result is still to be taken up."""
    attempts: list[AttemptRecord] = field(default_factory=list)
    """Those whose end is not known."""
    limits: dict[str, LimitRecord] = field(default_factory=dict)
    marks: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The counters of each agent at its last hourly mark."""
    metrics: dict[tuple[str, str], MetricRecord] = field(default_factory=dict)
    sample_id: int = 0
    copy: CopyRecord | None = None
    """What this database was made from; None where it is no copy."""
    recent_runs: list[RunRecord] = field(default_factory=list)
    """The newest runs, newest first, `last_run` among them."""
