"""What operators and other processes can change: one function for each command.

The same functions serve a running loop (through its socket) and a command that holds the lock itself; both offer
the same desk: a state, a journal, a roster, the cursors.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ael_store.clock import Clock, iso
from ael_store.errors import AelError, DeadLetterNotFound, LoopNotRunning, UsageError
from ael_store.model.event import REDACTED, Emission, Event
from ael_store.model.metric import numbers_of
from ael_store.model.records import AgentTotals, DeadLetterRecord, Redaction, TaskRecord
from ael_store.model.state import State
from ael_store.model.unit import Unit
from ael_store.model.values import Limits, check_key, encode, same
from ael_store.runtime.context import VIRTUAL_KEYS
from ael_store.runtime.delivery import Deliveries
from ael_store.runtime.journal import Journal
from ael_store.runtime.outside import Request
from ael_store.runtime.roster import AgentSlot, Roster
from ael_store.runtime.tasks import TaskBoard

if TYPE_CHECKING:
    from ael_store.runtime.scheduler import Scheduler
    from ael_store.store.undo_plan import UndoPlan

__all__ = ["COMMANDS", "PAUSED", "PAUSED_BECAUSE", "PAUSED_SINCE", "Desk", "carry_out"]

PAUSED = "paused"
"""Name of the row in `positions` that says whether the loop is paused."""

PAUSED_BECAUSE = "paused_because"
"""Name of the row that says why the loop has paused itself, a text; null where it has not."""

PAUSED_SINCE = "paused_since"
"""Name of the row that says when that was, in microseconds since 1970."""

MOST_REDELIVERIES = 10_000
"""How many dead letters one command takes up; they wait in memory until they are delivered."""


@dataclass(slots=True)
class Desk:
    """What commands work on."""

    state: State
    journal: Journal
    roster: Roster
    deliveries: Deliveries
    tasks: TaskBoard
    clock: Clock
    limits: Limits
    running: bool
    """True in a loop, False in a command that holds the lock itself."""
    scheduler: Scheduler | None = None
    find_dead_letters: Callable[..., list[tuple[DeadLetterRecord, str, bool]]] = lambda **_: []
    """Looks open dead letters up: `Reader.dead_letter_records`."""
    find_task: Callable[[int], TaskRecord | None] = lambda _: None
    """Looks a task up: `Reader.task_record`."""
    find_undo: Callable[..., UndoPlan] | None = None
    """Looks up what was there before some changes: `Reader.undo_plan`."""
    run_agent: Callable[[AgentSlot], None] | None = None
    """Has a running loop tick an agent in the iteration under way."""
    going: bool = False
    """True in an iteration in which agents run, False while the loop is paused."""
    prune: Callable[[], None] | None = None
    """Has a running loop look at once for what history to remove."""
    change_settings: Callable[..., list[str]] | None = None
    """Has a running loop take up other settings."""
    paused: bool = False
    steps: int = 0
    """Iterations to run while paused."""

    def unit(self, subject: str = "outside") -> Unit:
        return Unit(
            "outside",
            subject,
            self.state,
            iteration=self.journal.iteration,
            now_us=self.clock.now_us(),
            seed=self.clock.seed(),
            limits=self.limits,
        )

    def apply(self, unit: Unit) -> None:
        """Let a unit from outside take effect."""
        unit.closed = True
        self.deliveries.route(self.journal.apply(unit, 0))


def carry_out(desk: Desk, request: Request) -> Any:
    """Carry out a command and return its result, a JSON value; it is durable with the next commit.

    A refusal raises an AelError; either way the command is in the audit.
    """
    now_us = desk.clock.now_us()
    actor = request.actor or "this process"
    command = COMMANDS.get(request.name) or _task_commands(request.name).get(request.name)
    try:
        if command is None:
            raise UsageError(f"there is no command {request.name!r}; there are: {', '.join(sorted(COMMANDS))}")
        try:
            result = command(desk, **request.arguments)
        except TypeError as error:
            if "argument" in str(error) and not isinstance(error, AelError):
                raise UsageError(f"command {request.name}: {error}") from None
            raise
    except Exception as error:
        desk.journal.command(now_us, actor, request.name, _audited(request), f"{type(error).__name__}: {error}"[:500])
        raise
    desk.journal.command(now_us, actor, request.name, _audited(request), None)
    return result


def _audited(request: Request) -> dict[str, Any]:
    """Return what the audit keeps of the arguments: not the values of an import, which the history has anyway."""
    values = request.arguments.get("values")
    if request.name == "state.import" and isinstance(values, dict):
        return {**request.arguments, "values": f"({len(values)} keys)"}
    return request.arguments


def _key(desk: Desk, key: str) -> str:
    check_key(key, desk.limits)
    if key in VIRTUAL_KEYS:
        raise UsageError(f"state key {key!r} is kept by the loop and can't be written")
    return key


def _set(desk: Desk, key: str, value: Any) -> bool:
    unit = desk.unit()
    unit.write(_key(desk, key), encode(value, f"state key {key!r}", desk.limits))
    before = desk.state.change_id
    desk.apply(unit)
    return desk.state.change_id > before


def _delete(desk: Desk, key: str) -> bool:
    unit = desk.unit()
    existed = unit.read(_key(desk, key)) is not None
    unit.write(key, None)
    desk.apply(unit)
    return existed


def _redact_key(desk: Desk, key: str) -> bool:
    unit = desk.unit()
    existed = unit.read(_key(desk, key)) is not None
    unit.write(key, None)
    desk.apply(unit)
    desk.journal.commit.redactions.append(Redaction(key, None))
    return existed


def _redact_event(desk: Desk, id: int) -> int:
    if type(id) is not int or not 1 <= id <= desk.journal.event_id:
        raise UsageError(f"there is no event {id!r}; the newest is {desk.journal.event_id}")
    desk.deliveries.redact(id, REDACTED)
    desk.journal.commit.redactions.append(Redaction(None, id))
    return id


def _import(desk: Desk, values: dict[str, Any], replace: bool = False) -> dict[str, int]:
    if not isinstance(values, dict):
        raise UsageError(f"values is {builtins.type(values).__name__}, wanted is an object of keys and values")
    texts = {_key(desk, key): encode(value, f"state key {key!r}", desk.limits) for key, value in values.items()}
    unit = desk.unit()
    counts = {"added": 0, "changed": 0, "unchanged": 0, "removed": 0}
    for key, text in texts.items():
        before = unit.read(key)
        if before is not None and same(before, text):
            counts["unchanged"] += 1
        else:
            counts["added" if before is None else "changed"] += 1
            unit.write(key, text)
    if replace:
        for key in [key for key, _ in unit.items() if key not in texts]:
            counts["removed"] += 1
            unit.write(key, None)
    desk.apply(unit)
    return counts


def _undo(desk: Desk, **scope: Any) -> dict[str, Any]:
    from ael_store.runtime.undo import undo  # seldom needed

    return undo(desk, **scope)


def _emit(
    desk: Desk, type: str, data: Any = None, metadata: dict[str, Any] | None = None, source: str = "outside"
) -> int | None:
    unit = desk.unit()
    event = Event(type, source, data, metadata=metadata)
    unit.emit(Emission.of(event, desk.limits, now_us=unit.now_us))
    desk.apply(unit)
    return event.id


def _push_metrics(desk: Desk, channel: str, data: dict[str, float]) -> int:
    numbers = numbers_of(channel, data)
    unit = desk.unit()
    unit.measure_all(channel, numbers)
    desk.apply(unit)
    return len(numbers)


def _redeliver(
    desk: Desk,
    event_id: int | None = None,
    subscriber: str | None = None,
    type: str | None = None,
    all: bool = False,
) -> dict[str, Any]:
    if (event_id is None) == (not all):
        raise UsageError("name the event of a dead letter, or say all of them; `ael events dead` lists them")
    if event_id is not None and builtins.type(event_id) is not int:
        raise UsageError(f"event_id is {event_id!r}, wanted is the number of an event")
    found = desk.find_dead_letters(
        event_id=event_id, subscriber=subscriber, type=type, limit=MOST_REDELIVERIES + (event_id is None)
    )
    live = [record for record, _, ended in found if not ended]
    if event_id is not None and not live:
        raise DeadLetterNotFound(_no_dead_letter(event_id, subscriber, [name for _, name, _ in found]))
    more = len(live) > MOST_REDELIVERIES
    marked, already = desk.deliveries.redeliveries.request(live[:MOST_REDELIVERIES], desk.clock.now_us())
    waiting: dict[str, str] = {}
    for number in {record.subscription_id for record in marked} if desk.running else ():
        subscription = desk.deliveries.subscriptions[number]
        reason = subscription.away()
        if reason is not None:
            waiting[subscription.record.subscriber] = reason
    return {
        "requested": len(marked),
        "already": already,
        "more": more,
        "running": desk.running,
        "paused": desk.paused,
        "waiting": dict(sorted(waiting.items())),
    }


def _no_dead_letter(event_id: int, subscriber: str | None, ended: list[str]) -> str:
    if ended:
        names = ", ".join(repr(name) for name in sorted(set(ended)))
        return (
            f"event {event_id} can't be delivered again: the subscription of {names} has ended "
            "(unsubscribed, unregistered or forgotten)"
        )
    whose = "" if subscriber is None else f" of {subscriber!r}"
    return f"event {event_id} is no dead letter{whose}; `ael events dead` lists those that there are"


def _enable(desk: Desk, name: str) -> bool:
    changed = desk.roster.known(name).enabled == 0
    desk.roster.set_enabled(name, True)
    return changed


def _disable(desk: Desk, name: str) -> bool:
    changed = desk.roster.known(name).enabled == 1
    desk.roster.set_enabled(name, False)
    return changed


def _release(desk: Desk, name: str) -> bool:
    record = desk.roster.known(name)
    changed = record.quarantined_us is not None or record.retry_us is not None or record.deaths > 0
    desk.roster.release(name)
    return changed


def _run(desk: Desk, name: str) -> int:
    record = desk.roster.known(name)
    if desk.run_agent is None:
        raise LoopNotRunning("no loop runs on this database, so no agent can run: start it with `ael run`")
    slot = desk.roster.slots.get(name)
    if slot is None:
        raise UsageError(f"agent {name!r} is not registered in the running loop")
    if not slot.has_tick:
        raise UsageError(f"agent {name!r} has no on_tick: it acts on events, and `ael events emit` makes one")
    if not record.enabled:
        raise UsageError(f"agent {name!r} is disabled: `ael agents enable {name}` first")
    if record.retry_us is not None and record.retry_us > desk.clock.now_us():
        state = "backing off" if record.quarantined_us is None else "quarantined"
        raise UsageError(f"agent {name!r} is {state} until {iso(record.retry_us)}: `ael agents release {name}` first")
    if slot.busy is not None:
        raise UsageError(f"agent {name!r} is busy with another hook: try again when that has ended")
    if slot.refused is not None:
        raise UsageError(f"agent {name!r} does not run: {slot.refused}")
    if not slot.started:
        raise UsageError(f"agent {name!r} has not started: its on_start is still to come, or has failed")
    if not desk.going:
        raise UsageError("the loop is paused: `ael resume` first")
    desk.run_agent(slot)
    return desk.journal.iteration


def _rename(desk: Desk, name: str, new_name: str) -> bool:
    desk.roster.known(name)
    if name in desk.roster.slots:
        raise UsageError(
            f"agent {name!r} is registered in the running loop: rename it in the code, add aliases = ({name!r},), "
            "and start again; or stop the loop first"
        )
    if new_name in desk.roster.records:
        raise UsageError(f"agent {new_name!r} is known already: forget it first, or choose another name")
    if not new_name or "/" in new_name or new_name.startswith("(") or not new_name.isprintable():
        raise UsageError(f"{new_name!r} can't be the name of an agent")
    desk.roster.rename(name, new_name)
    desk.journal.move("flag", new_name, {"renamed_from": name})
    if desk.scheduler is not None:
        desk.scheduler.forget(name)
    desk.deliveries.rename(name, new_name)
    move_own_keys(desk, name, new_name)
    return True


def move_own_keys(desk: Desk, name: str, new_name: str) -> None:
    """Move the private part of an agent's state, and its metrics, to its new name."""
    desk.journal.metrics.rename(name, new_name, desk.journal.commit)
    unit = desk.unit()
    prefix = f"agent/{name}/"
    for key, text in list(unit.items(prefix)):
        unit.write(f"agent/{new_name}/{key[len(prefix) :]}", text)
        unit.write(key, None)
    desk.apply(unit)


