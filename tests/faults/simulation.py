"""Whole histories of a loop, each from a seed, held against a plain model of the contract.

A history is a list of steps: time passes, operators and other code change things, transactions run, agents come
and go, the process stops or dies and is started again with fresh objects on the same file. The agents' hooks do
what the seed says: they write, emit, wait, fail, hang, are slow. A crash may strike at any step of the loop:
before, in the middle of and after a hook, and before, within and after a commit, in start and shutdown too.

The loop is the real one, over a real file, on a virtual clock. The model (`model.py`) is told what happens and
says what each hook must see and what the database must hold; after each end of a run both are compared through
the public views. The same seed gives the same rows, byte for byte, so a failing seed is all that is needed:
`python -m tests.faults.simulation SEED` plays it, shortens its history while it fails, and prints the steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import json
import logging
import random
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ael_store import AgentBase, Settings
from ael_store.client import change
from ael_store.clock import Bell
from ael_store.errors import AelError
from ael_store.runtime.agent import AgentBase as Base
from ael_store.store.create import create_database
from ael_store.testing import Harness
from tests.faults.model import Member, Model, Unit
from tests.faults.trial import Report, Tell
from tests.faults.workers import memory

__all__ = ["History", "Outcome", "history_of", "run", "shrink", "simulate"]

NAME = "seeded simulation"
Step = tuple[Any, ...]

NAMES = ("ann", "bob", "cy", "dee", "eve", "fay")
TYPES = ("a.one", "a.two", "b.one", "b.two")
PATTERNS = ("a.*", "b.one", "*.two", "*", "agent_error", "agent.*", "ael_*", "a.one")
NUMBERS = ("n1", "n2", "n3")
TEXTS = ("t1", "t2", "t3", "deep")
OFF = {"unclean_starts": 0, "quarantine_after_deaths": 0, "hop_limit": 0, "stall_warn": 0.0, "stall_limit": 0.0}
"""Settings that would stop a loop which dies as often as here."""


HANG_S = 300.0
"""A history that takes longer hangs; the usual is a fifth of a second."""


class Killed(BaseException):
    """The process is gone."""


class Fault(Exception):
    """What agents raise on purpose."""


@dataclass(frozen=True)
class History:
    """What happens from outside; what the agents do follows from the seed."""

    seed: int
    tick_rate: int
    strategy: str
    max_agents: int | None
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: tick_rate={self.tick_rate} {self.strategy} max_agents={self.max_agents}"]
        return "\n".join([*lines, *(f"  {place:2} {_shown(step)}" for place, step in enumerate(self.steps))])


def _shown(step: Step) -> str:
    return " ".join(str(part) for part in step)


@dataclass(frozen=True)
class Outcome:
    """How a history went."""

    violations: tuple[str, ...]
    digest: str
    """Of all rows of all tables."""
    iterations: int = 0
    units: int = 0
    crashes: int = 0
    runs: int = 0
    trace: tuple[str, ...] = ()


# -- what happens ------------------------------------------------------------------------------------


def history_of(seed: int) -> History:
    """Return the history of a seed."""
    dice = random.Random(seed)
    tick_rate = dice.choice((1, 1, 1, 5, 60, 300))
    strategy = dice.choice(("priority",) * 3 + ("round_robin", "load_aware"))
    max_agents = dice.choice((None, None, None, 1, 2))
    threads = dice.random() < 0.1
    members = [_member(dice, name, threads) for name in NAMES[: dice.randint(1, 5)]]
    callbacks = [(f"call {n}", dice.choice(PATTERNS)) for n in range(dice.choice((0, 0, 1, 2)))]
    steps: list[Step] = [("start", tuple(members), tuple(callbacks))]
    up = True
    for _ in range(dice.randint(6, 28)):
        step = _step(dice, members, callbacks, threads, tick_rate, up)
        steps.append(step)
        up = {"start": True, "stop": False, "crash": False}.get(step[0], up)
    return History(seed, tick_rate, strategy, max_agents, tuple(steps))


def _member(dice: random.Random, name: str, threads: bool) -> Member:
    temper = dice.choice(("calm", "calm", "calm", "nervous", "nervous", "broken", "deaf"))
    background = not threads and dice.random() < 0.25
    return Member(
        name,
        priority=dice.choice((10, 10, 10, 8, 5, 3, 1)),
        enabled=dice.random() < 0.95,
        subscriptions=tuple(dice.sample(PATTERNS, dice.choice((0, 1, 1, 2)))),
        every_s=dice.choice((7, 90)) if dice.random() < 0.15 else None,
        background=background,
        has_start=dice.random() < 0.7,
        has_error=dice.random() < 0.8,
        threaded=threads and dice.random() < 0.5,
        temper=temper,
    )


def _step(
    dice: random.Random,
    members: list[Member],
    callbacks: list[tuple[str, str]],
    threads: bool,
    tick_rate: int,
    up: bool,
) -> Step:
    if not up and dice.random() < 0.6:
        _change_code(dice, members, threads)
        down_s = dice.choice((0, 1, 3, tick_rate, 10 * tick_rate, 4000))
        fuse = dice.randint(1, 9) if dice.random() < 0.2 else None
        return "start", tuple(members), tuple(callbacks), down_s, fuse
    number, name = dice.randrange(1000), dice.choice(NAMES)
    key = dice.choice(NUMBERS + TEXTS)
    value = number % 7 if key in NUMBERS else _value(dice)
    command = dice.choice(
        (
            ("state.set", {"key": key, "value": value}),
            ("state.delete", {"key": key}),
            ("events.emit", {"type": dice.choice(TYPES), "data": number}),
            ("agents.disable", {"name": name}),
            ("agents.enable", {"name": name}),
            ("agents.enable", {"name": name}),
            ("agents.release", {"name": name}),
            ("loop.pause", {}),
            ("loop.pause", {}),
            ("loop.resume", {}),
            ("loop.resume", {}),
            ("loop.step", {"iterations": dice.randint(1, 3)}),
            ("agents.forget", {"name": name}),
            ("agents.rename", {"name": name, "new_name": f"{name[0]}new"}),
        )
    )
    if not up:
        return "command", *command
    whole = dice.choice((1, 3, 6, 25) if tick_rate == 300 else (0, 1, 1, 2, 3, 6))
    part = dice.choice((0, 0, 0.5))
    return dice.choices(
        (
            ("advance", (whole + part) * tick_rate),
            ("advance", dice.choice((0, 0.25, 2, 12))),
            ("command", *command),
            ("set", key, value),
            ("emit", dice.choice(TYPES), number),
            ("transact", number, dice.random() < 0.3),
            ("open",),
            ("join", _member(dice, dice.choice(NAMES), threads)),
            ("leave", name),
            ("suspend", dice.choice((0.5, 3, 20)) * tick_rate),
            ("fuse", dice.choice((1, 2, 3, 5, 8, 13, 21, 34))),
            ("crash",),
            ("stop", dice.random() < 0.7, dice.randint(1, 9) if dice.random() < 0.3 else None),
        ),
        (30, 6, 8, 4, 6, 4, 5, 2, 2, 2, 8, 4, 4),
    )[0]


def _change_code(dice: random.Random, members: list[Member], threads: bool) -> None:
    """Between two runs somebody may have worked on the agents."""
    for place, member in enumerate(members):
        luck = dice.random()
        if luck < 0.05:
            members[place] = replace(member, version=member.version + 1, priority=dice.choice((10, 8, 5)))
        elif luck < 0.1:
            members[place] = replace(member, subscriptions=tuple(dice.sample(PATTERNS, dice.choice((0, 1, 2)))))
        elif luck < 0.13 and not member.aliases:
            members[place] = replace(member, name=f"{member.name[0]}new", aliases=(member.name,))
    if dice.random() < 0.1 and len(members) > 1:
        members.pop(dice.randrange(len(members)))
    if dice.random() < 0.1:
        name = dice.choice(NAMES)
        if all(name not in (member.name, *member.aliases) for member in members):
            members.append(_member(dice, name, threads))


def _value(dice: random.Random) -> Any:
    return dice.choice(("", "x", "yes", [1, 2], {"k": [1]}, {"k": {"l": dice.randrange(3)}}))


# -- what a hook does --------------------------------------------------------------------------------


def script_of(dice: random.Random, member: Member | None, kind: str) -> list[Step]:
    """Return the actions of one hook, the last of which may be to fail."""
    ops: list[Step] = []
    waits = member is None or not member.threaded
    for _ in range(dice.choice((0, 1, 1, 2, 3, 5))):
        number, key, text = dice.randrange(9), dice.choice(NUMBERS), dice.choice(TEXTS)
        ops.append(
            dice.choice(
                (
                    ("set", text, _value(dice)),
                    ("set", key, number),
                    ("delete", dice.choice((key, text))),
                    ("increment", key, number),
                    ("increment", key, 1),
                    ("cas", key, number, number + 1),
                    ("default", text, _value(dice)),
                    ("own", text, _value(dice)),
                    ("emit", dice.choice(TYPES), number, 0),
                    ("emit", dice.choice(TYPES), number, dice.choice((1, 4, 30, 500))),
                    ("note", "seen", number),
                )
            )
        )
        if waits and dice.random() < 0.1:
            ops.append(("wait",))
    if kind == "event" and dice.random() < 0.7:
        ops = [op for op in ops if op[0] != "emit"]  # else there would be no end of events
    if member is None:
        return ops if dice.random() < 0.8 else [*ops, ("raise",)]
    if member.background and kind in ("tick", "event") and dice.random() < 0.4:
        ops.insert(dice.randint(0, len(ops)), ("gate",))
    risk = {"calm": 0.01, "nervous": 0.15, "broken": 0.97, "deaf": 0.97 if kind == "event" else 0.02}[member.temper]
    if kind in ("start", "shutdown", "error"):
        risk /= 4
    if dice.random() < risk:
        may_hang = waits and not member.background and kind != "error"
        failure = dice.random()
        ops.append(("hang",) if may_hang and failure < 0.02 else ("bad",) if failure < 0.15 else ("raise",))
    return ops


class _Simulated(AgentBase):
    """An agent whose hooks do what the simulation says."""

    def __init__(self, member: Member, world: Simulation) -> None:
        self.member = member
        self.world = world
        super().__init__(
            member.name,
            priority=member.priority,
            enabled=member.enabled,
            subscriptions=member.subscriptions,
            trigger=None if member.every_s is None else f"every {member.every_s}s",
            tick_timeout=0,
            background=member.background,
            aliases=member.aliases,
        )


def _agent_class(member: Member) -> type[_Simulated]:
    return _class_of(member.threaded, member.has_start, member.has_error, member.version)


@cache
def _class_of(threaded: bool, has_start: bool, has_error: bool, version: int) -> type[_Simulated]:
    """Return a class with these hooks, each version with code of its own."""
    hooks: dict[str, Any] = {}
    for kind in ("start", "tick", "event", "error", "shutdown"):
        if (kind == "start" and not has_start) or (kind == "error" and not has_error):
            continue
        hooks[f"on_{kind}"] = _hook(kind, threaded)
    scope: dict[str, Any] = {}
    exec(f"def generation(self): return {version}", scope)
    return type("Simulated", (_Simulated,), {**hooks, "generation": scope["generation"]})


def _hook(kind: str, threaded: bool) -> Callable[..., Any]:
    if threaded:

        def in_a_thread(self: _Simulated, *arguments: Any) -> None:
            self.world.hook_in_a_thread(self, kind, *arguments)

        return in_a_thread

    async def in_the_loop(self: _Simulated, *arguments: Any) -> None:
        await self.world.hook(self, kind, *arguments)

    return in_the_loop


# -- the loop under test -----------------------------------------------------------------------------


class Life(Harness):
    """One life of the process: a loop that tells the model what it does, and that can be killed at any step."""

    def __init__(self, world: Simulation, agents: list[Base], start: Any, **options: Any) -> None:
        self._world = world
        super().__init__(agents, store=world.path, start=start, **options)

    def _new_controller(self) -> Any:
        controller: Any = super()._new_controller()
        world = self._world

        def observer(summary: Any) -> None:
            try:
                world.ears.iteration_ends(summary.iteration, self.clock.now_us())
            except Exception as error:  # the loop would not say so
                world.expect(False, f"the model fails: {type(error).__name__}: {error}")

        controller.observe(observer)
        store = controller.store
        write, original = store._writer._write, store.commit

        async def commit(record: Any, **more: Any) -> None:
            if world.dead:  # the end of its task is under way
                await asyncio.Event().wait()
            world.model.committing(record.kind, record.iteration, self.clock.now_us())
            world.cut(f"before the {record.kind} commit")
            if world.burnt():
                store._writer._write = lambda cursor, *rest: write(_Dying(cursor, world.seed % 7), *rest)
                world.dies(f"within the {record.kind} commit")
            writing = asyncio.ensure_future(original(record, **more))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:  # the process dies meanwhile; what SQLite does is done
                await writing
                world.model.committed()
                raise
            world.model.committed()
            if world.dead:  # the transaction had fewer statements than it was given
                raise Killed
            world.cut(f"after the {record.kind} commit")

        store.commit = commit
        life_of = controller._new_life

        def new_life(*arguments: Any) -> Any:
            life = life_of(*arguments)
            self._listen(life.run.workbench)
            return life

        controller._new_life = new_life
        return controller

    def _listen(self, bench: Any) -> None:
        begin, abort = bench._begin_in_background, bench.abort

        def begins(job: Any) -> None:
            self._world.begins_in_background(job)
            begin(job)

        def aborts() -> Any:
            self._world.ears.abort()
            return abort()

        bench._begin_in_background, bench.abort = begins, aborts

    async def _before_waiting(self, bell: Bell) -> None:
        """Wait for what runs in the background, but not for what waits at a gate."""
        bench: Any = self._run.workbench
        gated = self._world.gated
        while waiting := [t for job, t in bench.background.items() if not t.done() and job.unit not in gated]:
            await asyncio.wait(waiting, timeout=0.002)
        self._world.ears.handed_over()
        bench._hand_over()

    async def _before_parking(self, bell: Bell) -> None:
        if not bell.rung:
            self._world.ears.rest(self.clock.now_us())
        await super()._before_parking(bell)


class _Dying:
    """A cursor whose process dies after some statements; what it had begun is rolled back, as SQLite would."""

    def __init__(self, cursor: Any, statements: int) -> None:
        self._cursor = cursor
        self._left = statements

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Killed

    def execute(self, *arguments: Any) -> Any:
        self._spend()
        return self._cursor.execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        self._spend()
        return self._cursor.executemany(*arguments)

    def fetchone(self) -> Any:
        return self._cursor.fetchone()


class _FixedClock:
    """The clock of a command that holds the lock itself."""

    def __init__(self, now_us: int) -> None:
        self._now_us = now_us

    def now_us(self) -> int:
        return self._now_us

    def seed(self) -> int:
        return 0


class _Nobody:
    """Hears nothing: what a dead process still does is no part of the history."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **more: None


