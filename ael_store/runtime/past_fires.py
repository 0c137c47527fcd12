"""When an agent's trigger fired in past iterations, and when it was due next.

A commit logs where a trigger stands when it has moved, once. Idle iterations share a commit, so within one the fire
times are played again, from where the trigger stood before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ael_store.clock import to_us
from ael_store.errors import InvalidTrigger
from ael_store.runtime.trigger import parse_trigger

if TYPE_CHECKING:
    from ael_store.store.agent_facts import AgentFacts

__all__ = ["Fire", "past_fires"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fire:
    """What the trigger did in an iteration: whether it fired (None: not known), and when it was due next."""

    fired: bool | None
    next_us: int | None


def past_fires(facts: AgentFacts, zone: str) -> dict[int, Fire]:
    """Return what the agent's trigger did in each iteration; `zone` is that of cron lines without one."""
    moves = [move for move in facts.moves if move["kind"] == "schedule"]
    found: dict[int, Fire] = {}
    groups: dict[int, list[Row]] = {}
    for iteration in reversed(facts.iterations):
        groups.setdefault(iteration["commit_id"], []).append(iteration)
    for commit_id, iterations in groups.items():
        past = [move for move in moves if move["commit_id"] < commit_id]
        before = past[-1]["value"] if past else None
        here = [move for move in moves if move["commit_id"] == commit_id]
        next_us = None if before is None else _us(before["next_at"])
        if not here:
            if before is None:
                next_us = _due_as_told_later(facts, moves, commit_id)
            for iteration in iterations:
                found[iteration["id"]] = Fire(False, next_us)
            continue
        value = here[-1]["value"]
        last_us = _us(value["last_at"])
        if last_us is None or (before is not None and value["last_at"] == before["last_at"]):  # armed, or clock set
            for iteration in iterations:
                found[iteration["id"]] = Fire(False, _us(value["next_at"]) if next_us is None else next_us)
            continue
        for iteration in iterations:
            at_us = iteration["started_us"]
            if next_us is None:
                is_it = at_us >= last_us
                found[iteration["id"]] = Fire(True if is_it else None, last_us)
                next_us = _us(value["next_at"]) if is_it else None
            elif next_us <= at_us:
                found[iteration["id"]] = Fire(True, next_us)
                next_us = _following(value["trigger"], zone, next_us, at_us)
            else:
                found[iteration["id"]] = Fire(False, next_us)
    return found


def _due_as_told_later(facts: AgentFacts, moves: list[Row], commit_id: int) -> int | None:
    """Return when the trigger was due, as the next move of it tells, or as it stands now."""
    following = [move for move in moves if move["commit_id"] > commit_id]
    following += [move for move in facts.later if move["kind"] == "schedule"]
    if following:
        return _us(following[0]["value"]["last_at"])
    return None if facts.schedule is None else facts.schedule["next_us"]


def _following(trigger: str, zone: str, last_us: int, now_us: int) -> int | None:
    """Return the fire time after one that was taken up at an instant, as `schedules.py` does."""
    try:
        times = parse_trigger(trigger, zone)
    except InvalidTrigger:
        return None
    if times.period_us is not None:
        return last_us + times.period_us * (1 + (now_us - last_us) // times.period_us)
    return times.after(max(last_us, now_us))


def _us(moment: str | None) -> int | None:
    return None if moment is None else to_us(datetime.fromisoformat(moment))