def _forget(desk: Desk, name: str) -> bool:
    record = desk.roster.known(name)
    if name in desk.roster.slots:
        raise UsageError(f"agent {name!r} is registered in the running loop: unregister it, or stop the loop first")
    now_us = desk.clock.now_us()
    desk.deliveries.end_agent(record.id, name, now_us)
    unit = desk.unit()
    for key, _ in list(unit.items(f"agent/{name}/")):
        unit.write(key, None)
    desk.apply(unit)
    record.registered, record.operator_enabled, record.enabled = 0, None, 1
    record.failures, record.deaths, record.retry_us, record.quarantined_us = 0, 0, None, None
    record.metadata, record.last_error, record.last_error_us = "{}", None, None
    if record.data_version is not None:
        desk.journal.move("version", name, {"from": record.data_version, "to": None, "unit": None})
        record.data_version = None
    desk.journal.changed(record)
    desk.journal.commit.stats.pop(record.id, None)
    desk.journal.commit.forgotten.append(record.id)
    desk.journal.move("metadata", name, {})
    desk.journal.commit.totals.append(AgentTotals(record.id, desk.journal.tick_id, 0, 0, 0))
    desk.roster.forget(name)
    desk.tasks.abandon(record.id)
    if desk.scheduler is not None:
        desk.scheduler.forget(name)
    desk.journal.move("flag", name, {"forgotten": True})
    return True


