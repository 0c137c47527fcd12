"""What operators and other processes can change: one function for each command.

The same functions serve a running loop (through its socket) and a command that holds the lock itself; both offer
the same desk: a state, a journal, a roster, the cursors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ael_store.clock import Clock
from ael_store.errors import AelError, LoopNotRunning, UsageError
from ael_store.model.event import Emission, Event
from ael_store.model.state import State
from ael_store.model.unit import Unit
from ael_store.model.values import Limits, check_key, encode
from ael_store.runtime.context import VIRTUAL_KEYS
from ael_store.runtime.delivery import Deliveries
from ael_store.runtime.journal import Journal
from ael_store.runtime.outside import Request
from ael_store.runtime.roster import Roster

__all__ = ["COMMANDS", "PAUSED", "Desk", "carry_out"]

PAUSED = "paused"
"""Name of the row in `positions` that says whether an operator has paused the loop."""


@dataclass(slots=True)
class Desk:
    """What commands work on."""

    state: State
    journal: Journal
    roster: Roster
    deliveries: Deliveries
    clock: Clock
    limits: Limits
    running: bool
    """True in a loop, False in a command that holds the lock itself."""
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
    command = COMMANDS.get(request.name)
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
        desk.journal.command(now_us, actor, request.name, request.arguments, f"{type(error).__name__}: {error}"[:500])
        raise
    desk.journal.command(now_us, actor, request.name, request.arguments, None)
    return result


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


def _emit(
    desk: Desk, type: str, data: Any = None, metadata: dict[str, Any] | None = None, source: str = "outside"
) -> int | None:
    unit = desk.unit()
    event = Event(type, source, data, metadata=metadata)
    unit.emit(Emission.of(event, desk.limits, now_us=unit.now_us))
    desk.apply(unit)
    return event.id


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
    changed = record.quarantined_us is not None or record.retry_us is not None
    desk.roster.release(name)
    return changed


def _rename(desk: Desk, name: str, new_name: str) -> bool:
    record = desk.roster.known(name)
    if name in desk.roster.slots:
        raise UsageError(
            f"agent {name!r} is registered in the running loop: rename it in the code, add aliases = ({name!r},), "
            "and start again; or stop the loop first"
        )
    if new_name in desk.roster.records:
        raise UsageError(f"agent {new_name!r} is known already: forget it first, or choose another name")
    if not new_name or "/" in new_name or new_name.startswith("(") or not new_name.isprintable():
        raise UsageError(f"{new_name!r} can't be the name of an agent")
    del desk.roster.records[name]
    desk.roster.records[new_name] = record
    record.name = new_name
    desk.journal.changed(record)
    desk.journal.move("flag", new_name, {"renamed_from": name})
    desk.deliveries.rename(name, new_name)
    move_own_keys(desk, name, new_name)
    return True


def move_own_keys(desk: Desk, name: str, new_name: str) -> None:
    """Move the private part of an agent's state to its new name."""
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
    record.failures, record.retry_us, record.quarantined_us = 0, None, None
    record.metadata, record.last_error, record.last_error_us = "{}", None, None
    desk.journal.changed(record)
    desk.journal.commit.stats.pop(record.id, None)
    desk.journal.commit.forgotten.append(record.id)
    desk.roster.stats.pop(record.id, None)
    del desk.roster.records[name]
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


COMMANDS: dict[str, Callable[..., Any]] = {
    "state.set": _set,
    "state.delete": _delete,
    "events.emit": _emit,
    "agents.enable": _enable,
    "agents.disable": _disable,
    "agents.release": _release,
    "agents.rename": _rename,
    "agents.forget": _forget,
    "loop.pause": _pause,
    "loop.resume": _resume,
    "loop.step": _step,
}
