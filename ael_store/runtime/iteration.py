"""One iteration, from top to bottom: outside → select → tick → deliver → commit → measure.

Everything that an iteration did is committed together, and the next one begins only after that. An iteration in
which nothing happened waits in memory for the next commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ael_store.errors import AelError, LoopNotRunning
from ael_store.model.event import REDACTED, Emission, Event, EventRecord
from ael_store.model.records import IterationRecord, Move, TaskRecord
from ael_store.model.unit import Failure, SubscriptionRequest, Unit
from ael_store.model.values import decode
from ael_store.runtime.agent import overrides
from ael_store.runtime.commands import carry_out
from ael_store.runtime.context import StateContext
from ael_store.runtime.delivery import REFILL
from ael_store.runtime.hooks import error_job, event_job, hook_job, start_job, task_job
from ael_store.runtime.journal import SOURCE, failure_of, loop_event
from ael_store.runtime.marks import mark_hour
from ael_store.runtime.measure import IterationSummary
from ael_store.runtime.outside import Request
from ael_store.runtime.tick import Job

if TYPE_CHECKING:
    from ael_store.runtime.roster import AgentSlot
    from ael_store.runtime.run import Run

__all__ = ["Due", "collect_outside", "reconcile", "run_iteration", "settle"]

OVERRUN_EVERY_US = 10_000_000
"""Lost slots are all counted, and warned of no more often than this: an overload must not fill the log."""

EXPIRE_EVERY_US = 3_600_000_000
"""How often the backlog of absent subscribers is looked at."""

BACK_TO_BACK_S = 0.05
"""The period that is reckoned with where the loop runs back to back."""

FEW_DELIVERIES = 20
SLOW_DELIVERIES_S = 0.1
"""So many deliveries are made in each iteration, whatever the time, unless they take longer than this."""

IDLE_BATCH = 1000
"""Idle iterations are committed at the latest when there are so many."""

log = logging.getLogger("ael_store.loop")


@dataclass(frozen=True, slots=True)
class Due:
    """Why the loop goes round."""

    clock: bool
    """A slot of the clock: agents without a trigger are selected."""
    missed: int
    late_s: float
    now_us: int
    began: float
    """Monotonic time at which it was found due."""
    going: bool
    """False while paused: only commands and changes from outside are taken up."""
    draining: bool = False
    until: float | None = None
    """Monotonic time of the next slot of the clock, or at which the grace period is over."""


@dataclass(slots=True)
class _Tally:
    """Counts of the iteration so far."""

    ticks: int = 0
    deliveries: int = 0
    errors: int = 0
    failed: tuple[str, ...] = ()


async def run_iteration(run: Run, due: Due) -> None:
    """Go round once."""
    run.desk.going = due.going
    if not due.going and not due.draining:
        await _while_paused(run)
        return
    journal = run.journal
    journal.iteration += 1
    journal.place = 0
    journal.clock += due.clock
    if due.clock and run.desk.steps:
        run.desk.steps -= 1
    first_tick, first_event, first_change = journal.tick_id, journal.event_id, run.state.change_id
    tally = _Tally()

    reconcile(run)
    collect_late(run, tally)
    outside = collect_outside(run)
    await tick(run, select(run, due), outside, tally)
    if due.going:
        await deliver(run, due, tally)
        if not due.draining:
            run.tasks.reserve(run.clock.now_us())
    mark_hour(run)
    ran_s = run.clock.monotonic() - due.began
    journal.commit.iterations.append(
        IterationRecord(
            journal.iteration,
            journal.run_id,
            0,
            journal.clock,
            due.now_us,
            int(ran_s * 1_000_000),
            tally.ticks,
            tally.errors,
            journal.event_id - first_event,
            due.missed,
            first_tick,
        )
    )
    commit_s = await commit(run)
    summary = IterationSummary(
        journal.iteration,
        tally.ticks,
        tally.deliveries,
        tally.errors,
        journal.event_id - first_event,
        run.state.change_id - first_change,
        due.missed,
        due.late_s,
        ran_s,
        commit_s,
        pending=run.deliveries.pending() if run.observed else 0,
        background=len(run.workbench.background),
        failed=tally.failed,
    )
    run.meter.add(summary)
    if due.missed and due.now_us >= run.overrun_us:
        run.overrun_us = due.now_us + OVERRUN_EVERY_US
        log.warning("iteration %d: %d slots of the clock were lost", journal.iteration, due.missed)
    run.show(summary)


async def _while_paused(run: Run) -> None:
    """Commands, changes from outside and late results are committed; nothing else runs."""
    run.journal.place = 0
    tally = _Tally()
    reconcile(run)
    collect_late(run, tally)
    jobs = collect_outside(run)
    if jobs:
        await run.workbench.run(iter_jobs(jobs), lambda job: settle(run, job, tally))
    await run.commit("command")


def iter_jobs(jobs: list[Job]) -> Callable[[], Job | None]:
    """Return a function that gives one job after another, then None."""
    waiting = deque(jobs)
    return lambda: waiting.popleft() if waiting else None


# -- before the ticks --------------------------------------------------------------------------------


def reconcile(run: Run) -> None:
    """Take up agents that were registered, unregistered or switched since."""
    now_us = run.clock.now_us()
    if run.roster_dirty:
        run.roster_dirty = False
        wanted = run.manager.agents
        for slot in list(run.roster):
            if wanted.get(slot.name) is not slot.agent:
                _retire(run, slot, now_us)
        for name, agent in wanted.items():
            if name not in run.roster.slots:
                try:
                    run.add_agent(agent, now_us)
                    run.deliveries.join_callbacks(run.roster.slots[name])
                except Exception as error:
                    log.error("agent %s can't join: %s", name, error)
                    run.manager._agents.pop(name, None)
        if refusals := run.roster.take_refusals():
            run.deliveries.route(run.journal.apply(run.new_unit("start", SOURCE), 0, also=refusals))
    while run.flags_changed:
        run.roster.follow(run.flags_changed.popleft())


def _retire(run: Run, slot: AgentSlot, now_us: int) -> None:
    """An agent was unregistered: its `on_shutdown` runs in this iteration, its subscriptions end."""
    run.roster.remove(slot.name)
    run.schedules.remove(slot.name)
    run.scheduler.forget(slot.name)
    run.deliveries.end_agent(slot.record.id, slot.name, now_us)
    run.bus._carry_out(SubscriptionRequest(slot.name, None, None))
    run.unstarted.discard(slot.name)
    slot.agent._host = None
    slot.leaving = slot.started
    _say_goodbye(run, slot)


def _say_goodbye(run: Run, slot: AgentSlot) -> None:
    """Have the last hook of an unregistered agent run, once no other one does."""
    if slot.leaving and slot.busy is None:
        slot.leaving = slot.started = False
        run.followups.append(hook_job(run, slot, "shutdown"))


def collect_late(run: Run, tally: _Tally) -> None:
    """Take up attempts at tasks that ended, and apply what ended in the background, each unit whole or not at all."""
    run.tasks.collect()
    while run.finished:
        settle(run, run.finished.popleft(), tally)


def collect_outside(run: Run) -> list[Job]:
    """Apply changes from outside and delayed events; return the functions of `transact`, which are still to run."""
    jobs: list[Job] = []
    for request in run.host.outside.take():
        if request.name == "transact":
            jobs.append(_transaction(run, request))
        elif request.action is not None:
            _apply_request(run, request)
        else:
            _carry_out(run, request)
    if not run.desk.paused:
        _release_delayed(run)
    return jobs


def _apply_request(run: Run, request: Request) -> None:
    assert request.action is not None
    unit = run.new_unit("outside", "outside")
    try:
        request.action(unit)
    except Exception as error:
        log.error("%s from outside failed: %s", request.name, error)
        return
    unit.closed = True
    subscribe(run, unit)
    run.deliveries.route(run.journal.apply(unit, 0))


def _carry_out(run: Run, request: Request) -> None:
    result: Any = None
    failure: BaseException | None = None
    try:
        result = carry_out(run.desk, request)
    except Exception as error:
        failure = error
    if request.reply is not None:
        run.replies.append((request.reply, result, failure))


def _transaction(run: Run, request: Request) -> Job:
    unit = run.new_unit("outside", "outside")
    context = StateContext._of_unit(unit, run.host, run.context.name)
    function = request.arguments["function"]
    job = Job(unit, partial(function, context), limit_s=run.settings.tick_timeout)
    job.request = request
    return job


def _release_delayed(run: Run) -> None:
    """Let the delayed events whose time has come happen, each in a unit of its own."""
    for record in run.journal.due_delayed(run.clock.now_us()):
        unit = run.new_unit("outside", record.source, hops=record.hops)
        event = Event(record.type, record.source)
        unit.emissions.append(
            Emission(record.type, record.source, record.data, record.metadata, unit.now_us, None, event)
        )
        unit.closed = True
        events = run.journal.apply(unit, 0)
        record.event_id = events[0].id
        del run.journal.delayed[record.id]
        run.journal.commit.delayed[record.id] = record
        run.deliveries.route(events)


# -- select and tick ---------------------------------------------------------------------------------


def select(run: Run, due: Due) -> list[AgentSlot]:
    """Return the agents to tick, in order: those whose trigger fires, then those of the clock by the strategy."""
    if due.draining:
        return []
    triggered = run.schedules.due(due.now_us)
    if not due.clock:
        return triggered
    slots = run.roster.tickers
    ready = [
        slot.agent for slot in slots.values() if slot.ready(due.now_us) and (slot.started or slot.name in run.unstarted)
    ]
    chosen = run.scheduler.select_agents(ready, run.settings.max_agents, iteration=run.journal.clock)
    return triggered + [slots[agent.name] for agent in chosen]


async def tick(run: Run, selected: list[AgentSlot], outside: list[Job], tally: _Tally) -> None:
    """Run what waits from before, `on_upgrade` and `on_start` of new agents, then the ticks, one after another."""
    run.followups.extend(outside)
    new = [
        slot
        for name in run.unstarted
        if (slot := run.roster.slots.get(name)) is not None and slot.ready(run.clock.now_us())
    ]
    starting = deque(sorted(new, key=lambda slot: (-slot.record.priority, slot.order)))
    waiting = deque(selected)

    def next_job() -> Job | None:
        if (job := run.next_followup()) is not None:
            tally.ticks += job.by_hand
            return job
        while starting:
            slot = starting.popleft()
            if slot.busy is None:
                return start_job(run, slot)
        while waiting and not run.stopping:
            slot = waiting.popleft()
            if run.schedules.has(slot.name):
                run.schedules.fired(slot, run.clock.now_us())
            if slot.started and slot.ready(run.clock.now_us()):
                tally.ticks += 1
                return hook_job(run, slot, "tick")
        return None

    if run.followups or starting or waiting:
        await run.workbench.run(next_job, lambda job: settle(run, job, tally))


# -- deliver -----------------------------------------------------------------------------------------


async def deliver(run: Run, due: Due, tally: _Tally) -> None:
    """Deliver the events that happened before this step, oldest first, up to a bound; the rest comes next.

    Dead letters that were asked for, and results of tasks, take turns with them, so that none waits for all of
    another.
    """
    deliveries, again = run.deliveries, run.deliveries.redeliveries
    boundary = run.journal.event_id
    bound = _Bound(run, due)
    await _refill(run, bound)

    def next_event(now_us: int) -> Job | None:
        found = deliveries.next(boundary, now_us)
        if found is None:
            return None
        subscription, record = found
        deliveries.began(subscription)
        return event_job(run, subscription, record)

    def next_letter(now_us: int) -> Job | None:
        requested = again.next(now_us)
        if requested is None:
            return None
        subscription, letter, record = requested
        return event_job(run, subscription, record, letter)

    def next_result(now_us: int) -> Job | None:
        while (found := run.tasks.next_result(now_us)) is not None:
            task, slot = found
            if slot is not None:
                return task_job(run, slot, task)
            tell_finished(run, task)
        return None

    turns = deque((next_letter, next_event, next_result))

    def next_job() -> Job | None:
        if (job := run.next_followup()) is not None:
            return job
        if bound.reached(tally.deliveries):
            return None
        now_us = run.clock.now_us()
        for _ in range(len(turns)):
            turn = turns[0]
            turns.rotate(-1)
            if (job := turn(now_us)) is not None:
                tally.deliveries += 1
                return job
        return None

    now_us = run.clock.now_us()
    deliveries.wake(now_us)
    if deliveries.has_next(boundary) or again.pending_now(now_us) or run.tasks.pending_now(now_us):
        await run.workbench.run(next_job, lambda job: settle(run, job, tally))


def tell_finished(run: Run, task: TaskRecord) -> None:
    """Nobody has an `on_task` for it: the loop tells of its result by an event, in a unit that takes it up."""
    slot = run.roster.slot_of(task.agent_id)
    name = "outside" if slot is None else slot.name
    unit = run.new_unit("task", name, hops=(task.hops or 0) + 1)
    unit.task_id = task.id
    unit.closed = True
    data = {
        "id": task.id,
        "key": task.key,
        "name": task.name,
        "status": task.status,
        "result": None if task.result is None else decode(task.result),
        "error": task.error,
        "attempts": task.attempts,
        "cost_usd": None if task.cost_usd is None else float(task.cost_usd),
        "answered_by": task.answered_by,
    }
    events = run.journal.apply(unit, task.agent_id, also=[loop_event("task_finished", data, name)])
    run.tasks.applied(task, run.journal.tick_id, unit.now_us)
    run.deliveries.route(events)


class _Bound:
    """How long an iteration goes on delivering, so that a storm of events takes no ticks from other agents.

    It is half of the time until the next slot of the clock, as the other half may go into the commit; what is left
    comes in the next iterations, which follow at once. A loop that is behind its clock, or has none, gets a share
    of its period. A few quick deliveries are always made, and a slow one at least.
    """

    def __init__(self, run: Run, due: Due) -> None:
        self.run = run
        self.draining = due.draining
        now, period_s = run.clock.monotonic(), run.settings.tick_rate or BACK_TO_BACK_S
        left_s = period_s if due.until is None else due.until - now
        if due.draining:
            self.soft = self.hard = now + left_s
        else:
            self.soft = now + max(left_s / 2, period_s / 10)
            self.hard = self.soft + SLOW_DELIVERIES_S

    def reached(self, made: int) -> bool:
        """True where the iteration has delivered enough."""
        if made >= self.run.settings.deliveries_per_iteration:
            return True
        now = self.run.clock.monotonic()
        if self.run.stopping and not self.draining:  # what is left is delivered within the grace period
            self.soft, self.hard = min(self.soft, now), min(self.hard, now + SLOW_DELIVERIES_S)
        if now < self.soft:
            return False
        return self.draining or made >= FEW_DELIVERIES or (now >= self.hard and made > 0)


async def _refill(run: Run, bound: _Bound) -> None:
    """Read from the log what does not wait in memory; only committed events are read."""
    if run.clock.now_us() >= run.expire_us:
        await _expire(run)
    until = run.journal.committed_event_id
    letters = run.deliveries.redeliveries.to_load(run.clock.now_us(), REFILL)
    if letters:
        wanted = sorted({letter.event_id for letter in letters})
        found = await asyncio.to_thread(run.store.reader.events_of, wanted)
        run.deliveries.redeliveries.loaded(letters, _as_redacted(run, found))
    for number, subscription in enumerate(run.deliveries.to_refill(run.clock.now_us())):
        if bound.reached(number):
            return
        types, record = run.deliveries.types_for(subscription), subscription.record
        records = await asyncio.to_thread(
            partial(run.store.reader.pending, to=record.subscriber, whatever=record.agent_id is not None),
            types,
            record.cursor,
            until,
            REFILL,
        )
        run.deliveries.refilled(subscription, _as_redacted(run, records), until)


def _as_redacted(run: Run, records: list[EventRecord]) -> list[EventRecord]:
    """Return events of the log without what is being redacted and not committed yet."""
    blanked = {redaction.event_id for redaction in run.journal.commit.redactions}
    if not blanked:
        return records
    return [replace(record, data=REDACTED, metadata=None) if record.id in blanked else record for record in records]


async def _expire(run: Run) -> None:
    """Skip what has waited too long for subscribers that are away."""
    now_us = run.clock.now_us()
    run.expire_us = now_us + EXPIRE_EVERY_US
    away = run.deliveries.away()
    if not away:
        return
    reader = run.store.reader
    cutoff_us = now_us - int(run.settings.backlog_days * 86_400_000_000)
    until = await asyncio.to_thread(reader.last_event_before, cutoff_us)
    for subscription in away:
        after = subscription.record.cursor
        if after < until:
            types = run.deliveries.types_for(subscription)
            count = partial(reader.count_events, types, after, until, to=subscription.record.subscriber)
            number = await asyncio.to_thread(count)
            if number:
                run.deliveries.skip(subscription, until, number)


# -- a unit has ended --------------------------------------------------------------------------------


def settle(run: Run, job: Job, tally: _Tally | None = None) -> None:
    """Let a finished unit take effect, or record its failure; count it; move the cursor."""
    unit, slot, subscription = job.unit, job.slot, job.subscription
    if unit.shadow is not None:
        run.state.close_shadow(unit.shadow)
    metadata: str | None = None
    if unit.outcome == "success":
        key = unit.conflict()
        if key is not None:
            unit.fail("conflict", Failure("Conflict", f"another unit has changed {key!r} since this one began"))
        elif slot is not None:
            try:
                metadata = run.roster.save_metadata(slot, unit)
            except Exception as error:
                job.error = error
                unit.fail("error", failure_of(error))
    if slot is not None:
        if slot.busy is job and not job.still_runs:
            slot.busy = None
            _say_goodbye(run, slot)
        if metadata is not None:
            slot.record.metadata = metadata
            run.journal.changed(slot.record)
            run.journal.commit.moves.append(Move("metadata", slot.name, metadata))
    also = run.roster.count(slot, unit) if slot is not None else []
    if unit.cause is not None and unit.cause.source == SOURCE:
        also = []  # failing to handle one of the loop's own events emits nothing more
    # A hook that cancels itself has failed; one that the end of the loop cancelled has not.
    failed = unit.outcome in ("error", "timeout") or (unit.outcome == "cancelled" and not job.aborted)
    if failed:
        also = [*_report(run, job), *also]
        if tally is not None:
            tally.errors += 1
            tally.failed = (*tally.failed, unit.subject)
    _measure_tick(run, job, also)
    moved = None
    event_id = 0
    if subscription is not None and unit.cause is not None and job.letter is None:
        event_id = unit.cause.id or 0
        moved = run.deliveries.settle(subscription, event_id, unit, failed)
    if unit.subscriptions:
        subscribe(run, unit)
    events = run.journal.apply(
        unit,
        0 if slot is None else slot.record.id,
        subscription=moved,
        also=also,
        always=job.letter is not None
        or job.task is not None
        or job.by_hand
        or job.upgrade_from is not None
        or run.settings.tick_log == "all"
        or unit.duration_us >= run.settings.slow_after * 1e6,
    )
    if job.letter is not None:
        run.deliveries.redeliveries.settle(job.letter, unit, failed)
    if job.task is not None:
        if unit.outcome == "success":
            run.tasks.applied(job.task, run.journal.tick_id, unit.now_us)
        else:
            run.tasks.not_applied(job.task, unit, failed)
    if subscription is not None:
        if failed and job.letter is None:
            run.deliveries.give_up(subscription, event_id, unit)
        run.deliveries.ended(subscription)
    run.deliveries.route(events)
    if unit.kind == "start" and slot is not None:
        _settle_start(run, job, slot)
    if failed and slot is not None and unit.kind != "error" and job.error is not None:
        followup = error_job(run, slot, job.error, unit)
        if followup is not None:
            run.followups.append(followup)
    if job.request is not None and job.request.reply is not None:
        run.replies.append((job.request.reply, job.result, None if unit.outcome == "success" else _refusal(job)))


def _settle_start(run: Run, job: Job, slot: AgentSlot) -> None:
    """After `on_upgrade` comes `on_start`, and after that the agent takes part; one that failed is tried again."""
    if job.unit.outcome != "success":
        if job.upgrade_from is not None:
            tried = {"from": job.upgrade_from, "to": job.upgrade_from, "unit": run.journal.tick_id}
            run.journal.move("version", slot.name, tried)
        return
    if job.upgrade_from is not None:
        run.roster.upgraded(slot, run.journal.tick_id)
        if run.roster.slots.get(slot.name) is slot and overrides(slot.agent, "on_start"):
            run.followups.append(hook_job(run, slot, "start"))
            return
    slot.started = True
    run.unstarted.discard(slot.name)


def _refusal(job: Job) -> BaseException:
    """Return what the caller of `transact` gets: the error itself, where a future can carry it."""
    error = job.error
    if job.aborted:
        return LoopNotRunning("the loop ended before this function did; nothing that it wrote remains")
    if error is None:
        return AelError(str(job.unit.failure))
    if isinstance(error, StopIteration | asyncio.CancelledError):  # the one is refused, the other would cancel
        wrapped = RuntimeError(f"the function raised {error!r}")
        wrapped.__cause__ = error
        return wrapped
    return error


def _measure_tick(run: Run, job: Job, also: list[Emission]) -> None:
    unit, slot = job.unit, job.slot
    if unit.kind != "tick" or slot is None:
        return
    run.last_tick_us = unit.now_us
    if run.roster.slots.get(slot.name) is slot:
        run.scheduler.record_execution(slot.name, unit.duration_us / 1e6)
    ended = "agent.completed" if unit.outcome == "success" else "agent.failed"
    if run.deliveries.wanted(ended):
        data = {"agent": slot.name, "iteration": run.journal.iteration}
        more = {"duration_ms": unit.duration_us / 1000, "outcome": unit.outcome}
        also.insert(0, loop_event(ended, {**data, **more}))
    if run.deliveries.wanted("agent.started"):
        also.insert(0, loop_event("agent.started", {"agent": slot.name, "iteration": run.journal.iteration}))


def _report(run: Run, job: Job) -> list[Emission]:
    """Log a failure, and return the event that tells of it; failing to handle the loop's own events makes none."""
    unit, failure = job.unit, job.unit.failure
    assert failure is not None
    log.warning("%s: %s failed in iteration %d: %s", unit.subject, job.hook, run.journal.iteration, failure)
    log.debug("%s", failure.traceback)
    if job.slot is None and job.subscription is None:
        return []
    if unit.cause is not None and unit.cause.source == SOURCE:
        return []
    return [
        loop_event(
            "agent_error",
            {
                "agent": unit.subject,
                "hook": job.hook,
                "outcome": unit.outcome,
                "type": failure.type,
                "error": failure.message[:500],
                "iteration": run.journal.iteration,
            },
        )
    ]


