"""The tables, each column's meaning written once, beside the column.

Tables are ours to change; users read the views (`sqlite_views.py`). Conventions:

- `id` is the order of commits: ids are assigned by the loop, grow, and are never reused once committed.
- `…_us` is an instant in microseconds since 1970 UTC, or a length in microseconds.
- Values are JSON text. Names that repeat (keys, event types, sources) are interned as integers.
- History tables carry no foreign keys: they are written in bulk and pruned by id, and the parent of a row
  is always older than the row. Small tables do.
- Secondary indexes are most of a commit's cost, so the history has five, one for each question that a view
  answers: the changes of a key, the events of a type, the events of a source, the ticks of an agent, the samples of
  a metric; no commit writes the first four, they catch up in bulk (`recent.py`). Everything else is reached through
  ids: a tick knows the range of its changes and events. The index of `state` on its agent is written only when a key
  changes hands. Tasks are few and have what they need; the index of those that are not over is partial, so a start
  and a limit find them among any number of old ones.
"""

from __future__ import annotations

from sqlalchemy import (
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeEngine

__all__ = ["KINDS", "OUTCOMES", "metadata"]

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = MetaData(naming_convention=NAMING)

Int = BigInteger().with_variant(Integer, "sqlite")
Real: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")

KINDS = {"tick": 0, "event": 1, "start": 2, "error": 3, "shutdown": 4, "task": 5, "outside": 6}
"""How `ticks.kind` is stored."""

OUTCOMES = {"success": 0, "error": 1, "timeout": 2, "conflict": 3, "cancelled": 4}
"""How `ticks.outcome` is stored."""


def _table(name: str, *columns: SchemaItem, comment: str) -> Table:
    return Table(name, metadata, *columns, comment=comment, sqlite_strict=True)


def _digest(of: str = "this row") -> Column[int]:
    return Column("digest", Int, comment=f"digest of {of} (`store/digest.py`); NULL where it is older than digests")


def _recent() -> Column[int]:
    return Column("recent", Int, comment="1 while its indexes do not have this row yet, then NULL")


def _index(column: Column[int]) -> Index:
    """Declare an index of the history: over what is not recent any more."""
    return Index(None, column, sqlite_where=column.table.c.recent.is_(None))


def _id(comment: str) -> Column[int]:
    return Column("id", Int, primary_key=True, autoincrement=False, comment=comment)


meta = _table(
    "meta",
    Column("name", Text, primary_key=True, comment="what it is: `instance`, `created_us`, `label`, …"),
    Column("value", Text, nullable=False, comment="the value, as JSON text"),
    comment="Facts about this database as a whole.",
)

lease = _table(
    "lease",
    _id("always 1"),
    Column(
        "token",
        Int,
        nullable=False,
        comment="the fencing token: grows with each owner, checked in each commit",
    ),
    Column("holder", Text, nullable=False, comment="who took it last: `pid 4711 on host` and the command"),
    Column("taken_us", Int, nullable=False, comment="when it was taken"),
    CheckConstraint("id = 1", name="one_row"),
    comment="The one row that says who may write.",
)

runs = _table(
    "runs",
    _id("number of the run"),
    Column("status", Text, nullable=False, comment="`running`, `stopped` or `crashed`"),
    Column("started_us", Int, nullable=False, comment="when the run began"),
    Column("ended_us", Int, comment="when it ended; of a crashed run, when its last iteration began"),
    Column("first_iteration", Int, nullable=False, comment="the first iteration that it could give"),
    Column("last_iteration", Int, comment="its last committed iteration; NULL while it runs"),
    Column("pid", Int, nullable=False, comment="process id"),
    Column("host", Text, nullable=False, comment="host name"),
    Column("version", Text, nullable=False, comment="version of ael_store"),
    Column("token", Int, nullable=False, comment="its fencing token"),
    Column("tick_rate", Text, nullable=False, comment="period of ticks in seconds, as text"),
    _digest(),
    CheckConstraint("status IN ('running', 'stopped', 'crashed')", name="status"),
    comment="One row for each life of a process that owned the loop.",
)

commits = _table(
    "commits",
    _id("number of the commit; iteration commits take their numbers from the same sequence"),
    Column("kind", Text, nullable=False, comment="`start`, `shutdown` or `command`"),
    Column("iteration", Int, nullable=False, comment="the last iteration begun, 0 before the first"),
    Column("run_id", Int, comment="the run that committed; NULL for a command without a loop"),
    Column("at_us", Int, nullable=False, comment="when it was committed"),
    Column("seal", LargeBinary, comment="digests of what it wrote; NULL where it is older than digests"),
    CheckConstraint("kind IN ('start', 'shutdown', 'command')", name="kind"),
    comment="Commits other than those of iterations, which are described by their rows in `iterations`.",
)

iterations = _table(
    "iterations",
    _id("number of the iteration, from 1, without gaps"),
    Column("run_id", Int, nullable=False, comment="the run it belongs to"),
    Column("commit_id", Int, nullable=False, comment="the commit that wrote it; idle iterations share one"),
    Column("clock", Int, nullable=False, comment="iterations of the clock so far, this one included"),
    Column("started_us", Int, nullable=False, comment="when it began"),
    Column("duration_us", Int, nullable=False, comment="from its begin to its commit, the commit excluded"),
    Column("ticks", Int, nullable=False, comment="units that ran as ticks"),
    Column("errors", Int, nullable=False, comment="units that ended in error or timeout"),
    Column("events", Int, nullable=False, comment="events emitted"),
    Column("missed", Int, nullable=False, comment="slots of the clock that were lost before it"),
    Column("tick_id", Int, nullable=False, comment="the last row of `ticks` before it"),
    Column("seal", LargeBinary, comment="digests of what its commit wrote, in the last iteration of each commit"),
    comment="One row for each time the loop went round.",
)

keys = _table(
    "keys",
    _id("number of the key"),
    Column("name", Text, nullable=False, unique=True, comment="the key"),
    comment="Keys of the state, interned.",
)

event_types = _table(
    "event_types",
    _id("number of the type"),
    Column("name", Text, nullable=False, unique=True, comment="the event type"),
    comment="Event types, interned.",
)

event_sources = _table(
    "event_sources",
    _id("number of the source"),
    Column("name", Text, nullable=False, unique=True, comment="the source"),
    comment="Sources of events, interned.",
)

agents = _table(
    "agents",
    _id("number of the agent; 0 stands for changes from outside"),
    Column("name", Text, nullable=False, unique=True, comment="the agent's name"),
    Column("class_path", Text, comment="`module:Class` at its last registration"),
    Column("fingerprint", Text, comment="digest of the class's code at its last registration"),
    Column("priority", Int, nullable=False, comment="0 to 10"),
    Column("enabled", Int, nullable=False, comment="1 where it may run: the operator's word, else the class's"),
    Column("operator_enabled", Int, comment="what an operator said: 1, 0, or NULL for nothing"),
    Column("registered", Int, nullable=False, comment="1 where the last run had it"),
    Column("failures", Int, nullable=False, comment="errors in a row"),
    Column("retry_us", Int, comment="not run before this instant, because of errors in a row"),
    Column("quarantined_us", Int, comment="since when it is quarantined"),
    Column("metadata", Text, nullable=False, comment="the agent's `metadata`, as JSON text"),
    Column("last_error", Text, comment="type and message of its last failure"),
    Column("last_error_us", Int, comment="when it failed last"),
    Column("created_us", Int, nullable=False, comment="when it was first registered"),
    Column(
        "deaths",
        Int,
        nullable=False,
        server_default="0",
        comment="how often in a row the process died while one of its hooks ran",
    ),
    _digest(),
    Column("data_version", Int, comment="version of the agent's own data; NULL where its class never gave one"),
    comment="Agents that this database has known.",
)

agent_stats = _table(
    "agent_stats",
    Column("agent_id", Int, ForeignKey("agents.id"), primary_key=True, autoincrement=False, comment="the agent"),
    Column("ticks", Int, nullable=False, comment="successful ticks"),
    Column("errors", Int, nullable=False, comment="units of any kind that ended in error or timeout"),
    Column("events", Int, nullable=False, comment="events handled successfully"),
    Column("measured", Int, nullable=False, comment="ticks with a duration, whatever their outcome"),
    Column("total_us", Int, nullable=False, comment="sum of these durations"),
    Column("max_us", Int, nullable=False, comment="longest of these durations"),
    Column("ewma_us", Int, nullable=False, comment="moving average of these durations, weight 1/8 for the newest"),
    Column("last_tick_us", Int, comment="when its last tick began"),
    _digest(),
    comment="Statistics of each agent; narrow, so that a hundred agents share a page.",
)

state = _table(
    "state",
    Column("key_id", Int, ForeignKey("keys.id"), primary_key=True, autoincrement=False, comment="the key"),
    Column("value", Text, nullable=False, comment="the value, as JSON text"),
    Column("version", Int, nullable=False, comment="changes of the key since it was created"),
    Column("change_id", Int, nullable=False, comment="the change that set it"),
    Column("agent_id", Int, nullable=False, index=True, comment="the agent that set it; 0 for outside"),
    comment="The current value of each key.",
)

state_changes = _table(
    "state_changes",
    _id("number of the change"),
    Column("key_id", Int, nullable=False, comment="the key"),
    Column("value", Text, comment="the new value, as JSON text; NULL where the key was deleted"),
    Column("previous_id", Int, comment="the change that set the old value; NULL where there was none"),
    Column("tick_id", Int, nullable=False, comment="the unit that made it"),
    _recent(),
    comment="Every change of the state.",
)
_index(state_changes.c.key_id)

events = _table(
    "events",
    _id("number of the event"),
    Column("type_id", Int, nullable=False, comment="its type"),
    Column("source_id", Int, nullable=False, comment="its source"),
    Column("data", Text, comment="its data, as JSON text; NULL where there is none"),
    Column("metadata", Text, comment="its metadata, as JSON text; NULL where it is empty"),
    Column("timestamp_us", Int, comment="when it was emitted; NULL where that is the `started_us` of its tick"),
    Column("tick_id", Int, nullable=False, comment="the unit that emitted it"),
    Column("hops", Int, comment="how many handlers of events led to it, one after another; NULL for none"),
    Column("target_id", Int, comment="of a reply, who alone gets it (a name in `event_sources`); NULL for everybody"),
    _recent(),
    comment="Every event that was emitted.",
)
_index(events.c.type_id)
_index(events.c.source_id)

Index(
    "ix_events_target_id",
    events.c.target_id,
    sqlite_where=events.c.target_id.is_not(None),
)  # only replies have one

ticks = _table(
    "ticks",
    _id("number of the unit"),
    Column("iteration", Int, nullable=False, comment="the iteration it belongs to"),
    Column("place", Int, nullable=False, comment="its place among the units of the iteration, from 0"),
    Column("agent_id", Int, nullable=False, comment="the agent; 0 for outside"),
    Column(
        "kind",
        Int,
        nullable=False,
        comment="0 tick, 1 event, 2 start, 3 error, 4 shutdown, 5 task, 6 outside",
    ),
    Column("outcome", Int, nullable=False, comment="0 success, 1 error, 2 timeout, 3 conflict, 4 cancelled"),
    Column("started_us", Int, nullable=False, comment="its `now`"),
    Column("duration_us", Int, nullable=False, comment="how long its hook ran"),
    Column("seed", Int, nullable=False, comment="seed of its `random`"),
    Column("change_id", Int, nullable=False, comment="the last change before its own, which follow without gap"),
    Column("event_id", Int, nullable=False, comment="the last event before its own, which follow without gap"),
    Column("changes", Int, nullable=False, comment="how many changes it made"),
    Column("events", Int, nullable=False, comment="how many events it emitted"),
    Column("seen_change_id", Int, comment="the last change it could see, where that is not `change_id`"),
    Column("cause_event_id", Int, comment="the event it handled"),
    Column("subscription_id", Int, comment="the subscription whose cursor it moved to that event"),
    Column("cause_task_id", Int, comment="the task whose result it took up"),
    _recent(),
    comment="One row for each unit of work that changed, emitted or consumed something, or did not succeed.",
)
_index(ticks.c.agent_id)

tick_errors = _table(
    "tick_errors",
    Column("tick_id", Int, primary_key=True, autoincrement=False, comment="the unit that failed"),
    Column("type", Text, nullable=False, comment="class of the exception"),
    Column("message", Text, nullable=False, comment="its message"),
    Column("traceback", Text, nullable=False, comment="its traceback, without values of variables"),
    comment="Why units failed.",
)

subscriptions = _table(
    "subscriptions",
    _id("number of the subscription"),
    Column("subscriber", Text, nullable=False, comment="name of the subscriber"),
    Column(
        "agent_id",
        Int,
        ForeignKey("agents.id"),
        comment="the agent whose `on_event` it feeds; NULL for a callback",
    ),
    Column("cursor", Int, nullable=False, comment="the last event that was handled or skipped"),
    Column("attempts", Int, nullable=False, comment="failed attempts at the next event"),
    Column("attempt_event_id", Int, comment="the event that `attempts` counts"),
    Column("retry_us", Int, comment="the next attempt is not before this instant"),
    Column("created_us", Int, nullable=False, comment="when it began"),
    Column("seen_us", Int, nullable=False, comment="when its subscriber was last there"),
    Column("ended_us", Int, comment="when it was ended; NULL while it lasts"),
    Column(
        "skipped",
        Int,
        nullable=False,
        server_default="0",
        comment="events skipped because the subscriber was away too long",
    ),
    _digest("this row and its patterns"),
    comment="Cursors: how far each subscriber has come in the event log.",
)

subscription_patterns = _table(
    "subscription_patterns",
    Column(
        "subscription_id",
        Int,
        ForeignKey("subscriptions.id"),
        primary_key=True,
        autoincrement=False,
        comment="the subscription",
    ),
    Column("pattern", Text, primary_key=True, comment="an event type, `*` standing for any text"),
    Column("glob", Text, nullable=False, comment="the same for the GLOB operator: `?` and `[` escaped"),
    comment="What each subscription wants.",
)

dead_letters = _table(
    "dead_letters",
    _id("number of the dead letter"),
    Column(
        "subscription_id",
        Int,
        ForeignKey("subscriptions.id"),
        nullable=False,
        comment="who could not handle it",
    ),
    Column("event_id", Int, nullable=False, comment="the event"),
    Column("attempts", Int, nullable=False, comment="how often it was tried"),
    Column("error", Text, nullable=False, comment="type and message of the last failure"),
    Column("tick_id", Int, nullable=False, comment="the unit of the last attempt; without one, that which emitted it"),
    Column("failed_us", Int, nullable=False, comment="when it was given up"),
    Column("redelivered_us", Int, comment="when it was delivered after all; NULL while it waits"),
    Column("requested_us", Int, comment="when an operator asked for another delivery; NULL where none is due"),
    _digest(),
    comment="Deliveries that were given up.",
)

delayed_events = _table(
    "delayed_events",
    _id("number of the delayed event"),
    Column("due_us", Int, nullable=False, comment="not delivered before this instant"),
    Column("type", Text, nullable=False, comment="its type"),
    Column("source", Text, nullable=False, comment="its source"),
    Column("data", Text, comment="its data, as JSON text"),
    Column("metadata", Text, comment="its metadata, as JSON text"),
    Column("tick_id", Int, nullable=False, comment="the unit that emitted it"),
    Column("event_id", Int, comment="the event that it became; NULL while it waits"),
    Column("hops", Int, comment="how many handlers of events led to it; NULL for none"),
    _digest(),
    comment="Events that were emitted to happen later.",
)

schedules = _table(
    "schedules",
    Column("agent_id", Int, ForeignKey("agents.id"), primary_key=True, autoincrement=False, comment="the agent"),
    Column("trigger", Text, nullable=False, comment="as the agent gave it"),
    Column("next_us", Int, comment="next fire time; NULL where there is none"),
    Column("last_us", Int, comment="last fire time"),
    _digest(),
    comment="When agents with a trigger fire.",
)

positions = _table(
    "positions",
    Column("name", Text, primary_key=True, comment="a strategy, or `paused`, `paused_because`, `paused_since`"),
    Column("value", Text, nullable=False, comment="its position, as JSON text"),
    _digest(),
    comment="Where the scheduler stands, so that fairness survives a restart, and whether the loop is paused.",
)

moves = _table(
    "moves",
    _id("number of the move"),
    Column("commit_id", Int, nullable=False, comment="the commit that made it"),
    Column("kind", Text, nullable=False, comment="`cursor`, `flag`, `metadata`, `schedule` or `scheduler`"),
    Column("subject", Text, nullable=False, comment="the agent, subscription or strategy"),
    Column("value", Text, nullable=False, comment="what it is now, as JSON text"),
    comment="Moves that no tick row tells: flags, metadata, schedules, the scheduler's position, skipped events.",
)

commands = _table(
    "commands",
    _id("number of the command"),
    Column("commit_id", Int, nullable=False, comment="the commit it was part of"),
    Column("at_us", Int, nullable=False, comment="when it was carried out"),
    Column("actor", Text, nullable=False, comment="who: user name, uid and pid"),
    Column("name", Text, nullable=False, comment="what: `state.set`, `agents.disable`, …"),
    Column("arguments", Text, nullable=False, comment="with what, as JSON text; of an import how many keys"),
    Column("error", Text, comment="why it was refused; NULL where it was done"),
    comment="Who changed what from outside.",
)

tasks = _table(
    "tasks",
    _id("number of the task"),
    Column("agent_id", Int, nullable=False, index=True, comment="the agent that gets the result; 0 for nobody"),
    Column(
        "name",
        Text,
        nullable=False,
        comment="the function: a method of the agent, a registered name, or `module:function`; `ask` for a question",
    ),
    Column("key", Text, nullable=False, unique=True, comment="the same at every attempt"),
    Column(
        "status",
        Text,
        nullable=False,
        comment="`waiting`, `held`, `running`, `done`, `failed` or `cancelled`",
    ),
    Column("attempts", Int, nullable=False, comment="attempts that were started"),
    Column("priority", Int, nullable=False, comment="higher first"),
    Column("limit_name", Text, comment="the limit it counts against"),
    Column("args", Text, nullable=False, comment="its arguments, as a JSON array; of a question what was asked"),
    Column("result", Text, comment="its result, as JSON text"),
    Column("error", Text, comment="why it failed last"),
    Column("cost_usd", Text, comment="what its attempts cost, a decimal number as text"),
    Column("created_us", Int, nullable=False, comment="when it was submitted"),
    Column("next_us", Int, comment="not started before this instant; of a question, when it ends by itself"),
    Column("started_us", Int, comment="when its last attempt began"),
    Column("ended_us", Int, comment="when it ended"),
    Column("tick_id", Int, nullable=False, comment="the unit that submitted it"),
    Column("kind", Text, nullable=False, server_default="function", comment="`function`, or `question` for a person"),
    Column("question", Text, comment="of a question, its text"),
    Column("failures", Int, nullable=False, server_default="0", comment="attempts that failed and count"),
    Column(
        "interruptions", Int, nullable=False, server_default="0", comment="attempts in a row that the process died in"
    ),
    Column("held", Text, comment="why it is held, as a sentence; NULL where it is not"),
    Column("hops", Int, comment="how many handlers of events led to it, one after another; NULL for none"),
    Column("answered_by", Text, comment="who answered a question; NULL where that was nobody"),
    Column("applied_us", Int, comment="when the result was taken up; NULL while that is to come"),
    Column("applied_tick_id", Int, comment="the unit that took the result up"),
    Column("apply_attempts", Int, nullable=False, server_default="0", comment="failed attempts to take the result up"),
    Column("apply_error", Text, comment="why the result could not be taken up last"),
    _digest(),
    CheckConstraint(
        "status IN ('waiting', 'held', 'running', 'done', 'failed', 'cancelled')",
        name="status",
    ),
    comment="Work outside the loop, and questions to people.",
)

Index(
    "ix_tasks_live",
    tasks.c.id,
    sqlite_where=tasks.c.applied_us.is_(None),
)  # what a start has to load, however many tasks have ended

task_attempts = _table(
    "task_attempts",
    _id("number of the attempt"),
    Column("task_id", Int, nullable=False, index=True, comment="the task"),
    Column("number", Int, nullable=False, comment="which attempt of the task, from 1"),
    Column("run_id", Int, nullable=False, comment="the run that made it"),
    Column("limit_name", Text, comment="the limit it counts against"),
    Column(
        "outcome",
        Text,
        nullable=False,
        comment="`running`, `done`, `failed`, `timeout`, `postponed`, `cancelled`, or `interrupted` with the run",
    ),
    Column("started_us", Int, nullable=False, comment="when it was reserved; it began after that commit"),
    Column("ended_us", Int, comment="when it ended"),
    Column("reserved_usd", Text, comment="what was reserved of the limit, a decimal number as text"),
    Column("cost_usd", Text, comment="what it cost as it said, a decimal number as text"),
    Column("error", Text, comment="type and message of what it raised"),
    Column("traceback", Text, comment="its traceback, without values of variables"),
    _digest(),
    comment="Every attempt at a task: written before it starts, completed when it has ended.",
)

Index("ix_task_attempts_limit_name_started_us", task_attempts.c.limit_name, task_attempts.c.started_us)
Index(
    "ix_task_attempts_open",
    task_attempts.c.id,
    sqlite_where=task_attempts.c.ended_us.is_(None),
)

limits = _table(
    "limits",
    Column("name", Text, primary_key=True, comment="the limit"),
    Column("concurrency", Int, comment="most tasks running at once; NULL for no bound"),
    Column("per_minute", Int, comment="most attempts begun within any 60 s; NULL for no bound"),
    Column("per_day", Int, comment="most attempts begun in a day (UTC); NULL for no bound"),
    Column("usd_per_day", Text, comment="most money spent in a day (UTC), as text; NULL for no bound"),
    Column("configured", Text, nullable=False, comment="what the settings said, as JSON text; `null` for nothing"),
    Column("raised", Text, nullable=False, comment="what an operator said since, as JSON text"),
    Column("opened", Int, nullable=False, comment="how often in a row errors of its tasks have held it"),
    Column("held_until_us", Int, comment="no attempt before this instant, because of errors"),
    Column("held_because", Text, comment="which errors"),
    Column("blocked_us", Int, comment="since when tasks wait because of it; NULL where none does"),
    Column("blocked_because", Text, comment="which bound they wait for"),
    Column("blocked_until_us", Int, comment="when that opens by itself; NULL where that is not known"),
    _digest(),
    comment="What tasks may use of something, and whether they wait for it.",
)

agent_marks = _table(
    "agent_marks",
    Column("agent_id", Int, ForeignKey("agents.id"), primary_key=True, autoincrement=False, comment="the agent"),
    Column("hour_us", Int, primary_key=True, autoincrement=False, comment="when the hour began"),
    Column("iteration", Int, nullable=False, comment="the iteration in which it was written, after the hour"),
    Column("ticks", Int, nullable=False, comment="successful ticks up to then, over the life of the database"),
    Column("errors", Int, nullable=False, comment="units up to then that ended in error or timeout"),
    Column("events", Int, nullable=False, comment="events handled up to then"),
    Column("measured", Int, nullable=False, comment="ticks up to then with a duration"),
    Column("total_us", Int, nullable=False, comment="sum of these durations"),
    _digest(),
    comment="The counters of each agent when an hour was over, of those that did something in it.",
)

row_digests = _table(
    "row_digests",
    Column("kind", Text, primary_key=True, comment="the table: `state_changes`, `events` or `commands`"),
    Column("row_id", Int, primary_key=True, autoincrement=False, comment="the row"),
    Column("digest", Int, nullable=False, comment="digest of the row as it was when it was committed"),
    Column("why", Text, nullable=False, comment="`redacted`: its value was blanked since"),
    CheckConstraint("why IN ('redacted', 'base')", name="why"),
    comment="Digests of history rows whose content is not what it was, so that the seal of their commit still holds.",
)

agent_totals = _table(
    "agent_totals",
    Column("agent_id", Int, ForeignKey("agents.id"), primary_key=True, autoincrement=False, comment="the agent"),
    Column("tick_id", Int, nullable=False, comment="the last unit that is counted here, or was forgotten"),
    Column("ticks", Int, nullable=False, comment="successful ticks up to it that count"),
    Column("errors", Int, nullable=False, comment="units up to it that ended in error or timeout and count"),
    Column("events", Int, nullable=False, comment="events handled up to it that count"),
    _digest(),
    comment="What units counted whose rows are gone, or do not count any more: recounting begins here.",
)

metrics = _table(
    "metrics",
    _id("number of the metric"),
    Column("channel", Text, nullable=False, comment="the agent that records it, or what `push_metrics` said"),
    Column("name", Text, nullable=False, comment="its name in the channel"),
    Column("kind", Text, nullable=False, comment="`gauge`, `counter` or `timing`"),
    Column("samples", Int, nullable=False, comment="samples ever"),
    Column("total", Real, nullable=False, comment="sum of their values: what a counter stands at, seconds of a timing"),
    Column("value", Real, nullable=False, comment="value of the newest sample"),
    Column("updated_us", Int, nullable=False, comment="when that was recorded"),
    Column("hour_us", Int, nullable=False, comment="when the hour began that is not in `metric_hours` yet"),
    Column("hour_samples", Int, nullable=False, comment="samples in it"),
    Column("hour_total", Real, nullable=False, comment="sum of their values"),
    Column("hour_least", Real, nullable=False, comment="smallest of them"),
    Column("hour_most", Real, nullable=False, comment="largest of them"),
    _digest(),
    CheckConstraint("kind IN ('gauge', 'counter', 'timing')", name="kind"),
    UniqueConstraint("channel", "name"),
    comment="Metrics, what they stand at, and the hour that is not over.",
)

metric_samples = _table(
    "metric_samples",
    _id("number of the sample"),
    Column("metric_id", Int, nullable=False, index=True, comment="the metric"),
    Column("agent_id", Int, nullable=False, comment="the agent whose unit recorded it; 0 for outside"),
    Column("iteration", Int, nullable=False, comment="the iteration that the unit belongs to"),
    Column("at_us", Int, nullable=False, comment="when it was recorded: the `now` of the unit"),
    Column("value", Real, nullable=False, comment="its value; of a counter its growth, of a timing seconds"),
    _digest(),
    comment="What was recorded of metrics.",
)

metric_hours = _table(
    "metric_hours",
    Column("metric_id", Int, ForeignKey("metrics.id"), primary_key=True, autoincrement=False, comment="the metric"),
    Column("hour_us", Int, primary_key=True, autoincrement=False, comment="when the hour began"),
    Column("samples", Int, nullable=False, comment="samples in it"),
    Column("total", Real, nullable=False, comment="sum of their values"),
    Column("least", Real, nullable=False, comment="smallest of them"),
    Column("most", Real, nullable=False, comment="largest of them"),
    Column("last", Real, nullable=False, comment="the last of them"),
    _digest(),
    comment="Each hour of a metric that is over, kept for ever.",
)