class Simulation:
    """One history, played."""

    def __init__(self, history: History, folder: Path) -> None:
        self.history = history
        self.seed = history.seed
        self.path = folder / "ael.db"
        self.model = Model(tick_rate=history.tick_rate, strategy=history.strategy, max_agents=history.max_agents)
        self.trace: list[str] = []
        self.life: Life | None = None
        self.lives = 0
        self.crashes = 0
        self.units = 0
        self.fuse: int | None = None
        self.dead = False
        self.now: Any = "2026-01-01T00:00:00+00:00"
        self.gated: dict[Any, asyncio.Event] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._begun: dict[Any, Unit] = {}
        self._members: dict[str, Member] = {}
        self._waiting: list[tuple[str, Any]] = []

    def tell(self, line: str) -> None:
        self.trace.append(line)

    @property
    def clock_us(self) -> int:
        return 0 if self.life is None else self.life.clock.now_us()

    @property
    def ears(self) -> Any:
        """The model while the process lives."""
        return _Nobody() if self.dead else self.model

    def expect(self, holds: bool, message: str) -> None:
        self.ears.expect(holds, message)

    # -- dying --

    def burnt(self) -> bool:
        """Come nearer to the crash that was planned; True where it is now."""
        if self.fuse is None or self.dead:
            return False
        self.fuse -= 1
        return self.fuse <= 0

    def dies(self, where: str) -> None:
        self.dead, self.fuse = True, None
        self.tell(f"dies {where}")

    def cut(self, where: str) -> None:
        if self.burnt():
            self.dies(where)
            raise Killed

    async def _cut_in_hook(self, where: str) -> None:
        if self.burnt():
            self.dies(where)
            assert self.life is not None
            await self.life.crash()

    # -- hooks --

    def begins_in_background(self, job: Any) -> None:
        agent = job.slot.agent
        self._begun[job.unit] = self._begin(agent, job.unit.kind, job.unit, job.unit.cause, background=True)

    def _begin(self, agent: Any, kind: str, unit: Any, event: Any = None, *, background: bool = False) -> Unit:
        self.units += 1
        begun: Unit = self.ears.begin(
            kind,
            agent.name,
            unit.iteration,
            unit.now_us,
            self.clock_us,
            background=background,
            event=None if event is None or kind != "event" else (event.id, event.type, event.source, event.data),
            live=agent,
        )
        agent.metadata.pop("bad", None)
        return begun

    def _script(self, name: str, kind: str, member: Member | None) -> list[Step]:
        count = self._counts[name, kind] = self._counts.get((name, kind), 0) + 1
        return script_of(random.Random(f"{self.seed}/{self.lives}/{name}/{kind}/{count}"), member, kind)

    async def hook(self, agent: _Simulated, kind: str, *arguments: Any) -> None:
        """One hook of an agent: `event` and `error` come before the context."""
        context = arguments[-1]
        unit = self._begun.pop(context._unit, None)
        if unit is None:
            unit = self._begin(agent, kind, context._unit, arguments[0])
        await self._play(unit, context, self._script(agent.name, kind, agent.member), agent)

    def hook_in_a_thread(self, agent: _Simulated, kind: str, *arguments: Any) -> None:
        """The same for a plain `def` hook, which can't wait."""
        context = arguments[-1]
        unit = self._begin(agent, kind, context._unit, arguments[0])
        if self.dead:
            return
        try:
            self._look(unit, context)
            for op in self._script(agent.name, kind, agent.member):
                self._do(op, unit, context, agent)
        except Fault:
            self._ends(unit, "error")
            raise
        self._ends(unit, "success")

    async def _play(self, unit: Unit, context: Any, script: list[Step], agent: Any) -> None:
        if self.dead:
            return
        self.tell(f"{unit.now_us // 1000000 % 10000000} {unit.kind} {unit.subject} {unit.event or ''} {script}")
        outcome = "success"
        try:
            self._look(unit, context)
            await self._cut_in_hook(f"before {unit.kind} of {unit.subject}")
            for op in script:
                if op[0] == "wait":
                    await self._cut_in_hook(f"in {unit.kind} of {unit.subject}")
                    await asyncio.sleep(0)
                elif op[0] == "gate":
                    self.gated[context._unit] = gate = asyncio.Event()
                    await gate.wait()
                    self.gated.pop(context._unit, None)
                elif op[0] == "hang":
                    outcome = "timeout"
                    self._limit(agent)
                    await asyncio.Event().wait()
                else:
                    self._do(op, unit, context, agent)
            await self._cut_in_hook(f"at the end of {unit.kind} of {unit.subject}")
        except asyncio.CancelledError:
            self.gated.pop(context._unit, None)
            self._ends(unit, outcome if outcome == "timeout" else "cancelled")
            raise
        except Fault:
            self._ends(unit, "error")
            raise
        except Exception as error:
            self.expect(False, f"{unit.kind} of {unit.subject}: {type(error).__name__}: {error}")
            raise
        self._ends(unit, "success")

    def _limit(self, agent: _Simulated) -> None:
        """Let the time of the hook that runs be over: a limit from its start would depend on the machine."""
        assert self.life is not None
        job: Any = self.life._run.roster.slots[agent.name].busy
        job.limit_s = 0.001

    def _ends(self, unit: Unit, outcome: str) -> None:
        if self.life is not None:
            self.ears.end(unit, outcome, self.clock_us)

    def _look(self, unit: Unit, context: Any) -> None:
        found = context.get_all()
        self.expect(found == unit.view, f"{unit.kind} of {unit.subject} sees {found}, wanted is {unit.view}")

    def _do(self, op: Step, unit: Unit, context: Any, agent: Any) -> None:
        """Do one thing, and compare what it says with what the model says."""
        verb, *rest = op
        found: Any = None
        wanted: Any = None
        if verb == "set":
            context.set(*rest)
            unit.set(*copy.deepcopy(rest))
        elif verb == "delete":
            found, wanted = context.delete(*rest), unit.delete(*rest)
        elif verb == "increment":
            found, wanted = context.increment(*rest), unit.increment(*rest)
        elif verb == "cas":
            found, wanted = context.compare_and_set(*rest), unit.compare_and_set(*rest)
        elif verb == "default":
            found, wanted = context.setdefault(*rest), unit.setdefault(*rest)
        elif verb == "own":
            if agent is not None:
                context.own.set(*rest)
                unit.set(f"agent/{agent.name}/{rest[0]}", rest[1])
        elif verb == "emit":
            type, data, after_s = rest
            context.emit(type, data, after=after_s or None)
            unit.emit(type, agent.name if agent is not None else self._source(unit), data, after_s)
        elif verb == "note":
            if agent is not None:
                agent.metadata[rest[0]] = rest[1]
        elif verb == "bad":
            if agent is not None:
                agent.metadata["bad"] = object()
                return
            raise Fault("it is so")
        else:
            raise Fault("it is so")
        self.expect(found == wanted, f"{op} of {unit.subject} says {found}, wanted is {wanted}")
        key = rest[0]
        if verb not in ("emit", "note", "own"):
            self.expect(
                context.get(key) == unit.view.get(key),
                f"{unit.subject} reads {key}={context.get(key)}, wrote {unit.view.get(key)}",
            )

    @staticmethod
    def _source(unit: Unit) -> str:
        return "outside" if unit.kind == "outside" else unit.subject

    # -- steps --

    async def play(self) -> Outcome:
        for place, step in enumerate(self.history.steps):
            self.tell(f"-- {place} {_shown(step)}")
            await self._guarded(self._step(*step))
            if self.model.violations:
                break
        if self.life is not None and not self.model.violations:
            self.fuse = None
            await self._guarded(self._step("stop", True, None))
        if self.life is not None:
            await self._bury()
        self._compare()
        model = self.model
        return Outcome(
            tuple(model.violations[:5]),
            digest(self.path) if self.path.exists() else "",
            model.durable.iteration,
            self.units,
            self.crashes,
            self.lives,
            tuple(self.trace[-400:]),
        )

    async def _guarded(self, step: Any) -> None:
        """Take a step; a process that died on the way is buried."""
        try:
            await step
        except Killed:
            pass
        except AelError as error:
            self.expect(False, f"the loop ended with {type(error).__name__}: {error}")
        if self.dead:
            self.crashes += 1
            await self._bury()

    async def _bury(self) -> None:
        """The process has ended, however: compare, and forget what lived in it."""
        life, self.life = self.life, None
        self.dead = True
        if life is not None:
            if life.running:
                await life.crash()
            self.now = life.clock.now
            life._files.close()
        self.dead = False
        self.fuse = None
        self.gated.clear()
        self._begun.clear()
        self._waiting.clear()
        self.model.crash()
        if not self.model.violations:
            self._compare()

    async def _step(self, verb: str, *rest: Any) -> None:
        life = self.life
        if verb == "start":
            if life is None:
                await self._start(*rest)
        elif verb == "command":
            await self._command(*rest)
        elif verb == "fuse":
            self.fuse = rest[0]
        elif life is None:
            return
        elif verb == "advance":
            await self._advance(rest[0])
        elif verb == "set":
            life.set(*rest)
            self.model.queue.append(("set", *rest))
        elif verb == "emit":
            life.emit(*rest)
            self.model.queue.append(("emit", rest[0], "outside", rest[1]))
        elif verb == "transact":
            await self._transact(*rest)
        elif verb == "open":
            for gate in list(self.gated.values()):
                gate.set()
            await self._advance(0)
        elif verb == "join":
            if self._members.get(rest[0].name) is None and rest[0].name not in self.model.gone:
                self._members[rest[0].name] = rest[0]
                life.controller.agent_manager.register(_agent_class(rest[0])(rest[0], self))
                self.model.roster.append(("join", rest[0]))
                await self._advance(0)
        elif verb == "leave":
            if self._members.pop(rest[0], None) is not None:
                life.controller.agent_manager.unregister(rest[0])
                self.model.roster.append(("leave", rest[0]))
                await self._advance(0)
        elif verb == "suspend":
            life.clock.jump(rest[0])
            self.model.jumped = True
            await self._advance(0)
        elif verb == "crash":
            self.dies("between two steps")
            await life.crash()
        elif verb == "stop":
            await self._stop(*rest)

    async def _start(
        self,
        members: tuple[Member, ...],
        callbacks: tuple[Any, ...],
        down_s: float = 0,
        fuse: int | None = None,
    ) -> None:
        self.lives += 1
        self.fuse = fuse
        start = self.now if isinstance(self.now, str) else self.now + timedelta(seconds=down_s)
        known = {item.name for item in fields(Settings)}
        agents: list[Base] = [_agent_class(member)(member, self) for member in members]
        self.life = life = Life(
            self,
            agents,
            start,
            seed=self.seed * 1000 + self.lives,
            tick_rate=float(self.history.tick_rate),
            strategy=self.history.strategy,
            max_agents=self.history.max_agents,
            settings=Settings(**{name: value for name, value in OFF.items() if name in known}),  # type: ignore[arg-type]
        )
        self._members = {member.name: member for member in members}
        for subscriber, pattern in callbacks:
            life.controller.event_bus.subscribe(pattern, subscriber, self._callback(subscriber, pattern))
        self.model.run_begins(life.clock.now_us(), members, callbacks)
        await life.start()

    def _callback(self, subscriber: str, pattern: str) -> Callable[..., Any]:
        async def callback(event: Any) -> None:
            assert self.life is not None
            context = _Inside(self.life.controller)
            self.units += 1
            unit = self.ears.begin(
                "event",
                subscriber,
                context._unit.iteration,
                context._unit.now_us,
                self.clock_us,
                event=(event.id, event.type, event.source, event.data),
                pattern=pattern,
            )
            await self._play(unit, context, self._script(subscriber, "event", None), None)

        return callback

    async def _advance(self, duration: float) -> None:
        assert self.life is not None
        await self.life.advance(duration)
        self._check_answers()

    async def _transact(self, number: int, fails: bool) -> None:
        assert self.life is not None
        controller = self.life.controller

        async def change_two(context: Any) -> int:
            unit = self.ears.begin("outside", "outside", context._unit.iteration, context._unit.now_us, self.clock_us)
            script: list[Step] = [("increment", "n1", number), ("emit", "a.one", number, 0)]
            await self._play(unit, context, [*script, ("raise",)] if fails else script, None)
            return number

        task = asyncio.ensure_future(controller.transact(change_two))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.sleep(0)
        await self._advance(0)
        if not self.dead and not self.model.stopping:
            done, _ = await asyncio.wait({task}, timeout=2)
            self.expect(bool(done), "transact was not answered")
            if done:
                error = task.exception()
                told = type(error) if fails else task.result()
                self.expect(told == (Fault if fails else number), f"transact says {error!r}")
        else:
            with contextlib.suppress(BaseException):
                await task

    async def _command(self, name: str, arguments: dict[str, Any]) -> None:
        if self.life is not None:
            future = self.life.controller._host.request(name, dict(arguments), "an operator")
            self._waiting.append((name, future))
            self.model.queue.append(("command", name, arguments, future))
            await self._advance(0)
            return
        if not self.path.exists() or not self.lives or not self.model.durable.runs:
            return
        found: Any = None
        refused = None
        now_us = 0 if isinstance(self.now, str) else int(self.now.timestamp() * 1_000_000)
        with patch("ael_store.client.SystemClock", lambda: _FixedClock(now_us)):
            try:
                found = change(self.path, name, dict(arguments))
            except AelError as error:
                refused = type(error).__name__
        self._answered(name, (found, refused), self.model.command_without_loop(name, arguments, now_us))
        self._compare()

    def _check_answers(self) -> None:
        if self.dead:
            return
        answers, self.model.answers = self.model.answers, []
        told = {id(future): (result, error) for future, result, error in answers}
        for name, future in self._waiting:
            if not future.done():
                self.expect(False, f"{name} was not answered")
                continue
            error = future.exception()
            found = (None, type(error).__name__) if error is not None else (future.result(), None)
            self._answered(name, found, told.get(id(future), (None, "LoopNotRunning")))
        self._waiting.clear()

    def _answered(self, name: str, found: Any, wanted: Any) -> None:
        self.expect(found == wanted, f"{name} is answered {found}, wanted is {wanted}")

    async def _stop(self, open_gates: bool, fuse: int | None = None) -> None:
        life = self.life
        self.fuse = self.fuse if fuse is None else fuse
        assert life is not None
        if open_gates:
            for gate in list(self.gated.values()):
                gate.set()
        self.model.stopping = True
        await life.stop()
        if self.dead:
            return
        self.life = None
        self.now = life.clock.now
        life._files.close()
        self._waiting.clear()
        self.gated.clear()
        self.fuse = None
        stopped = self.model.durable.runs[-1][0] == "stopped"
        self.expect(stopped, "the loop stopped and did not commit its end")
        self.model.crash()  # what lived in the process is gone; everything else is durable
        self._compare()

    def _compare(self) -> None:
        if not self.path.exists() or not self.model.durable.runs:
            return
        connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        try:
            self.model.compare(lambda query: connection.execute(query).fetchall(), json.loads)
        finally:
            connection.close()


