"""The controller: what users start and stop.

controller = AELController(agent_manager=manager, tick_rate=1.0)
await controller.start()          # runs until it is stopped
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, overload

from ael_store.clock import Clock, SystemClock, iso
from ael_store.errors import AelError, InvalidSetting, NotAllowedHere, UsageError
from ael_store.model.records import Resumed
from ael_store.model.values import Limits
from ael_store.runtime.bus import EventBus
from ael_store.runtime.context import StateContext
from ael_store.runtime.control import refuse_if_it_answers
from ael_store.runtime.current import current_unit
from ael_store.runtime.host import Host
from ael_store.runtime.lifecycle import Lifecycle, Recovery
from ael_store.runtime.live_settings import compare, describe
from ael_store.runtime.manager import AgentManager
from ael_store.runtime.measure import IterationSummary
from ael_store.runtime.run import Parts, Run
from ael_store.runtime.scheduler import Scheduler, check_strategy
from ael_store.runtime.service_manager import ServiceManager
from ael_store.settings import Settings
from ael_store.store.store import Store

__all__ = ["AELController"]

R = TypeVar("R")

log = logging.getLogger("ael_store.loop")


class AELController:
    """The loop over one database.

    `store` is a path, a URL, or a `Store`; without one `AEL_DB`, else `ael.db` in the working directory, so a loop
    is durable unless it is told `store=":memory:"`. `tick_rate` is the period of the clock in seconds (1.0), 0 means
    back to back; `strategy` is "priority", "round_robin" or "load_aware". What else can be set is in `settings`; the
    arguments that are given here win over it. `service` is told how the loop is, as systemd wants it
    (`ServiceManager.from_environment()`). `reread` returns the settings as they are now, and what else has changed
    that needs another start; it is asked at SIGHUP where `start()` handles signals. With `take_over` the loop takes
    the database from an owner that does not answer, and which then can commit nothing more.
    """

    def __init__(
        self,
        agent_manager: AgentManager | None = None,
        event_bus: EventBus | None = None,
        scheduler: Scheduler | None = None,
        state_context: StateContext | None = None,
        tick_rate: float | None = None,
        strategy: str | None = None,
        *,
        store: str | os.PathLike[str] | Store | None = None,
        durability: str | None = None,
        max_agents: int | None = None,
        settings: Settings | None = None,
        clock: Clock | None = None,
        take_over: bool = False,
        service: ServiceManager | None = None,
        reread: Callable[[], tuple[Settings, list[str]]] | None = None,
    ) -> None:
        settings = settings or Settings()
        tick_rate = settings.tick_rate if tick_rate is None else tick_rate
        strategy = settings.strategy if strategy is None else strategy
        check_tick_rate(tick_rate)
        check_strategy(strategy)
        if max_agents is not None and (type(max_agents) is not int or max_agents < 1):
            raise InvalidSetting(f"max_agents is {max_agents!r}, wanted is an integer from 1, or None for all")
        self.settings = replace(
            settings,
            tick_rate=float(tick_rate),
            strategy=check_strategy(strategy) if scheduler is None else scheduler.strategy,
            max_agents=settings.max_agents if max_agents is None else max_agents,
            durability=settings.durability if durability is None else durability,  # type: ignore[arg-type]
        )
        self.clock: Clock = clock or SystemClock()
        self.agent_manager = agent_manager if agent_manager is not None else AgentManager()
        self.event_bus = event_bus if event_bus is not None else EventBus()
        self.scheduler = scheduler if scheduler is not None else Scheduler(strategy)
        self.state_context = state_context if state_context is not None else StateContext()
        if isinstance(store, Store):
            self.store = store
        else:
            address = store if store is not None else os.environ.get("AEL_DB") or "ael.db"
            self.store = Store(
                address,
                durability=self.settings.durability,
                allow_shared_folder=self.settings.allow_shared_folder,
            )
        self.take_over = take_over
        self._reread = reread
        self._rereading: set[asyncio.Task[None]] = set()
        limits = Limits(
            self.settings.key_bytes,
            self.settings.value_bytes,
            self.settings.event_bytes,
            self.settings.value_depth,
        )
        self.service = service if service is not None else ServiceManager()
        self._host = Host(self.clock, self.store, limits, self.service)
        self._attach()
        self._life: Lifecycle | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Future[None] | None = None
        self._signals = 0
        self._stop_requested = False
        self._last_stats: dict[str, Any] = {"iteration": 0, "uptime_seconds": 0.0, "start_time": None}

    def _attach(self) -> None:
        host = self._host
        for part in (self.agent_manager, self.event_bus, self.state_context):
            if part._host is not None and part._host.run is not None:  # type: ignore[union-attr]
                raise UsageError(f"{part!r} belongs to a loop that is running; a second loop needs one of its own")
        lone = self.state_context._lone
        self.agent_manager._host = host
        self.event_bus._host = host
        self.state_context._host = host
        if lone is not None:  # what was set before there was a loop waits for its start
            self.state_context._lone = None
            values = [(key, cell.text) for key, cell in lone.state.cells.items()]
            for key, text in values:
                host.submit("state.set", lambda unit, key=key, text=text: unit.write(key, text))  # type: ignore[misc]

    # -- running --

    async def start(self) -> None:
        """Run until stopped; the run has ended and everything is committed when this returns.

        Cancelling it is a stop. Raises, before anything has run: OwnedElsewhere where another loop owns the
        database, NotADatabase, DatabaseDamaged, DatabaseNotUsable, SchemaTooNew; later StorageFailed or
        OwnershipLost, where the run ends at once and a restart resumes at the last commit.
        """
        await self._live(None)

    async def run(self, iterations: int) -> None:
        """Run this many more iterations, then shut down cleanly."""
        if type(iterations) is not int or iterations < 1:
            raise InvalidSetting(f"iterations is {iterations!r}, wanted is an integer from 1")
        await self._live(iterations)

    async def _live(self, iterations: int | None) -> None:
        if self._task is not None:
            raise UsageError("this loop is running already; stop it first, or make another controller")
        self._loop = asyncio.get_running_loop()
        self._ended = Future()
        self._signals = 0
        self._had_terminal = _has_terminal()
        self._stop_requested = False
        self._task = asyncio.create_task(self._work(iterations), name="ael-loop")
        restore = self._handle_signals()
        cancelled: asyncio.CancelledError | None = None
        try:
            while not self._task.done():
                try:
                    await asyncio.wait({self._task})
                except asyncio.CancelledError as error:
                    cancelled = error
                    self._request_stop()
            self._task.result()
            if cancelled is not None:
                raise cancelled
        finally:
            restore()
            self._task = None
            self._ended.set_result(None)

    async def _work(self, iterations: int | None) -> None:
        store = self.store
        async with self.service.patience(log.info) as upgrading:
            resumed = await store.open(
                "loop",
                upgrade_schema=self.settings.upgrade == "auto",
                backup=self.settings.backup,
                progress=upgrading,
                take_over=partial(refuse_if_it_answers, store.path) if self.take_over else None,
            )
        life: Lifecycle | None = None
        failure: BaseException | None = None
        try:
            parts = Parts(
                self._host,
                store,
                self.settings,
                self.agent_manager,
                self.event_bus,
                self.scheduler,
                self.state_context,
                self.clock,
            )
            life = self._life = self._new_life(parts, resumed, iterations)
            del resumed
            life.run.stopping = self._stop_requested
            await life.begin()
            self.service.ready(life.run.status)
            await life.main()
            life.run.stopping = True
            self.service.stopping()
            await life.end()
        except BaseException as error:
            failure = error
            raise
        finally:
            if life is not None:
                self._last_stats = self._stats_of(life.run)
                self._life = None
                await life.close(failure)
            await store.close()

    def _new_life(self, parts: Parts, resumed: Resumed, iterations: int | None) -> Lifecycle:
        """Return the life of the run that begins; `ael_store.testing` puts a workbench of its own into it."""
        return Lifecycle(parts, self._host, self._host.limits, resumed, iterations)

    async def stop(self) -> None:
        """Stop the loop. Returns when the run has ended; inside a hook at once. From any task or thread."""
        ended = self._ended
        self._request_stop()
        unit = current_unit.get()
        if ended is None or ended.done() or (unit is not None and self._host.owns(unit)):
            return
        await asyncio.shield(asyncio.wrap_future(ended))

    def _request_stop(self) -> None:
        self._stop_requested = True
        life = self._life
        if life is not None:
            life.run.stopping = True
            life.run.wake()

    def _handle_signals(self) -> Callable[[], None]:
        """Take SIGINT and SIGTERM as a stop where nobody else does; returns how to put them back."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return lambda: None
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers: dict[signal.Signals, Callable[[], None]] = {
            number: partial(self._on_signal, number) for number in before
        }
        if self._reread is not None and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else `nohup` ignores it
            before[signal.SIGHUP] = signal.SIG_DFL
            handlers[signal.SIGHUP] = self._on_hangup
        taken: list[signal.Signals] = []
        for number, handler in handlers.items():
            try:
                loop.add_signal_handler(number, handler)
                taken.append(number)
            except (NotImplementedError, RuntimeError, ValueError):
                continue

        def restore() -> None:
            for number in taken:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

        return restore

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("second %s: ending at once; the next start resumes at the last commit", number.name)
            os._exit(128 + number)
        log.info("%s: stopping (a second one ends at once)", number.name)
        self._request_stop()

    def _on_hangup(self) -> None:
        """Read the settings again; or stop, where the signal means that the terminal has gone."""
        if self._had_terminal and not _has_terminal():
            self._on_signal(signal.SIGHUP)
            return
        task = asyncio.ensure_future(self._read_settings_again())
        task.set_name("ael-reload")
        self._rereading.add(task)
        task.add_done_callback(self._rereading.discard)

    async def _read_settings_again(self) -> None:
        """Take up what can change while the loop runs; settings that are wrong change nothing."""
        assert self._reread is not None
        life = self._life
        if life is None or self._host.run is None:
            log.warning("SIGHUP: the loop is not running yet, or no more; its start reads the settings anyway")
            return
        self.service.reloading()
        arguments: dict[str, Any]
        try:
            settings, waiting = self._reread()
        except AelError as error:
            log.error("SIGHUP: %s; the loop goes on with the settings that it has", error)
            arguments = {"refused": str(error)}
        else:
            before = self.settings
            live, more = compare(before, settings)
            log.log(logging.WARNING if more or waiting else logging.INFO, describe(before, live, [*more, *waiting]))
            arguments = {"changes": live}
        try:
            if arguments.get("changes") != {}:
                await asyncio.wrap_future(
                    self._host.request("settings.reload", arguments, f"SIGHUP to pid {os.getpid()}")
                )
                self.settings = life.run.settings
        except AelError as error:
            if "refused" not in arguments:
                log.error("SIGHUP: %s", error)
        finally:
            self.service.ready(life.run.status)

    # -- from outside --

    @overload
    async def transact(self, fn: Callable[[StateContext], Awaitable[R]]) -> R: ...

    @overload
    async def transact(self, fn: Callable[[StateContext], R]) -> R: ...

    async def transact(self, fn: Callable[[StateContext], Any]) -> Any:
        """Run `fn(context)` as a unit of work in the next iteration; returns its result once committed.

        `fn` may be async. What it raises is raised here, and nothing that it wrote remains. Raises
        LoopNotRunning where the loop does not run, NotAllowedHere inside a hook (which is a unit already).
        """
        unit = current_unit.get()
        if unit is not None and self._host.owns(unit) and not unit.closed:
            raise NotAllowedHere("this hook is a unit of work already: use its `context` instead of `transact`")
        return await asyncio.wrap_future(self._host.request("transact", {"function": fn}))

    def observe(self, observer: Callable[[IterationSummary], None]) -> None:
        """Call `observer(summary)` after each iteration, on the loop's thread; it must be quick."""
        self._host.observers.append(observer)

    @property
    def recovery(self) -> Recovery | None:
        """What the current run found when it began; None while none runs."""
        return None if self._life is None else self._life.recovery

    @property
    def was_interrupted(self) -> bool:
        """True where a signal has stopped the last run."""
        return self._signals > 0

    @property
    def running(self) -> bool:
        """True from the start of a run to its end."""
        return self._task is not None

    def get_stats(self) -> dict[str, Any]:
        """Return the loop's figures and those of its parts."""
        figures = self._last_stats if self._life is None else self._stats_of(self._life.run)
        return {
            "running": self.running,
            **figures,
            "tick_rate": self.settings.tick_rate,
            "strategy": self.scheduler.strategy,
            "database": str(self.store.path),
            "agent_manager": self.agent_manager.get_stats(),
            "event_bus": self.event_bus.get_stats(),
            "scheduler": self.scheduler.get_stats(),
            "state_context": self.state_context.get_stats(),
        }

    def _stats_of(self, run: Run) -> dict[str, Any]:
        return {
            "iteration": run.journal.iteration,
            "uptime_seconds": run.clock.monotonic() - run.began,
            "start_time": iso(run.started_us),
            "this_run": run.meter.get_stats(),
        }

    def __repr__(self) -> str:
        return f"<AELController {self.store.path} {'running' if self.running else 'stopped'}>"


def _has_terminal() -> bool:
    """Say whether a person may sit at this process; no longer once the terminal has hung up."""
    return any(map(os.isatty, (0, 1, 2)))


def check_tick_rate(tick_rate: Any) -> None:
    """Raise InvalidSetting unless this is a period in seconds."""
    if (
        isinstance(tick_rate, bool)
        or not isinstance(tick_rate, int | float)
        or not math.isfinite(tick_rate)
        or tick_rate < 0
    ):
        raise InvalidSetting(
            f"tick_rate is {tick_rate!r}, wanted is a period in seconds from 0 (back to back), like 1.0"
        )
