"""Turns a hook of an agent, or a subscribed callback, into a job for the workbench."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from ael_store.model.event import Emission, Event, EventRecord
from ael_store.model.task import Task
from ael_store.model.unit import Kind, Unit
from ael_store.runtime.agent import overrides
from ael_store.runtime.context import StateContext
from ael_store.runtime.journal import failure_of
from ael_store.runtime.tick import Job

if TYPE_CHECKING:
    from ael_store.model.records import DeadLetterRecord, TaskRecord
    from ael_store.runtime.delivery import Subscription
    from ael_store.runtime.roster import AgentSlot
    from ael_store.runtime.run import Run

__all__ = ["error_job", "event_job", "hook_job", "reply", "start_job", "task_job"]


def hook_job(run: Run, slot: AgentSlot, kind: Kind, *, limit_s: float | None = None) -> Job:
    """Return the job of `on_start`, `on_tick` or `on_shutdown`; the agent is busy until it is settled."""
    hook = f"on_{kind}"
    unit = run.new_unit(kind, slot.name)
    context = _context(run, unit, slot)
    agent = slot.agent
    if kind == "tick":
        object.__setattr__(agent, "tick_count", slot.stats.ticks + 1)
    job = Job(
        unit,
        lambda: getattr(agent, hook)(context),
        threaded=slot.threaded[hook],
        limit_s=slot.limit_s if limit_s is None else limit_s,
        background=agent.background and kind == "tick",
        slot=slot,
    )
    slot.busy = job
    return job


def start_job(run: Run, slot: AgentSlot) -> Job:
    """Return the job of `on_upgrade` where the agent's data are older than its code, else of `on_start`."""
    from_version, agent = slot.record.data_version or 0, slot.agent
    if slot.upgrade_from is None or from_version >= agent.version:  # an instance before this one may have done it late
        slot.upgrade_from = None
        return hook_job(run, slot, "start")
    unit = run.new_unit("start", slot.name)
    context = _context(run, unit, slot)
    job = Job(
        unit,
        lambda: agent.on_upgrade(from_version, context),
        threaded=slot.threaded["on_upgrade"],
        limit_s=slot.limit_s,
        slot=slot,
        upgrade_from=from_version,
    )
    slot.busy = job
    return job


def event_job(run: Run, subscription: Subscription, record: EventRecord, letter: DeadLetterRecord | None = None) -> Job:
    """Return the job that hands an event to an agent's `on_event`, or to a callback.

    With `letter` it is a dead letter that comes again: the handler sees `metadata["redelivered"]`, and the hops of
    what it emits are counted from here.
    """
    event = Event.from_record(record)
    hops = 0 if record.hops is None else record.hops
    if letter is not None:
        event.metadata["redelivered"] = True
        hops = 0
    slot = subscription.slot
    cause = Event.from_record(record)
    unit = run.new_unit("event", subscription.record.subscriber, cause=cause, hops=hops + 1)
    event._answer = partial(reply, unit)
    callback = subscription.callback
    if callback is not None:
        job = Job(
            unit,
            lambda: callback(event),
            threaded=not iscoroutinefunction(callback),
            limit_s=run.settings.tick_timeout if slot is None else slot.limit_s,
            slot=slot,
            subscription=subscription,
            letter=letter,
        )
    else:
        assert slot is not None
        agent, context = slot.agent, _context(run, unit, slot)
        job = Job(
            unit,
            lambda: agent.on_event(event, context),
            threaded=slot.threaded["on_event"],
            limit_s=slot.limit_s,
            background=agent.background,
            slot=slot,
            subscription=subscription,
            letter=letter,
        )
    if slot is not None:
        slot.busy = job
    return job


def task_job(run: Run, slot: AgentSlot, record: TaskRecord) -> Job:
    """Return the job of `on_task`, which takes up the result of a task."""
    agent = slot.agent
    unit = run.new_unit("task", slot.name, hops=(record.hops or 0) + 1)
    unit.task_id = record.id
    context, shown = _context(run, unit, slot), Task(replace(record))
    job = Job(
        unit,
        lambda: agent.on_task(shown, context),
        threaded=slot.threaded["on_task"],
        limit_s=slot.limit_s,
        background=agent.background,
        slot=slot,
        task=record,
    )
    slot.busy = job
    return job


def error_job(run: Run, slot: AgentSlot, error: BaseException, failed: Unit) -> Job | None:
    """Return the job of `on_error` after a failed unit, None where the agent has none of its own."""
    agent = slot.agent
    if not overrides(agent, "on_error"):
        return None
    unit = run.new_unit("error", slot.name, cause=failed.cause, hops=failed.hops)
    context = _context(run, unit, slot)
    shown: Any = error if isinstance(error, Exception) else RuntimeError(str(failure_of(error)))
    return Job(
        unit,
        lambda: agent.on_error(shown, context),
        threaded=slot.threaded["on_error"],
        limit_s=slot.limit_s,
        slot=slot,
    )


def reply(unit: Unit, event: Event, to: str) -> None:
    """Emit an event in a unit, for one recipient alone."""
    event.source = unit.subject
    emission = Emission.of(event, unit.limits, now_us=unit.now_us)
    emission.target = to
    unit.emit(emission)


def _context(run: Run, unit: Unit, slot: AgentSlot) -> StateContext:
    return StateContext._of_unit(unit, run.host, run.context.name, slot.name)
