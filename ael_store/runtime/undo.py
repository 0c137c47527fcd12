"""`ael state undo`: the values from before, written back as new changes.

The history tells what was there before (`store/undo_plan.py`), up to the last commit. What the loop has changed since
is in the commit that it gathers, and is taken into account here, so that nothing is undone that somebody has changed
an instant before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ael_store.model.state import Change
from ael_store.model.values import decode, same
from ael_store.store.undo_plan import CHANGED, REDACTED_SINCE, UndoScope, UndoStep

if TYPE_CHECKING:
    from ael_store.model.records import TickRow
    from ael_store.runtime.commands import Desk

__all__ = ["report", "undo"]


def undo(
    desk: Desk,
    agent: str | None = None,
    since: int | str | None = None,
    change: int | None = None,
    iteration: int | None = None,
) -> dict[str, Any]:
    """Write back what was there before the changes in scope; returns what `report` says.

    A key that somebody has changed since is kept as it is, and so is one whose value was redacted.
    """
    assert desk.find_undo is not None
    plan = desk.find_undo(agent=agent, since=since, change=change, iteration=iteration)
    steps = list(_up_to_now(desk, plan.scope, {step.key: step for step in plan.steps}))
    unit = desk.unit()
    for step in steps:
        if step.kept is None:
            unit.write(step.key, step.before)
    desk.apply(unit)
    return report(steps, changed=True)


def report(steps: list[UndoStep], *, changed: bool) -> dict[str, Any]:
    """Return what is undone and what is kept as JSON; keys that have the value from before anyway are neither."""
    undone = [step for step in steps if step.kept is None and not _equal(step.now, step.before)]
    return {
        "undone": [{"key": step.key, "from": _value(step.now), "to": _value(step.before)} for step in undone],
        "kept": [
            {"key": step.key, "why": step.kept, "agent": step.agent, "iteration": step.iteration}
            for step in steps
            if step.kept is not None
        ],
        "changed": changed and bool(undone),
    }


def _up_to_now(desk: Desk, scope: UndoScope, planned: dict[str, UndoStep]) -> Iterator[UndoStep]:
    """Yield the steps as they are with the changes that are not committed yet."""
    commit = desk.journal.commit
    units = {row.id: row for row in commit.ticks}
    fresh: dict[str, list[Change]] = {}
    for change in commit.changes:
        fresh.setdefault(change.key, []).append(change)
    blanked = {redaction.key for redaction in commit.redactions}
    for key in sorted({*planned, *fresh}):
        changes = fresh.get(key, [])
        held = [_holds(scope, change, units) for change in changes]
        if key not in planned and not any(held):
            continue
        step = _after(desk, key, planned.get(key), changes, held, units)
        if step.kept is None and step.before is not None and key in blanked:
            step = replace(step, kept=REDACTED_SINCE)
        yield step


def _after(
    desk: Desk,
    key: str,
    planned: UndoStep | None,
    changes: list[Change],
    held: list[bool],
    units: dict[int, TickRow],
) -> UndoStep:
    """Return what is to be done about a key, of whose newest changes those that are `held` are to be undone."""
    cell = desk.state.cells.get(key)
    now = None if cell is None else cell.text
    if all(held):
        if planned is None or planned.kept == CHANGED:  # what was committed stays, and what came after it goes
            if not changes:
                assert planned is not None
                return planned
            old = changes[0].old
            return UndoStep(key, now, None if old is None else old.text)
        return replace(planned, now=now, before=now if planned.kept else planned.before)
    place = len(held) - 1 - held[::-1].index(False)
    stays = changes[place]
    if place == len(held) - 1:
        unit = units[stays.tick_id]
        return UndoStep(key, now, now, CHANGED, _name_of(desk, unit.agent_id), unit.iteration)
    return UndoStep(key, now, None if stays.new is None else stays.new.text)


def _holds(scope: UndoScope, change: Change, units: dict[int, TickRow]) -> bool:
    unit = units[change.tick_id]
    return scope.holds(change.id, unit.agent_id, unit.iteration, unit.started_us)


def _name_of(desk: Desk, agent_id: int) -> str:
    names = (record.name for record in desk.roster.records.values() if record.id == agent_id)
    return next(names, "(outside)")


def _equal(one: str | None, other: str | None) -> bool:
    return one == other if one is None or other is None else same(one, other)


def _value(text: str | None) -> Any:
    return None if text is None else decode(text)