def _pause(desk: Desk) -> bool:
    changed = not desk.paused
    desk.paused = True
    desk.journal.commit.positions[PAUSED] = "true"
    desk.journal.move("flag", "loop", {"paused": True})
    return changed


def _resume(desk: Desk) -> bool:
    changed = desk.paused
    desk.paused = False
    desk.journal.commit.positions[PAUSED] = "false"
    desk.journal.commit.positions[PAUSED_BECAUSE] = "null"
    desk.journal.move("flag", "loop", {"paused": False})
    return changed


def _step(desk: Desk, iterations: int = 1) -> int:
    if not desk.running:
        raise LoopNotRunning("no loop runs on this database, so there is nothing to step: start it with `ael run`")
    if type(iterations) is not int or not 1 <= iterations <= 1_000_000:
        raise UsageError(f"iterations is {iterations!r}, wanted is an integer from 1")
    if not desk.paused:
        raise UsageError("the loop is not paused: `ael pause` first, then `ael step`")
    desk.steps += iterations
    return desk.journal.iteration + desk.steps


def _prune(desk: Desk) -> bool:
    if desk.prune is None:
        raise LoopNotRunning("no loop runs on this database: `ael db prune` removes history itself then")
    desk.prune()
    return True


def _change_settings(desk: Desk, **arguments: Any) -> list[str]:
    if desk.change_settings is None:
        raise LoopNotRunning("no loop runs on this database: the next one reads its settings by itself")
    return desk.change_settings(**arguments)


COMMANDS: dict[str, Callable[..., Any]] = {
    "state.set": _set,
    "state.delete": _delete,
    "state.redact": _redact_key,
    "state.undo": _undo,
    "state.import": _import,
    "events.emit": _emit,
    "metrics.push": _push_metrics,
    "events.redact": _redact_event,
    "events.redeliver": _redeliver,
    "agents.enable": _enable,
    "agents.disable": _disable,
    "agents.release": _release,
    "agents.run": _run,
    "agents.rename": _rename,
    "agents.forget": _forget,
    "loop.pause": _pause,
    "loop.resume": _resume,
    "loop.step": _step,
    "db.prune": _prune,
    "settings.reload": _change_settings,
}


def _task_commands(name: str) -> dict[str, Callable[..., Any]]:
    """Return the commands of tasks and limits, which are loaded when one is used."""
    if not name.startswith(("tasks.", "limits.")):
        return {}
    from ael_store.runtime.task_commands import TASK_COMMANDS

    return TASK_COMMANDS
