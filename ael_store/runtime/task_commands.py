"""What operators and other processes do with tasks and limits: one function for each command."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from ael_store.clock import iso
from ael_store.errors import InvalidTask, TaskNotFound, UsageError
from ael_store.model.duration import due_us
from ael_store.model.records import TaskRecord
from ael_store.model.task import Submission, Task, check_task_text, new_record
from ael_store.model.values import encode
from ael_store.runtime.limits import BOUNDS, Limit
from ael_store.runtime.task_function import find_function, reference_of
from ael_store.settings import TaskLimit

if TYPE_CHECKING:
    from ael_store.runtime.commands import Desk

__all__ = ["TASK_COMMANDS"]


def _submit(
    desk: Desk,
    name: str,
    args: list[Any] | None = None,
    agent: str | None = None,
    key: str | None = None,
    after: float | str | None = None,
    at: str | None = None,
    priority: int = 5,
    limit: str | None = None,
) -> dict[str, Any]:
    reference_of(name)
    if type(args) not in (list, type(None)):
        raise InvalidTask(f"args is {args!r}, wanted is a list")
    if type(priority) is not int or not 0 <= priority <= 10:
        raise InvalidTask(f"priority is {priority!r}, wanted is a whole number from 0 to 10")
    slot = None
    if agent is not None:
        record = desk.roster.known(agent)
        slot = desk.roster.slots.get(agent)
        agent = record.name
    if desk.running and (agent is None or slot is not None):  # else it is looked up when the agent is there
        policy = find_function(name, None if slot is None else slot.agent).policy
        limit = limit or policy.limit
    unit = desk.unit()
    now_us = unit.now_us
    when = after if at is None else _moment(at)
    made = new_record(
        name=name,
        key=check_task_text(key or f"outside/{now_us:x}-{unit.seed:x}", "the key of a task"),
        args=encode(list(args or ()), f"the arguments of task {name!r}", desk.limits),
        priority=priority,
        limit_name=None if limit is None else check_task_text(limit, "the limit of a task"),
        due_us=None if when is None else due_us(when, now_us),
        now_us=now_us,
    )
    before = desk.journal.task_id
    task = Task(made)
    unit.submit(Submission(task, agent, at is None))
    desk.apply(unit)
    answer = {"id": task.id, "key": made.key, "new": desk.journal.task_id > before}
    desk.tasks.answer_with(task, answer)
    return answer


def _moment(at: str) -> datetime:
    try:
        return datetime.fromisoformat(at)
    except (ValueError, TypeError):
        raise InvalidTask(f"{at!r} is no time: write one like 2026-01-31T12:00:00+00:00") from None


def _known(desk: Desk, id: int) -> TaskRecord:
    """Return a task, also one that is only in the table."""
    if type(id) is not int:
        raise UsageError(f"task is {id!r}, wanted is its number; `ael tasks list` shows it")
    task = desk.tasks.live.get(id) or desk.find_task(id)
    if task is None:
        raise TaskNotFound(f"there is no task {id}; `ael tasks list` shows those that there are")
    return task


def _cancel(desk: Desk, id: int) -> dict[str, Any]:
    board, task = desk.tasks, _known(desk, id)
    before, changed = task.status, not task.is_over
    if id in board.running:
        board.attempts.cancel(board.running[id])
    elif (starting := board.starting(task)) is not None:
        starting.is_cancelled = True  # its start is in this commit: it ends as soon as it has begun
    elif changed:
        board.finish(task, "cancelled", desk.clock.now_us())
    return {"id": id, "changed": changed, "status": before}


def _retry(desk: Desk, id: int) -> dict[str, Any]:
    board, task = desk.tasks, _known(desk, id)
    if task.status == "held":
        _let_go(desk, task)
        what = "it goes on"
    elif task.status == "waiting" and task.kind == "function" and task.next_us is not None:
        board.wait(task)
        what = "it is tried at once"
    elif task.status in ("waiting", "running"):
        raise UsageError(f"task {id} is {task.status}: there is nothing to try again yet")
    elif task.applied_us is None and task.held is not None:
        task.held, task.apply_attempts = None, 0
        board.changed(task)
        what = "its result is handed out again"
    elif id in board.applying:
        raise UsageError(f"task {id} has just ended, and its agent is being told: try again in a moment")
    elif task.status == "done" or task.kind == "question":
        raise UsageError(f"task {id} is {task.status}, and an end of that kind stands: submit it with another key")
    else:
        board.revive(task)
        what = "it runs again"
    board.place(task, desk.clock.now_us())
    return {"id": id, "what": what}


def _let_go(desk: Desk, task: TaskRecord) -> bool:
    """Let a task that is held go on; True where it was."""
    if task.status != "held":
        return False
    task.interruptions, task.hops = 0, None
    desk.tasks.wait(task, task.next_us if task.kind == "question" else None)
    return True


def _release(desk: Desk, id: int | None = None, all: bool = False) -> dict[str, Any]:
    if (id is None) == (not all):
        raise UsageError("name a task, or say all of them; `ael tasks list --status held` shows them")
    wanted = list(desk.tasks.live.values()) if id is None else [_known(desk, id)]
    released = [task.id for task in wanted if _let_go(desk, task)]
    for number in released:
        desk.tasks.place(desk.tasks.live[number], desk.clock.now_us())
    return {"released": len(released), "ids": released[:100]}


def _answer(desk: Desk, id: int, choice: str, by: str | None = None) -> dict[str, Any]:
    task = _known(desk, id)
    if type(choice) is not str:
        raise UsageError(f"the answer is {choice!r}, wanted is a text")
    text, who = encode(choice, "an answer", desk.limits), check_task_text(by, "who answers")
    if task.kind != "question":
        raise UsageError(f"task {id} ({task.name}) is no question, so it can't be answered")
    if task.status == "held":
        raise UsageError(f"question {id} is held: {task.held}")
    if task.is_over:
        whose = f"by {task.answered_by}" if task.answered_by else "by itself, because its time was over"
        ended = "cancelled" if task.status == "cancelled" else f"answered {task.result or 'with nothing'} {whose}"
        raise UsageError(f"question {id} was {ended}, at {iso(task.ended_us or 0)}; an answer stands")
    choices = Task(task).choices
    if choices is not None and choice not in choices:
        raise UsageError(f"the answer to question {id} is {choice!r}; wanted is one of {', '.join(choices)}")
    task.result, task.answered_by = text, who
    desk.tasks.finish(task, "done", desk.clock.now_us())
    return {"id": id, "question": Task(task).question, "answer": choice, "by": by}


def _raise(desk: Desk, name: str, bounds: dict[str, Any] | None = None, reset: bool = False) -> dict[str, Any]:
    if reset == bool(bounds):
        raise UsageError("say what the limit is to be, or else that it is to be as its settings say")
    wanted = {}
    for bound, value in (bounds or {}).items():
        if bound not in BOUNDS:
            raise UsageError(f"a limit has no bound {bound!r}; there are {', '.join(BOUNDS)}")
        wanted[bound] = getattr(TaskLimit(**{bound: value}), bound)
    limit = _known_limit(desk, name)
    known = {**orjson.loads(limit.record.raised), **wanted}
    limit.record.raised = orjson.dumps({} if reset else known).decode()
    limit.take_bounds()
    desk.journal.commit.limits[name] = limit.record
    usd = limit.record.usd_per_day
    return {
        "name": name,
        **{bound: getattr(limit.record, bound) for bound in BOUNDS},
        "usd_per_day": None if usd is None else float(usd),
    }


def _known_limit(desk: Desk, name: str) -> Limit:
    """Return a limit that the settings, the database or a task names; raises UsageError."""
    names = desk.tasks.limit_names()
    if name not in names and name not in desk.tasks.limits:
        known = ", ".join(sorted({*names, *desk.tasks.limits})) or "none"
        raise UsageError(f"there is no limit {name!r}; known are {known}, and a table [limits.{name}] makes it one")
    return desk.tasks.limit(name)


def _release_limit(desk: Desk, name: str) -> bool:
    limit = _known_limit(desk, name)
    changed = limit.release()
    desk.journal.commit.limits[name] = limit.record
    return changed


TASK_COMMANDS: dict[str, Callable[..., Any]] = {
    "tasks.submit": _submit,
    "tasks.cancel": _cancel,
    "tasks.retry": _retry,
    "tasks.release": _release,
    "tasks.answer": _answer,
    "limits.raise": _raise,
    "limits.release": _release_limit,
}
