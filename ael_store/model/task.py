"""Tasks as agents see them: what was submitted, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ael_store.clock import from_us
from ael_store.errors import InvalidTask
from ael_store.model.records import TaskRecord
from ael_store.model.values import decode, shown

__all__ = ["QUESTION", "STATUSES", "Submission", "Task", "TaskStatus", "check_task_text", "new_record"]

TaskStatus = Literal["waiting", "held", "running", "done", "failed", "cancelled"]

STATUSES: tuple[TaskStatus, ...] = ("waiting", "held", "running", "done", "failed", "cancelled")

QUESTION = "ask"
"""The name of tasks whose worker is a person."""


class Task:
    """A task: its name, key and arguments, and once it is over its result.

    What `context.submit` returns is one too: its `id` is None until the unit that submitted it has succeeded. Where
    its key was known already, the database keeps the earlier task, and its result comes once, from that one.
    """

    __slots__ = ("_record",)

    def __init__(self, record: TaskRecord) -> None:
        self._record = record

    @property
    def id(self) -> int | None:
        """Its number; None until the unit that submitted it has succeeded."""
        return self._record.id or None

    @property
    def key(self) -> str:
        """The same at every attempt: what makes a repeated call recognizable to whom it reaches."""
        return self._record.key

    @property
    def name(self) -> str:
        """The function: a method of the agent, a registered name, or `module:function`; `ask` for a question."""
        return self._record.name

    @property
    def args(self) -> list[Any]:
        """The arguments, in order; of a question none."""
        return [] if self.is_question else list(decode(self._record.args))

    @property
    def status(self) -> TaskStatus:
        """`waiting`, `held`, `running`, `done`, `failed` or `cancelled`."""
        return self._record.status  # type: ignore[return-value]

    @property
    def result(self) -> Any:
        """What the function returned, or the answer to a question; None unless it is `done`."""
        return None if self._record.result is None else decode(self._record.result)

    @property
    def error(self) -> str | None:
        """Type and message of what its last attempt raised; None where it has not."""
        return self._record.error

    @property
    def attempts(self) -> int:
        """How many attempts were started."""
        return self._record.attempts

    @property
    def cost_usd(self) -> float:
        """What its attempts said they cost, together."""
        return float(self._record.cost_usd or 0)

    @property
    def priority(self) -> int:
        """0 to 10, higher first."""
        return self._record.priority

    @property
    def limit(self) -> str | None:
        """The limit it counts against."""
        return self._record.limit_name

    @property
    def next_at(self) -> datetime | None:
        """Not started before, in UTC; of a question, when it ends by itself. None where nothing is said."""
        return None if self._record.next_us is None else from_us(self._record.next_us)

    @property
    def created_at(self) -> datetime:
        """When it was submitted, in UTC."""
        return from_us(self._record.created_us)

    @property
    def ended_at(self) -> datetime | None:
        """When it ended, in UTC; None before."""
        return None if self._record.ended_us is None else from_us(self._record.ended_us)

    # -- questions --

    @property
    def is_question(self) -> bool:
        """True where its worker is a person."""
        return self._record.kind == "question"

    @property
    def question(self) -> str | None:
        """What was asked; None where it is no question."""
        return self._record.question

    @property
    def data(self) -> Any:
        """What was shown with the question; a copy."""
        return self._asked["data"] if self.is_question else None

    @property
    def choices(self) -> list[str] | None:
        """The answers that were offered; None where any text was."""
        return self._asked["choices"] if self.is_question else None

    @property
    def answered_by(self) -> str | None:
        """Who answered the question; None where nobody did, so that the result is the default."""
        return self._record.answered_by

    @property
    def _asked(self) -> dict[str, Any]:
        return dict(decode(self._record.args))

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.name!r} {self.status} key={self.key!r}>"


@dataclass(slots=True)
class Submission:
    """A task that a unit wants to submit, checked and encoded."""

    task: Task
    """What the hook got."""
    agent: str | None
    """The agent that gets the result; None for nobody."""
    is_counted: bool = True
    """True where `next_us` is after a length of time, which passes whatever the wall clock says."""

    @property
    def record(self) -> TaskRecord:
        """The row that it becomes; what only the loop knows is filled in when the unit is applied."""
        return self.task._record


def check_task_text(text: object, what: str) -> str:
    """Return a key, or the name of a limit, that can stand in the table; raises InvalidTask."""
    if type(text) is not str or not text or not text.isprintable() or len(text) > 200:
        raise InvalidTask(f"{what} is {shown(text)}, wanted are 1 to 200 printable characters")
    return text


def new_record(
    *,
    name: str,
    key: str,
    args: str,
    priority: int = 5,
    limit_name: str | None = None,
    due_us: int | None = None,
    kind: str = "function",
    question: str | None = None,
    now_us: int = 0,
) -> TaskRecord:
    """Return a task that waits, with no number and of nobody yet."""
    return TaskRecord(
        id=0,
        agent_id=0,
        name=name,
        key=key,
        status="waiting",
        attempts=0,
        priority=priority,
        limit_name=limit_name,
        args=args,
        result=None,
        error=None,
        cost_usd=None,
        created_us=now_us,
        next_us=due_us,
        started_us=None,
        ended_us=None,
        tick_id=0,
        kind=kind,
        question=question,
        failures=0,
        interruptions=0,
        held=None,
        hops=None,
        answered_by=None,
        applied_us=None,
        applied_tick_id=None,
        apply_attempts=0,
        apply_error=None,
    )
