"""The tasks of a database: which wait, which may start, which have ended and wait for their agent.

A task goes round like this; each arrow is a commit:

    submitted → running → done | failed | cancelled → applied
                  ↑ ↓
                waiting  (another attempt, later)

`reserve` marks at the end of an iteration what starts after its commit, and `committed` starts it. Attempts that
have ended are taken up by `collect`; their results are handed out by `next_result` only after the commit that holds
them. Everything that is not over is in memory; what is over and applied is only in the table.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from itertools import count
from typing import TYPE_CHECKING, Any

import orjson

from ael_store.clock import Clock
from ael_store.errors import InvalidTask
from ael_store.model.records import AttemptRecord, LimitUse, Resumed, TaskRecord
from ael_store.model.task import Submission, Task
from ael_store.model.unit import Unit
from ael_store.model.values import DEFAULT_LIMITS, Limits
from ael_store.runtime.agent import overrides
from ael_store.runtime.journal import CHAIN_ENDS_US, Journal
from ael_store.runtime.roster import AgentSlot, Roster

if TYPE_CHECKING:  # made when there are tasks: a loop without any goes without their memory
    from ael_store.runtime.attempt import Attempts, Ending, Running
    from ael_store.runtime.limits import Block, Limit
    from ael_store.runtime.task_function import TaskFunction
    from ael_store.settings import Settings

__all__ = ["NO_USE", "TaskBoard"]

COPY_POSITION = "tasks_held_us"
"""Name of the row in `positions` that says for which copy of the database its tasks were held."""

MISSING = "its function can't be found: "
"""How the reason begins for which a task is held until the code is back."""

MOST_INTERRUPTIONS = 20
"""How often in a row the process may die while a task runs, before a person has to look."""
FREE_INTERRUPTIONS = 3
"""So many of them are followed by another attempt at once."""

LONGEST_BACKOFF_S = 300
FIRST_RETRY_S = 1.0
"""How long a result waits after a failed `on_task`; twice as long each time."""

REPORTS_ALL = ("done", "failed", "postponed")
"""Outcomes of attempts that came to their end, and so have said what they cost."""

ERROR_LENGTH = 500
NO_USE = LimitUse((), 0, "0", "0")

log = logging.getLogger("ael_store.tasks")


class TaskBoard:
    """All tasks that are not over or not applied. Belongs to the loop's task."""

    def __init__(
        self,
        journal: Journal,
        settings: Settings,
        roster: Roster,
        clock: Clock,
        resumed: Resumed,
        sizes: Limits = DEFAULT_LIMITS,
        *,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self.journal = journal
        self.settings = settings
        self.roster = roster
        self.clock = clock
        self.sizes = sizes
        self.wake = wake
        """Has the loop look for what is due; None in a command that works without one: nothing is started."""
        self.fakes: dict[str, Any] = {}
        """Answers in place of functions, by name: for tests."""
        self._attempts: Attempts | None = None
        self.live: dict[int, TaskRecord] = {}
        self.limits: dict[str, Limit] = {}
        self._known_limits = resumed.limits
        self._keys: dict[str, int] = {}
        self._lanes: dict[str, list[tuple[int, int, int]]] = {}
        """Tasks that may start, by limit, those without one under "": heaps of (-priority, place, number)."""
        self._places = count()
        self._later: list[tuple[int, int]] = []
        """Tasks whose time is to come, and questions: a heap of (instant, number)."""
        self._waiting_for_agent: dict[int, list[int]] = {}
        self._counted: set[int] = set()
        """Tasks of this run that wait for a length of time and not for a time."""
        self._blocks: dict[str, Block] = {}
        self._to_start: list[Running] = []
        self._ended: deque[Running] = deque()
        self._fresh: list[int] = []
        """Results that the next commit makes durable."""
        self._results: dict[int, deque[int]] = {}
        """Results to be taken up, by agent."""
        self._later_results: list[tuple[int, int]] = []
        self.applying: set[int] = set()
        """Results that are being taken up."""
        self._answers: dict[int, dict[str, Any]] = {}
        """Replies to commands that submitted a task, until it is known whether its key was known already."""
        self._random = random.Random(journal.token)
        journal.on_submit = self.submit
        self._take_up(resumed)

    # -- what is there at a start --

    def _take_up(self, resumed: Resumed) -> None:
        """Go on with what the database has; what ran when it was last written was interrupted."""
        now_us = self.clock.now_us()
        for attempt in resumed.attempts:
            attempt.outcome, attempt.ended_us = "interrupted", now_us
            self.journal.commit.attempts[attempt.id] = attempt
        copy = resumed.copy
        if copy is not None and resumed.positions.get(COPY_POSITION) == str(copy.at_us):
            copy = None  # they were held then
        if copy is not None:
            self.journal.commit.positions[COPY_POSITION] = str(copy.at_us)
        for task in resumed.tasks:
            self.live[task.id] = task
            self._keys[task.key] = task.id
            if task.status == "running":
                self._interrupted(task, now_us)
            elif self.wake is not None and task.status == "held" and (task.held or "").startswith(MISSING):
                self.wait(task)  # the code may be back
            if copy is not None and not task.is_over:
                self.hold(task, f"this database is a copy of {copy.source}; `ael tasks release --all` lets them go on")
            self.place(task, now_us)

    def _interrupted(self, task: TaskRecord, now_us: int) -> None:
        """The process died while it ran: it runs again, with the same key."""
        task.interruptions += 1
        if task.interruptions >= MOST_INTERRUPTIONS:
            self.hold(task, f"the process died {task.interruptions} times in a row while it ran")
            return
        pause_s = 0 if task.interruptions <= FREE_INTERRUPTIONS else 2 ** (task.interruptions - FREE_INTERRUPTIONS - 1)
        self.wait(task, now_us + min(LONGEST_BACKOFF_S, pause_s) * 1_000_000 if pause_s else None)

    def limit_names(self) -> list[str]:
        """Return the limits whose use has to be known before anything starts."""
        names = {*self.settings.limits, *self._known_limits}
        return sorted(names | {task.limit_name for task in self.live.values() if task.limit_name is not None})

    def open_limits(self, uses: dict[str, LimitUse]) -> None:
        """Take up what was used of each limit; before anything starts."""
        for name, use in uses.items():
            self._open_limit(name, use)

    def _open_limit(self, name: str, use: LimitUse = NO_USE) -> Limit:
        from ael_store.runtime.limits import Limit

        known = self._known_limits.get(name)
        if known is not None and self.wake is None:  # without a loop nobody knows the settings: they stay as they are
            limit, changed = Limit(known, 0, use), False
        else:
            limit, changed = Limit.of(name, known, self.settings.limits.get(name), use, self.clock.now_us())
        self.limits[name] = limit
        if changed:
            self.journal.commit.limits[name] = limit.record
        return limit

    # -- keeping records --

    def place(self, task: TaskRecord, now_us: int) -> None:
        """Put a task where it is found when its turn comes."""
        if task.is_over:
            if task.held is None:
                self._results.setdefault(task.agent_id, deque()).append(task.id)
        elif task.status == "waiting":
            if task.next_us is not None and (task.next_us > now_us or task.kind == "question"):
                heapq.heappush(self._later, (task.next_us, task.id))
            elif task.kind == "function":
                self._line_up(task)

    def _line_up(self, task: TaskRecord) -> None:
        """Put a task behind those of its limit and priority: one that failed lets the others go first."""
        lane = self._lanes.setdefault(task.limit_name or "", [])
        heapq.heappush(lane, (-task.priority, next(self._places), task.id))

    def changed(self, task: TaskRecord) -> None:
        """Have a task written with the next commit."""
        if task.id not in self.journal.commit.new_tasks:
            self.journal.commit.tasks[task.id] = task

    def wait(self, task: TaskRecord, until_us: int | None = None) -> None:
        task.status, task.held, task.next_us = "waiting", None, until_us
        if until_us is not None:
            self._counted.add(task.id)
        self.changed(task)

    def hold(self, task: TaskRecord, why: str) -> None:
        task.status, task.held = "held", why
        self.changed(task)

    def finish(self, task: TaskRecord, status: str, now_us: int) -> None:
        """It is over; its result is taken up after the commit that holds it."""
        task.status, task.ended_us, task.held = status, now_us, None
        self.changed(task)
        self._fresh.append(task.id)

    def forget(self, task: TaskRecord) -> None:
        """Nothing is left to do: from now on it is only in the table."""
        self.live.pop(task.id, None)
        self._keys.pop(task.key, None)
        self._counted.discard(task.id)

    def revive(self, task: TaskRecord) -> None:
        """Have a task that is over run again from the beginning."""
        task.applied_us = task.applied_tick_id = task.ended_us = None
        task.failures = task.interruptions = task.apply_attempts = 0
        self.live[task.id] = task
        self._keys[task.key] = task.id
        self.wait(task)

    # -- submitting --

    def submit(self, submission: Submission, unit: Unit, tick_id: int) -> None:
        """Take up a task of a unit that is being applied; it starts after the commit.

        One whose key a live task has is not taken up; whether an older one has it, the commit says.
        """
        task = submission.record
        known = self._keys.get(task.key)
        if known is not None:
            self._told_known(task, known)
            return
        self.journal.task_id += 1
        agent = None if submission.agent is None else self.roster.records.get(submission.agent)
        task.id = self.journal.task_id
        task.agent_id = 0 if agent is None else agent.id
        task.created_us, task.tick_id = unit.now_us, tick_id
        delay_us = (task.next_us or 0) - unit.now_us
        task.hops = unit.hops if delay_us < CHAIN_ENDS_US or task.kind == "question" else None
        self.live[task.id] = task
        self._keys[task.key] = task.id
        self.journal.commit.new_tasks[task.id] = task
        if task.next_us is not None and submission.is_counted:
            self._counted.add(task.id)
        limit = self.settings.hop_limit
        if limit and (task.hops or 0) > limit:
            task.status = "held"
            task.held = f"{task.hops} handlers led to it, one after another (hop_limit = {limit})"
            log.warning("task %d (%s) is held: %s", task.id, task.name, task.held)
        self.place(task, self.clock.now_us())

    def answer_with(self, task: Task, answer: dict[str, Any]) -> None:
        """Have an answer corrected where the commit finds that the task's key was known."""
        if task.id is not None:
            self._answers[task.id] = answer

    def _told_known(self, task: TaskRecord, known: int) -> None:
        """Its key is that of another task: what the hook got stands for that one."""
        answer = self._answers.get(task.id)
        task.id = known
        log.info("task %s: the key %r is that of task %d, which stays as it is", task.name, task.key, known)
        if answer is not None:
            answer.update(id=known, new=False)

    # -- starting --

    def reserve(self, now_us: int) -> None:
        """Mark what starts after the next commit: what is due, whose agent is there, and what its limit allows."""
        self._wake(now_us)
        if not self._lanes and not self._blocks:
            return
        blocks: dict[str, Block] = {}
        room = self.settings.tasks_at_once - len(self.running) - len(self._to_start)
        if room <= 0:
            return
        while room > 0:
            lanes = [lane for lane in list(self._lanes) if lane not in blocks and self._head(lane, now_us) is not None]
            if not lanes:
                break
            lane = min(lanes, key=lambda name: self._lanes[name][0])
            task = self.live[self._lanes[lane][0][2]]
            function = self._function_of(task)
            if function is None:
                heapq.heappop(self._lanes[lane])
                continue
            if (
                not lane and function.policy.limit is not None
            ):  # it was submitted by name, where nobody knew the function
                task.limit_name = function.policy.limit
                self.changed(task)
                heapq.heappop(self._lanes[lane])
                self.place(task, now_us)
                continue
            limit = self.limit(lane) if lane else None
            estimate = Decimal(0)
            if limit is not None:
                estimate = limit.estimate(function.policy.max_usd)
                block = limit.block(estimate, now_us)
                if block is not None:
                    blocks[lane] = block
                    continue
            heapq.heappop(self._lanes[lane])
            self._begin(task, function, limit, estimate, now_us)
            room -= 1
        self._blocks = blocks
        for name, limit in self.limits.items():
            if limit.show(blocks.get(name), now_us):
                self.journal.commit.limits[name] = limit.record

    def limit(self, name: str) -> Limit:
        """Return a limit; one that no setting knows bounds nothing, and is reported."""
        return self.limits.get(name) or self._open_limit(name)

    def _head(self, lane: str, now_us: int) -> TaskRecord | None:
        """Return the task of a lane whose turn is next; lanes that have none are dropped."""
        heap = self._lanes[lane]
        if lane in self.limits and self.limits[lane].is_probing(now_us):
            self._let_fresh_first(heap, now_us)
        while heap:
            task = self.live.get(heap[0][2])
            if task is None or task.status != "waiting" or (task.next_us or 0) > now_us:
                heapq.heappop(heap)  # cancelled, held or put off since
                continue
            slot = self._slot_of(task)
            if task.agent_id and (slot is None or slot.away() is not None):
                self._waiting_for_agent.setdefault(task.agent_id, []).append(heapq.heappop(heap)[2])
                continue
            return task
        del self._lanes[lane]
        return None

    def _let_fresh_first(self, heap: list[tuple[int, int, int]], now_us: int) -> None:
        """Whether a provider is back is for a task to say that has not failed yet: others may fail for ever."""
        for place, (priority, _, number) in enumerate(heap):
            task = self.live.get(number)
            if task is not None and task.attempts == 0 and task.status == "waiting" and (task.next_us or 0) <= now_us:
                heap[place] = (min(priority, heap[0][0]), -next(self._places), number)
                heapq.heapify(heap)
                return

    def _slot_of(self, task: TaskRecord) -> AgentSlot | None:
        return self.roster.slot_of(task.agent_id)

    def _function_of(self, task: TaskRecord) -> TaskFunction | None:
        """Return the function of a task; where there is none, the task is held until the code is back."""
        from ael_store.runtime.task_function import PLAIN, TaskFunction, find_function

        slot = self._slot_of(task)
        try:
            return find_function(task.name, None if slot is None else slot.agent)
        except InvalidTask as error:
            if self.attempts.has_fake(task.name):
                return TaskFunction(lambda *_: None, PLAIN, None, None)
            self.hold(task, f"{MISSING}{error}")
            log.error("task %d (%s) is held, %s%s", task.id, task.name, MISSING, error)
            return None

    def _begin(
        self, task: TaskRecord, function: TaskFunction, limit: Limit | None, estimate: Decimal, now_us: int
    ) -> None:
        self.journal.attempt_id += 1
        task.status, task.started_us, task.next_us = "running", now_us, None
        task.attempts += 1
        self._counted.discard(task.id)
        self.changed(task)
        record = AttemptRecord(
            id=self.journal.attempt_id,
            task_id=task.id,
            number=task.attempts,
            run_id=self.journal.run_id,
            limit_name=task.limit_name,
            outcome="running",
            started_us=now_us,
            ended_us=None,
            reserved_usd=f"{estimate:f}" if estimate else None,
            cost_usd=None,
            error=None,
            traceback=None,
        )
        self.journal.commit.attempts[record.id] = record
        timeout_s = self.settings.task_timeout if function.policy.timeout is None else function.policy.timeout
        slot = self._slot_of(task)
        from ael_store.runtime.attempt import Attempt, Running
        from ael_store.runtime.task_function import find_function

        handle = Attempt(task, task.attempts)
        handle.resolve = lambda name: find_function(name, None if slot is None else slot.agent)
        running = Running(task, record, function, timeout_s, estimate, handle, orjson.loads(task.args))
        self._to_start.append(running)
        if limit is not None:
            limit.begin(estimate, now_us)

    def committed(self, known_keys: dict[int, int]) -> None:
        """The commit is durable: what it reserved starts, and results that it holds can be taken up."""
        for number, known in known_keys.items():
            task = self.live.get(number)
            if task is not None:
                self.forget(task)
                self._told_known(task, known)
        self._answers.clear()
        starting, self._to_start = self._to_start, []
        for running in starting:
            if running.record.task_id in known_keys:
                if running.task.limit_name is not None:
                    self.limits[running.task.limit_name].withdraw(running.reserved)
                continue
            self.attempts.start(running)
        fresh, self._fresh = self._fresh, []
        for number in fresh:
            finished = self.live.get(number)
            if finished is not None and finished.is_over and finished.applied_us is None:
                self._results.setdefault(finished.agent_id, deque()).append(number)

    @property
    def attempts(self) -> Attempts:
        """What runs the functions; made when it is first needed, as many loops have no tasks."""
        if self._attempts is None:
            from ael_store.runtime.attempt import Attempts

            self._attempts = Attempts(self.sizes, self.clock.now_us, self.fakes, self._when_ended, self._when_freed)
        return self._attempts

    def starting(self, task: TaskRecord) -> Running | None:
        """Return the attempt of a task that begins with the next commit; None where there is none."""
        return next((running for running in self._to_start if running.task is task), None)

    @property
    def running(self) -> dict[int, Running]:
        """The attempts that run, by task."""
        return {} if self._attempts is None else self._attempts.running

    def interrupt(self) -> list[Running]:
        """Have every attempt end, because the loop does; returns those that ran."""
        return [] if self._attempts is None else self._attempts.interrupt()

    async def close(self) -> None:
        """End threads and processes of attempts, as far as they end."""
        if self._attempts is not None:
            await self._attempts.close()

    # -- ending --

    def _when_ended(self, running: Running) -> None:
        self._ended.append(running)
        self._wake_loop()

    def _when_freed(self, running: Running) -> None:
        self._free(running)
        self._wake_loop()

    def _free(self, running: Running) -> None:
        """Give its room in the limit back, once its end is taken up and its code does not run any more."""
        if running.is_settled and not running.still_runs and not running.is_free:
            running.is_free = True
            if running.record.limit_name is not None:
                self.limits[running.record.limit_name].free()

    def _wake_loop(self) -> None:
        if self.wake is not None:
            self.wake()

    def collect(self) -> int:
        """Take up the attempts that have ended, in the order in which they began; returns how many."""
        ended = sorted(self._ended, key=lambda running: running.record.id)
        self._ended.clear()
        for running in ended:
            assert running.ending is not None
            self._settle(running, running.ending, self.clock.now_us())
        return len(ended)

    def _settle(self, running: Running, ending: Ending, now_us: int) -> None:
        task, attempt, failure = running.task, running.record, ending.failure
        cost = running.handle._cost
        if cost is None and ending.outcome in REPORTS_ALL:
            cost = Decimal(0)
        attempt.outcome, attempt.ended_us = ending.outcome, now_us
        attempt.cost_usd = None if cost is None else f"{cost:f}"
        if failure is not None:
            attempt.error, attempt.traceback = str(failure)[:ERROR_LENGTH], failure.traceback or None
            task.error = attempt.error
        self.journal.commit.attempts[attempt.id] = attempt
        if cost:
            task.cost_usd = f"{Decimal(task.cost_usd or 0) + cost:f}"
        running.is_settled = True
        counts = self._judge(running, ending, cost, now_us)
        self._free(running)
        if ending.outcome != "interrupted":
            task.interruptions = 0
        if ending.outcome == "done":
            task.result, task.error = ending.result, None
            self.finish(task, "done", now_us)
        elif ending.outcome == "cancelled" or running.is_cancelled:
            self.finish(task, "cancelled", now_us)
        elif ending.outcome in ("failed", "timeout"):
            self._failed(running, ending, counts, now_us)
        else:
            self.wait(task, ending.retry_us)
            self.place(task, now_us)

    def _judge(self, running: Running, ending: Ending, cost: Decimal | None, now_us: int) -> bool:
        """Tell the limit what came of an attempt; False where an error is the provider's and counts for nothing."""
        name = running.record.limit_name
        if name is None:
            return True
        limit = self.limits[name]
        if ending.outcome not in REPORTS_ALL:  # what it has not said itself may have been spent all the same
            cost = max(cost or Decimal(0), running.reserved)
        limit.end(running.reserved, cost)
        before = (limit.record.opened, limit.record.held_until_us)
        good = {"done": True, "failed": False if not ending.is_final else None, "timeout": False}.get(ending.outcome)
        counts = not limit.judge(running.task.id, good, str(ending.failure), now_us)
        if ending.outcome == "postponed" and ending.retry_us is not None:
            limit.hold(ending.retry_us, str(ending.failure))
        if before != (limit.record.opened, limit.record.held_until_us):
            self.journal.commit.limits[name] = limit.record
        return counts

    def _failed(self, running: Running, ending: Ending, counts: bool, now_us: int) -> None:
        task, policy = running.task, running.function.policy
        most = self.settings.task_attempts if policy.attempts is None else policy.attempts
        task.failures += counts
        if ending.is_final or task.failures >= most:
            log.warning("task %d (%s) has failed: %s", task.id, task.name, ending.failure)
            self.finish(task, "failed", now_us)
            return
        pause_s = policy.backoff
        if (
            not counts and task.limit_name is not None
        ):  # the limit waits; then another task is to say whether it is back
            held_us = self.limits[task.limit_name].record.held_until_us or now_us
            pause_s += max(0, held_us - now_us) / 1e6
        elif counts:
            longest_s = min(LONGEST_BACKOFF_S, policy.backoff * 2 ** (task.failures - 1))
            pause_s = longest_s * (0.5 + self._random.random() / 2)
        log.info("task %d (%s) failed, next attempt in %.1f s: %s", task.id, task.name, pause_s, ending.failure)
        self.wait(task, now_us + round(pause_s * 1_000_000) if pause_s else None)
        self.place(task, now_us)

    # -- what is due --

    def _wake(self, now_us: int) -> None:
        """Let the time pass for what waits for it, and for those whose agent is back."""
        while self._later and self._later[0][0] <= now_us:
            due_us, number = heapq.heappop(self._later)
            task = self.live.get(number)
            if task is None or task.status != "waiting" or task.next_us != due_us:
                continue
            if task.kind == "question":
                self._time_is_over(task, now_us)
            else:
                self._line_up(task)
        for agent_id, numbers in list(self._waiting_for_agent.items()):
            slot = self.roster.slot_of(agent_id)
            if slot is not None and slot.away() is None:
                del self._waiting_for_agent[agent_id]
                for number in numbers:
                    if number in self.live:
                        self.place(self.live[number], now_us)
        while self._later_results and self._later_results[0][0] <= now_us:
            _, number = heapq.heappop(self._later_results)
            task = self.live.get(number)
            if task is not None and task.is_over and task.held is None:
                self._results.setdefault(task.agent_id, deque()).append(number)

    def pending_now(self, now_us: int) -> bool:
        """True where something can be done at once; what starts by itself is found at the end of each iteration."""
        return (
            bool(self._ended or self._fresh)
            or (bool(self._later) and self._later[0][0] <= now_us)
            or (bool(self._later_results) and self._later_results[0][0] <= now_us)
            or self._ready_agent(now_us) is not None
            or any(block.until_us is not None and block.until_us <= now_us for block in self._blocks.values())
        )

    def next_us(self, now_us: int) -> int | None:
        """Return the next instant at which something will be due by itself."""
        times = [heap[0][0] for heap in (self._later, self._later_results) if heap]
        times += [block.until_us for block in self._blocks.values() if block.until_us is not None]
        return min(times, default=None)

    @property
    def has_ended(self) -> bool:
        """True where attempts have ended that are not taken up."""
        return bool(self._ended)

    def jumped(self, by_us: int) -> None:
        """The wall clock was set: what waits for a length of time waits as long as it would have."""
        for limit in self.limits.values():
            limit.jumped(by_us)
        self._blocks = {name: block.moved(by_us) for name, block in self._blocks.items()}
        moved = {number for number in self._counted if number in self.live}
        for number in moved:
            task = self.live[number]
            if task.next_us is not None:
                task.next_us += by_us
                self.changed(task)
        self._later = [(at + by_us if number in moved else at, number) for at, number in self._later]
        self._later_results = [(at + by_us, number) for at, number in self._later_results]
        heapq.heapify(self._later)
        heapq.heapify(self._later_results)

    # -- taking results up --

    def next_result(self, now_us: int) -> tuple[TaskRecord, AgentSlot | None] | None:
        """Return a result that can be taken up, with the agent whose `on_task` gets it; None of both where none is."""
        task: TaskRecord | None = None
        while task is None or not task.is_over:  # one that is not was made to run again meanwhile
            agent_id = self._ready_agent(now_us)
            if agent_id is None:
                return None
            numbers = self._results[agent_id]
            task = self.live.get(numbers.popleft())
            if not numbers:
                del self._results[agent_id]
        self.applying.add(task.id)
        slot = self._slot_of(task)
        return task, slot if slot is not None and overrides(slot.agent, "on_task") else None

    def _ready_agent(self, now_us: int) -> int | None:
        for agent_id in self._results:
            slot = self.roster.slot_of(agent_id)
            if agent_id == 0 or (slot is not None and slot.started and slot.ready(now_us)):
                return agent_id
        return None

    def applied(self, task: TaskRecord, tick_id: int, now_us: int) -> None:
        """Its result was taken up by a unit, in the same commit."""
        task.applied_us, task.applied_tick_id, task.apply_error = now_us, tick_id, None
        self.changed(task)
        self.forget(task)
        self.applying.discard(task.id)

    def not_applied(self, task: TaskRecord, unit: Unit, failed: bool) -> None:
        """`on_task` has not succeeded: the result is handed out again, at once after a conflict."""
        self.applying.discard(task.id)
        if not failed:
            self._results.setdefault(task.agent_id, deque()).appendleft(task.id)
            return
        task.apply_attempts += 1
        task.apply_error = str(unit.failure)[:ERROR_LENGTH]
        if task.apply_attempts >= self.settings.delivery_attempts:
            task.held = f"on_task failed {task.apply_attempts} times"
            log.error(
                "%s could not take up the result of task %d (%s) in %d attempts; `ael tasks retry %d` hands it out "
                "again: %s",
                *(unit.subject, task.id, task.name, task.apply_attempts, task.id, unit.failure),
            )
        else:
            pause_us = round(FIRST_RETRY_S * 2 ** (task.apply_attempts - 1) * 1_000_000)
            heapq.heappush(self._later_results, (unit.now_us + pause_us, task.id))
        self.changed(task)

    def abandon(self, agent_id: int) -> int:
        """An agent is forgotten: its tasks end, and nobody is told; returns how many."""
        found = [task for task in self.live.values() if task.agent_id == agent_id]
        now_us = self.clock.now_us()
        for task in found:
            if not task.is_over:
                self.finish(task, "cancelled", now_us)
            task.applied_us = now_us
            self.changed(task)
            self.forget(task)
        return len(found)

    def _time_is_over(self, task: TaskRecord, now_us: int) -> None:
        """Nobody has answered a question in its time."""
        default = orjson.loads(task.args)["default"]
        if default is not None:
            task.result = orjson.dumps(default).decode()
            self.finish(task, "done", now_us)
        else:
            task.error = "Timeout: nobody answered in time"
            self.finish(task, "failed", now_us)

    # -- looking --

    def progress(self) -> dict[str, dict[str, Any]]:
        """Return how far the attempts are that run, by task. From any thread."""
        found: dict[str, dict[str, Any]] = {}
        for number, attempt in dict(self.running).items():
            fraction, note = attempt.handle._progress or (None, "")
            found[str(number)] = {"fraction": fraction, "note": note, "attempt": attempt.record.number}
        return found