class _Inside:
    """What a callback uses: the process's own context, which inside a hook belongs to its unit."""

    def __init__(self, controller: Any) -> None:
        from ael_store.runtime.current import current_unit

        self._unit: Any = current_unit.get()
        self._context = controller.state_context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


# -- the same rows again -----------------------------------------------------------------------------

OF_THE_MACHINE = {"runs": ("pid", "host"), "lease": ("holder",), "commands": ("actor",)}
"""Columns that tell where a history was played."""


def digest(path: Path) -> str:
    """Return a digest of all rows of all tables, without what tells where they were written."""
    found = hashlib.sha256()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
        for (table,) in tables:
            if table in ("meta", "digests"):
                continue
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join(column for column in columns if column not in OF_THE_MACHINE.get(table, ()))
            found.update(f"{table}\n".encode())
            for row in sorted(map(repr, connection.execute(f"SELECT {kept} FROM {table}"))):
                found.update(f"{row}\n".encode())
    finally:
        connection.close()
    return found.hexdigest()


# -- playing many ------------------------------------------------------------------------------------


@contextlib.contextmanager
def quick(folder: Path) -> Iterator[None]:
    """Open databases quickly: a new one is a copy, and few threads are asked."""
    empty = folder / "empty.db"
    if not empty.exists():
        create_database(empty)
    image = empty.read_bytes()

    async def at_once(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return function(*arguments, **more)

    with (
        patch("asyncio.to_thread", at_once),
        patch("ael_store.testing.steady_workbench.GLANCE_S", 0.002),
        patch("ael_store.store.store.create_database", lambda path: path.write_bytes(image)),
    ):
        yield


def simulate(history: History, folder: Path | None = None) -> Outcome:
    """Play a history in a folder of its own, and return how it went."""
    log = logging.getLogger("ael_store")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with tempfile.TemporaryDirectory(prefix="ael-simulation-", dir=folder) as name:
            return asyncio.run(_in_time(Simulation(history, Path(name))))
    finally:
        log.setLevel(level)


async def _in_time(simulation: Simulation) -> Outcome:
    """Play a history; what hangs, or fails in a way that nobody foresaw, is a violation too."""
    try:
        async with asyncio.timeout(HANG_S):
            return await simulation.play()
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        return Outcome((f"{type(error).__name__}: {error}", text), "", trace=tuple(simulation.trace[-400:]))


def shrink(history: History, fails: Callable[[History], bool], attempts: int = 60) -> History:
    """Return a shorter history that still fails: steps are left out as long as it does."""
    size = max(1, len(history.steps) // 2)
    while size and attempts > 0:
        place = 1
        while place < len(history.steps) and attempts > 0:
            shorter = replace(history, steps=history.steps[:place] + history.steps[place + size :])
            attempts -= 1
            if fails(shorter):
                history = shorter
            else:
                place += size
        size //= 2
    return history


def explain(seed: int, folder: Path | None = None) -> str:
    """Return what a failing seed does wrong, with the shortest history that was found for it."""

    def fails(candidate: History) -> bool:
        return bool(simulate(candidate, folder).violations)

    history = shrink(history_of(seed), fails)
    outcome = simulate(history, folder)
    return "\n".join([str(history), *outcome.trace[-60:], *(f"VIOLATION {text}" for text in outcome.violations)])


def play_seeds(seeds: range, twice: int, folder: Path) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """Play seeds in this process; every `twice`th one two times. Returns failures and figures."""
    failures: list[tuple[int, str]] = []
    figures = dict.fromkeys(("iterations", "units", "crashes", "runs", "twice"), 0)
    with tempfile.TemporaryDirectory(prefix="ael-simulation-", dir=folder) as name, quick(Path(name)):
        for seed in seeds:
            history = history_of(seed)
            outcome = simulate(history, Path(name))
            if outcome.violations:
                failures.append((seed, f"{outcome.violations[0]}\n{explain(seed, Path(name))}"))
            for figure in ("iterations", "units", "crashes", "runs"):
                figures[figure] += getattr(outcome, figure)
            if twice and seed % twice == 0:
                figures["twice"] += 1
                if simulate(history, Path(name)).digest != outcome.digest:
                    failures.append((seed, f"seed {seed}: played twice it gave different rows"))
    return failures, figures


def run(*, count: int, seed: int, workers: int, tell: Tell, folder: Path) -> Report:
    """Play `count` seeds from `seed` on, every 20th of them twice."""
    began = time.monotonic()
    folder = memory() or folder  # a crash here takes the process, not the power
    count = count or 10_000
    chunks = [range(seed + at, min(seed + at + 25, seed + count)) for at in range(0, count, 25)]
    failures: list[tuple[int, str]] = []
    total: dict[str, int] = {}
    done = 0
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        for found, figures in pool.map(play_seeds, chunks, [20] * len(chunks), [folder] * len(chunks)):
            failures += found
            done += 25
            for name, figure in figures.items():
                total[name] = total.get(name, 0) + figure
            if done % 500 == 0:
                tell(f"{min(done, count)} of {count} seeds, {len(failures)} failed")
    note = (
        f"{total['iterations']} iterations, {total['units']} hooks, {total['runs']} runs, {total['crashes']} crashes, "
        f"{total['twice']} seeds played twice in {time.monotonic() - began:.0f} s; seeds from {seed}"
    )
    return Report(NAME, count, silent=len(failures), note=note, failures=tuple(text for _, text in failures[:20]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ael-simulation-") as name, quick(Path(name)):
        print(explain(int(sys.argv[1]), Path(name)))
