"""A real loop on a virtual clock: what takes days passes in seconds, and in the same way each time.

The harness runs an `AELController` over a real SQLite file. `advance` allows its clock to come so far; the loop then
goes from due time to due time by itself, and *parks* when nothing more is due. Before it parks it commits what
waits (idle iterations are committed late), so that SQL sees everything. Between calls of `advance` the loop is
parked, so a test looks at a still picture.

A crash ends the task of the loop where it stands, without a commit. A restart makes a new controller with manager,
bus, scheduler and store of its own, because a new process would have nothing but the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ael_store.clock import Bell
from ael_store.errors import AelError, InvalidSetting, LoopNotRunning, NotAllowedHere, UsageError
from ael_store.model.event import Event, compile_patterns
from ael_store.model.records import Resumed
from ael_store.model.values import decode
from ael_store.runtime.agent import AgentBase
from ael_store.runtime.attempt import Running
from ael_store.runtime.controller import AELController
from ael_store.runtime.current import current_unit
from ael_store.runtime.lifecycle import Lifecycle
from ael_store.runtime.manager import AgentManager
from ael_store.runtime.run import Parts, Run
from ael_store.settings import Settings
from ael_store.store.reader import Reader
from ael_store.store.sqlite import database_path
from ael_store.testing.routing import routed
from ael_store.testing.steady_workbench import SteadyWorkbench
from ael_store.testing.virtual_clock import START, Length, VirtualClock

__all__ = ["FailedUnit", "Harness"]

log = logging.getLogger("ael_store.testing")

ENDING_PATIENCE_S = 5.0
"""How much longer than the grace period, in real time, the end of a loop may take."""

GLANCE_S = 1.0
"""How often, in real time, a loop is looked at that does not park."""

LONGEST_INSTANT = 20_000
"""Iterations that a loop may go round while no time passes."""

ALL = 2**62

_DEFAULTS = Settings()

FAILED = """
    SELECT t.agent, t.kind, t.outcome, t.iteration, t.started_at, x.type, x.message, x.traceback
    FROM v_ticks t JOIN tick_errors x ON x.tick_id = t.id
    WHERE t.outcome <> 'conflict' ORDER BY t.id"""


@dataclass(frozen=True, slots=True)
class FailedUnit:
    """A hook that failed: which, when, and what it raised."""

    agent: str
    hook: str
    outcome: str
    """`error`, `timeout` or `cancelled`."""
    iteration: int
    at: datetime
    """Virtual time."""
    type: str
    """Class of the exception."""
    message: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.agent}.{self.hook} in iteration {self.iteration} at {self.at:%F %T}: {self.type}: {self.message}"


class Harness:
    """Agents in a loop of their own, on a clock that `advance` moves.

        async with Harness([Thermometer(), Fan()]) as h:
            await h.advance("3 days")
            assert h.state["temperature"] < 25

    Without `async with` the loop starts at the first `advance`; `await h.stop()` ends it. The first iteration is
    the one at the start, so one minute at a `tick_rate` of 1 s has 61. `store` is a temporary file that goes with
    this object, or a path; the other options are those of `AELController`. `seed` decides all randomness: the same
    agents and seed give the same rows.

    `tasks` answers durable tasks by name, in place of their functions: `{"think": fake}` calls `fake(task, *args)`,
    plain or async, and takes what it returns or raises; anything else is the result itself. What is not named there
    runs as it is. `answer` answers a question as a person would.

    Hooks and tasks take no virtual time. Tasks, and what runs in the background, are waited for before time goes on,
    up to `patience` seconds of real time. `slow_after` does not apply; `tick_timeout` does, in real time. Crashes are
    a tool of the test, so the loop does not start paused after several of them, unless `unclean_starts` is set to
    another number than its default.
    """

    def __init__(
        self,
        agents: Iterable[AgentBase],
        *,
        tick_rate: float | None = None,
        strategy: str | None = None,
        store: str | os.PathLike[str] = ":memory:",
        seed: int = 0,
        start: datetime | str = START,
        settings: Settings | None = None,
        max_agents: int | None = None,
        patience: float = 5.0,
        tasks: Mapping[str, Any] | None = None,
    ) -> None:
        self.clock: VirtualClock = _HarnessClock(self, start, seed)
        """The clock of the loop: `h.clock.jump("1h")` is a machine that was suspended for an hour."""
        self._options: dict[str, Any] = {
            "tick_rate": tick_rate,
            "strategy": strategy,
            "settings": _lenient(settings or Settings()),
            "max_agents": max_agents,
        }
        self._patience_s = patience
        self._fakes = dict(tasks or {})
        self._late: frozenset[Running] = frozenset()
        """Attempts at tasks that time goes on without."""
        self._files = _Files(store)
        weakref.finalize(self, self._files.close)
        self._agents = [_Pristine(agent) for agent in agents]
        self._controller = self._new_controller()
        if self._controller.settings.tick_rate == 0:
            raise InvalidSetting("tick_rate is 0 (back to back): no virtual time would ever pass; wanted are seconds")
        self._had_run = False
        """True where the controller had its run, so that the next one needs a new controller."""
        self._task: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()
        """Set when the database is open and the run begins; a new one for each start."""
        self._waiter: asyncio.Future[None] | None = None
        """Of the `advance` that waits until the loop parks."""
        self._stopping = False
        self._crashing = False
        self._down: Length = 0
        """How long a loop that a hook has crashed stays away."""
        self._ended_itself = False

    def _new_controller(self) -> AELController:
        manager = AgentManager()
        for pristine in self._agents:
            manager.register(pristine.agent)
        return _HarnessController(self, manager, store=self.path, durability="normal", **self._options)

    # -- starting and ending --

    async def __aenter__(self) -> Harness:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the loop; returns when every `on_start` and the first iteration are over. No time passes."""
        self._refuse_in_hook("start")
        self._check_task()
        if self._task is None:
            self._ended_itself = False
            controller = self._next_controller()
            self._had_run = True
            self._opened = asyncio.Event()
            self._task = asyncio.create_task(_live(controller), name="ael-harness")
            await self._until_parked()

    async def stop(self) -> None:
        """Stop the loop as SIGTERM would: every `on_shutdown` runs. The database can still be looked at.

        What does not end within the grace period, here in real time, is cut off as by a crash.
        """
        self._refuse_in_hook("stop")
        self._check_task()
        if self._task is None:
            return
        self._stopping = True
        task, patience_s = self._task, self._controller.settings.grace + ENDING_PATIENCE_S
        try:
            self._controller._request_stop()
            await asyncio.wait({task}, timeout=patience_s)
            if not task.done():
                await self._kill()
            self._check_task()  # an `advance` in another task may have noticed the end before
        finally:
            self._stopping = False
            self.clock._halt()

    async def restart(self, *, down: Length = 0, agents: Iterable[AgentBase] | None = None) -> None:
        """Stop the loop cleanly and start it again on the same database, `down` later.

        The new run has a new controller, and these agents; without any, the same objects with the attributes that
        they have by now.
        """
        await self.stop()
        self.clock.jump(down)
        self._next_agents(agents)
        await self.start()

    async def crash(self, *, down: Length = 0, agents: Iterable[AgentBase] | None = None) -> None:
        """End the loop as SIGKILL would: no hook runs, nothing is committed, the run stays marked `running`.

        The next `advance` starts a new run, `down` later, with a new controller and these agents (as `restart`).
        In a hook it ends the loop on the spot and never returns, so the `advance` of the test returns.
        """
        if self._in_hook():
            self._next_agents(agents)
            self._down, self._crashing = down, True
            assert self._controller._task is not None
            self._controller._task.cancel()
            await asyncio.get_running_loop().create_future()
        self._check_task()
        if self._task is not None:
            await self._kill()
            self._check_task()
        self.clock.jump(down)
        self._next_agents(agents)

    def _next_agents(self, agents: Iterable[AgentBase] | None) -> None:
        if agents is not None:
            self._agents = [_Pristine(agent) for agent in agents]

    async def _kill(self) -> None:
        """End the task of the loop where it stands."""
        task = self._task
        assert task is not None
        opened = asyncio.ensure_future(self._opened.wait())
        # While it opens the file, a thread would go on and keep the lock.
        await asyncio.wait({task, opened}, timeout=ENDING_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
        if task.done():
            return
        self._crashing = True
        life = self._controller._life
        hooks = [] if life is None else list(life.run.workbench.background.values())
        (self._controller._task or task).cancel()
        await asyncio.wait({task, *hooks}, timeout=ENDING_PATIENCE_S)
        if not task.done():
            raise AelError("the loop does not end; a hook blocks it")

    def _end(self) -> None:
        """The loop has ended: tell how, and raise what ended it, unless that was wanted."""
        task, self._task = self._task, None
        assert task is not None
        crashing, self._crashing = self._crashing, False
        down, self._down = self._down, 0
        self._ended_itself = False
        if crashing or task.cancelled():
            with contextlib.suppress(BaseException):
                task.result()  # else asyncio tells that nobody looked
            self.clock.jump(down)
            return
        error = task.exception()
        if error is not None:
            raise error
        self._ended_itself = not self._stopping

    def _check_task(self) -> None:
        """Notice a loop that ended since the last call, by itself or with its event loop."""
        task = self._task
        if task is not None and task.done():
            self._end()
        elif task is not None and task.get_loop() is not asyncio.get_running_loop():
            raise UsageError("this harness runs in another event loop; use it in the one that started it")

    def _in_hook(self) -> bool:
        unit = current_unit.get()
        return unit is not None and not unit.closed and self._controller._host.owns(unit)

    def _refuse_in_hook(self, what: str) -> None:
        if self._in_hook():
            raise NotAllowedHere(f"`{what}` waits for the loop, so a hook can't call it; of a harness it may `crash`")

    # -- time --

    async def advance(self, duration: Length = 0) -> None:
        """Let virtual time pass (seconds, `"3 days"`, a timedelta, or a time) and everything that is due happen.

        Returns when that much time has passed, and all that was due up to then, the end included, is done and
        committed. With 0, what is due now. Starts the loop where it does not run. Raises what ended the loop, if an
        error did; AelError where agents keep each other busy so that no time passes.
        """
        self._refuse_in_hook("advance")
        if self._waiter is not None:
            raise UsageError("`advance` is under way already, in another task")
        target_us = self.clock._target_us(duration)
        self._check_task()
        if self._task is None:
            if self._ended_itself:
                raise LoopNotRunning("a hook has stopped the loop; `await h.restart()` starts it again")
            await self.start()
        try:
            if self._task is not None:
                self.clock._allow(target_us)
                await self._until_parked()
        except BaseException:
            self.clock._halt()
            raise
        if self._task is None:  # it ended on the way; time passes all the same
            self.clock._passed_us = max(self.clock._passed_us, target_us)

    async def _until_parked(self) -> None:
        task = self._task
        assert task is not None
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        try:
            place = self._place()
            while True:
                await asyncio.wait({task, waiter}, timeout=GLANCE_S, return_when=asyncio.FIRST_COMPLETED)
                if task.done() or waiter.done():
                    break
                now = self._place()
                if now[0] != place[0]:
                    place = now
                elif now[1] > place[1] + LONGEST_INSTANT:
                    await self._kill()
                    self._check_task()
                    raise AelError(
                        f"more than {LONGEST_INSTANT} iterations at {self.now:%F %T} and no time passes: do agents "
                        "answer each other's events without end? The loop was ended"
                    )
        finally:
            self._waiter = None
        if task.done() and self._task is task:
            self._end()

    def _place(self) -> tuple[int, int]:
        life = self._controller._life
        return self.clock._passed_us, 0 if life is None else life.run.journal.iteration

    @property
    def now(self) -> datetime:
        """The virtual time, in UTC."""
        return self.clock.now

    # -- from outside --

    def emit(
        self, type: str, data: Any = None, metadata: Mapping[str, Any] | None = None, *, source: str = "outside"
    ) -> None:
        """Emit an event from outside; it happens at the next `advance`."""
        controller = self._next_controller()
        controller.event_bus.publish(Event(type, source, data, self.now, metadata))

    async def answer(self, choice: str, *, by: str = "somebody", task_id: int | None = None) -> None:
        """Answer a question, the oldest that is open unless `task_id` says another, and let what follows happen."""
        self._refuse_in_hook("answer")
        await self.advance(0)
        if task_id is None:
            found = self.sql("SELECT id FROM v_tasks WHERE name = 'ask' AND status = 'waiting' ORDER BY id LIMIT 1")
            if not found:
                raise UsageError("no question is open")
            task_id = found[0]["id"]
        reply = self._controller._host.request("tasks.answer", {"id": task_id, "choice": choice, "by": by}, "test")
        await self.advance(0)
        reply.result(timeout=0)

    def set(self, key: str, value: Any) -> None:
        """Set a key of the state from outside; it happens at the next `advance`, before the first start at once."""
        self._next_controller().state_context.set(key, value)

    @property
    def controller(self) -> AELController:
        """The controller of the run; a restart and a crash make a new one."""
        return self._controller

    def _next_controller(self) -> AELController:
        """Return the controller that runs or will run next."""
        if self._task is None and self._had_run:
            for pristine in self._agents:
                pristine.restore()
            self._controller = self._new_controller()
            self._had_run = False
        return self._controller

    # -- looking --

    @property
    def running(self) -> bool:
        """True where the loop runs (between calls of `advance` it waits)."""
        return self._task is not None and not self._task.done()

    @property
    def path(self) -> Path:
        """The database."""
        return self._files.path

    @property
    def state(self) -> dict[str, Any]:
        """The committed state: keys and values."""
        reader = self._files.reader
        return {} if reader is None else {row["key"]: decode(row["value"]) for row in reader.state()}

    @property
    def iteration(self) -> int:
        """The number of the last committed iteration, 0 before the first."""
        reader = self._files.reader
        return 0 if reader is None else reader.rows("SELECT max(iteration) AS n FROM v_iterations")[0]["n"] or 0

    def events(self, type: str | None = None) -> list[Event]:
        """Return all events, oldest first, or those of a type (`*` stands for any text)."""
        reader = self._files.reader
        found = [] if reader is None else map(Event.from_record, reader.recent_events(ALL))
        matches = (lambda name: True) if type is None else compile_patterns((type,))
        return [event for event in found if matches(event.type)]

    @property
    def failures(self) -> list[FailedUnit]:
        """Every hook that failed, oldest first."""
        reader = self._files.reader
        rows = [] if reader is None else reader.rows(FAILED)
        return [
            FailedUnit(
                row["agent"],
                f"on_{row['kind']}",
                row["outcome"],
                row["iteration"],
                datetime.fromisoformat(row["started_at"]),
                row["type"],
                row["message"],
                row["traceback"],
            )
            for row in rows
        ]

    def check(self) -> None:
        """Raise AssertionError with the traceback of the last where hooks have failed."""
        failures = self.failures
        if failures:
            lines = "\n".join(map(str, failures[-10:]))
            raise AssertionError(
                f"{len(failures)} hooks failed, the last of them:\n{lines}\n\n{failures[-1].traceback}"
            )

    def sql(self, query: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return the rows of a query on the database; `:name` in it takes the parameter of that name."""
        reader = self._files.reader
        if reader is None:
            raise UsageError("there is no database yet: the loop makes it when it starts, at the first `advance`")
        return reader.rows(query, **parameters)

    def __repr__(self) -> str:
        return f"<Harness at {self.now.isoformat()} {'running' if self.running else 'not running'} {self.path}>"

    # -- the loop parks --

    async def _before_waiting(self, bell: Bell) -> None:
        """Wait for tasks, and for what runs in the background; what has ended rings the bell."""
        running = [attempt for attempt in self._run.tasks.running.values() if attempt not in self._late]
        if running:
            works = [attempt.work for attempt in running if attempt.work is not None]
            _, late = await asyncio.wait(works, timeout=self._patience_s)
            self._late = frozenset(attempt for attempt in running if attempt.work in late)
            for attempt in self._late:
                log.warning(
                    "task %s still runs after %g s of real time; virtual time goes on without it",
                    attempt.task.name,
                    self._patience_s,
                )
        bench = self._run.workbench
        if bench.background:
            assert isinstance(bench, SteadyWorkbench)
            await bench.take_up(self._patience_s)

    async def _before_parking(self, bell: Bell) -> None:
        """Commit what waits; then tell `advance`, unless something came meanwhile."""
        journal = self._run.journal
        under_way = journal.commit.at_us != 0  # a commit that found the disk full waits for better times
        if journal.waiting_since() is not None and not under_way:
            await self._run.commit("iteration")
        if not bell.rung and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def _run(self) -> Run:
        assert self._controller._life is not None
        return self._controller._life.run


class _HarnessClock(VirtualClock):
    """The clock of a harness: before time passes, everything else comes to rest."""

    def __init__(self, harness: Harness, start: datetime | str, seed: int) -> None:
        super().__init__(start, seed)
        self._harness = harness

    async def wait(self, bell: Bell, until: float | None) -> None:
        harness = self._harness
        run = harness._run
        if not bell.rung and (run.workbench.background or run.tasks.running):
            await harness._before_waiting(bell)
        if not bell.rung:
            if run.stopping and until is not None:  # nobody calls `advance` for what is left to wait for
                self._move(until)
                return
            if until is None or not self._reaches(until):
                self._passed_us = max(self._passed_us, self._allowed_us)
                await harness._before_parking(bell)
        await super().wait(bell, until)


class _HarnessController(AELController):
    """A controller that leaves signals to the test runner, and whose workbench does not depend on real time."""

    def __init__(self, harness: Harness, manager: AgentManager, **options: Any) -> None:
        super().__init__(manager, clock=harness.clock, **options)
        self._harness = harness

    def _new_life(self, parts: Parts, resumed: Resumed, iterations: int | None) -> Lifecycle:
        life = super()._new_life(parts, resumed, iterations)
        run = life.run
        run.workbench = SteadyWorkbench(run.state, run.clock, run.settings.slow_after, run._finished_late)
        run.workbench.threads.freed = run._thread_freed
        run.tasks.fakes = self._harness._fakes
        self._harness._opened.set()
        return life

    def _handle_signals(self) -> Callable[[], None]:
        return lambda: None


def _lenient(settings: Settings) -> Settings:
    """Return the settings without the rules that crashes of a test would trip over; what was set is kept."""
    starts, deaths = settings.unclean_starts, settings.quarantine_after_deaths
    return replace(
        settings,
        unclean_starts=0 if starts == _DEFAULTS.unclean_starts else starts,
        quarantine_after_deaths=0 if deaths == _DEFAULTS.quarantine_after_deaths else deaths,
    )


async def _live(controller: AELController) -> None:
    with routed(controller._host):
        await controller.start()


class _Pristine:
    """An agent, and how it was before its first run, which is how a new process would begin."""

    def __init__(self, agent: AgentBase) -> None:
        self.agent = agent
        self._metadata = copy.deepcopy(agent.metadata)
        self._flags = {name: getattr(agent, name) for name in ("enabled", "priority", "tick_count", "error_count")}

    def restore(self) -> None:
        agent = self.agent
        object.__setattr__(agent, "metadata", copy.deepcopy(self._metadata))
        for name, value in self._flags.items():
            if getattr(agent, name) != value:
                object.__setattr__(agent, name, value)


class _Files:
    """The database of a harness, and the reader that looks at it."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self._folder: str | None = None
        if os.fspath(store) == ":memory:":
            self._folder = tempfile.mkdtemp(prefix="ael-harness-")
            self.path = Path(self._folder) / "ael.db"
        else:
            self.path = database_path(store)
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader | None:
        """What answers questions; None where there is no database yet."""
        if self._reader is None and self.path.exists():
            self._reader = Reader(self.path)
        return self._reader

    def close(self) -> None:
        """Close the reader, and remove the folder where it is temporary."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
