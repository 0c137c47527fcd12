"""Tasks, their attempts, and limits, as they were at a past moment.

A task is what its attempts up to then say. What was to come is not told: the end of an attempt that ran is unknown
(`interrupted`), and a task that waited waits at most until it was tried next. Why a task was held at that moment is
not told either, but in a fork each one is held. Tasks that were removed since (`task_days`) had ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from ael_store.model.records import AttemptRecord, LimitRecord, TaskRecord
from ael_store.store.past import Past, Rewind, records_of

__all__ = ["rewind_limits", "rewind_tasks"]

OVER = ("done", "failed", "cancelled")
LATER = "task_id IN (SELECT id FROM tasks WHERE tick_id > :t)"


def rewind_tasks(past: Past, rewind: Rewind) -> int:
    """Tasks that were submitted later go, those that ended later wait; returns how many are not over."""
    t = past.moment.tick_id
    gone = [row[0] for row in past.rows("SELECT id FROM tasks WHERE tick_id > :t", t=t)]
    rewind.remove("tasks", *gone)
    rewind.remove("task_attempts", *(row[0] for row in past.rows(f"SELECT id FROM task_attempts WHERE {LATER}", t=t)))
    # What had ended and was taken up by then, and was not touched since, needs no look.
    touched = "tick_id <= :t AND (applied_us IS NULL OR applied_tick_id > :t OR " + " OR ".join(
        f"{column} >= :next" for column in ("applied_us", "ended_us", "started_us")
    )
    where = {"t": t, "next": past.next_us}
    attempts: dict[int, list[AttemptRecord]] = {}
    for attempt in records_of(
        past, "task_attempts", AttemptRecord, f"task_id IN (SELECT id FROM tasks WHERE {touched}))", **where
    ):
        attempts.setdefault(attempt.task_id, []).append(attempt)
    taken_up = {
        task_id: number
        for task_id, number in past.rows(
            "SELECT cause_task_id, max(id) FROM ticks WHERE cause_task_id IS NOT NULL AND kind = 5 AND outcome = 0 "
            "AND id <= :t GROUP BY 1",
            t=t,
        )
    }
    revived = {
        json.loads(arguments).get("id"): at_us
        for arguments, at_us in past.rows(
            "SELECT arguments, at_us FROM commands WHERE name = 'tasks.retry' AND error IS NULL AND commit_id <= :c "
            "ORDER BY id",
            c=past.moment.commit_id,
        )
    }
    left = 0
    for now in records_of(past, "tasks", TaskRecord, f"{touched})", **where):
        made = attempts.get(now.id, [])
        later = [attempt for attempt in made if attempt.run_id > past.run_id or past.is_after(attempt.started_us)]
        kept = [attempt for attempt in made if attempt not in later]
        rewind.remove("task_attempts", *(attempt.id for attempt in later))
        cut = _cut_off(past, rewind, kept)
        then = replace(now)
        was_applied = now.applied_us is not None and (
            now.applied_tick_id <= t if now.applied_tick_id is not None else not past.is_after(now.applied_us)
        )
        ended = taken_up.get(now.id)
        if not was_applied and ended is not None and _ends(past, ended, made, revived.get(now.id, 0)):
            _over_again(past, then, kept, ended)
        elif not was_applied:
            if later or cut or past.is_after(now.ended_us) or now.status == "running":
                _wait_again(then, kept, later, cut)
            then.applied_us = then.applied_tick_id = None
            if now.applied_us is not None:
                then.apply_attempts, then.apply_error = 0, None
                then.held = then.held if then.status == "held" else None
        if then != now:
            rewind.commit.tasks[now.id] = then
        left += then.status not in OVER
    return left


def _cut_off(past: Past, rewind: Rewind, kept: list[AttemptRecord]) -> bool:
    """The end of an attempt that ran at the moment is not known; True where there is one."""
    cut = False
    for place, attempt in enumerate(kept):
        if attempt.ended_us is None or past.is_after(attempt.ended_us):
            cut = True
            then = replace(attempt, outcome="interrupted", ended_us=max(past.ended_us, attempt.started_us))
            then.cost_usd = then.error = then.traceback = None
            rewind.commit.attempts[attempt.id] = kept[place] = then
    return cut


def _ends(past: Past, tick_id: int, made: Sequence[AttemptRecord], retried_us: int) -> bool:
    """True where a task whose result a unit had taken up was not made to run again by the moment."""
    at_us = past.number("SELECT started_us FROM ticks WHERE id = :t", t=tick_id)
    again = [attempt for attempt in made if attempt.started_us > at_us and not past.is_after(attempt.started_us)]
    return not again and retried_us <= at_us


def _over_again(past: Past, then: TaskRecord, kept: Sequence[AttemptRecord], tick_id: int) -> None:
    """It had failed or was cancelled, and an operator has made it run again since."""
    last = kept[-1] if kept else None
    _sum_up(then, kept)
    then.status = "cancelled" if last is None or last.outcome == "cancelled" else "failed"
    then.applied_tick_id = tick_id
    then.applied_us = past.number("SELECT started_us FROM ticks WHERE id = :t", t=tick_id)
    then.ended_us = then.applied_us if last is None or last.ended_us is None else last.ended_us
    then.result, then.held, then.next_us, then.apply_error = None, None, None, None


def _wait_again(then: TaskRecord, kept: Sequence[AttemptRecord], later: Sequence[AttemptRecord], cut: bool) -> None:
    """It was not over: it waits, for what an attempt later than the moment has waited for."""
    _sum_up(then, kept)
    then.status, then.held, then.result, then.ended_us, then.answered_by = "waiting", None, None, None, None
    if then.kind == "function":
        then.next_us = later[0].started_us if later and not cut else None


def _sum_up(then: TaskRecord, kept: Sequence[AttemptRecord]) -> None:
    """What the attempts so far add up to."""
    then.attempts = len(kept)
    then.started_us = kept[-1].started_us if kept else None
    then.failures = sum(attempt.outcome in ("failed", "timeout") for attempt in kept)
    then.interruptions = 0
    errors = [attempt.error for attempt in kept if attempt.error is not None]
    then.error = errors[-1] if errors else None
    cost = sum((Decimal(attempt.cost_usd or 0) for attempt in kept), Decimal(0))
    then.cost_usd = f"{cost:f}" if cost else None


def rewind_limits(past: Past, rewind: Rewind) -> None:
    """Limits are as they are; what held or filled them is over."""
    for now in records_of(past, "limits", LimitRecord):
        then = replace(now, opened=0, held_until_us=None, held_because=None)
        then.blocked_us = then.blocked_because = then.blocked_until_us = None
        if then != now:
            rewind.commit.limits[now.name] = then