def subscribe(run: Run, unit: Unit) -> None:
    """Carry out what a unit subscribed and unsubscribed."""
    now_us = unit.now_us
    for request in unit.subscriptions:
        run.bus._carry_out(request)
        _subscribe(run, request, now_us)
    unit.subscriptions = []


def _subscribe(run: Run, request: SubscriptionRequest, now_us: int) -> None:
    if request.callback is not None and request.pattern is not None:
        slot = run.roster.slots.get(request.subscriber)
        run.deliveries.attach_callback(request.subscriber, request.pattern, request.callback, slot, now_us)
    else:
        run.deliveries.end(request.subscriber, request.pattern, now_us)


# -- commit ------------------------------------------------------------------------------------------


async def commit(run: Run) -> float:
    """Commit what the iteration did, unless it was idle and may wait; return the seconds that it took."""
    waiting = run.journal.waiting_since()
    if (
        run.journal.commit.idle
        and not run.replies
        and not run.desk.paused
        and waiting is not None
        and len(run.journal.commit.iterations) < IDLE_BATCH
        and 0 <= run.clock.now_us() - waiting.started_us < run.settings.idle_commit * 1e6
    ):
        return 0.0
    began = run.clock.monotonic()
    await run.commit("iteration")
    return max(run.clock.monotonic() - began, 1e-9)
