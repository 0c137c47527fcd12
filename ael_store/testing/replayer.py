"""Runs today's code on recorded units, and compares: production ticks as regression tests.

    report = await replay("ael.db", "agents.py", agent="thermometer", last=1000)
    report.check()

Each unit gets an agent of its own, the state that it saw, its event or task, its time, iteration and seed, and the
agent's metadata of then. Nothing takes effect: the database is opened read-only, tasks are only noted, and what would
touch the outside is refused (`no_effects.py`).

Of a few things the recording leaves several answers (which of two metadata that one commit holds a unit saw; in which
iteration a unit in the background began). Then each is tried, and a unit counts as the same where one of them gives
what was recorded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, product
from typing import Any, get_args

from ael_store.errors import UsageError
from ael_store.model.unit import Kind
from ael_store.model.values import Limits
from ael_store.runtime.agent import AgentBase, check_agent, overrides
from ael_store.settings import Settings
from ael_store.store.recorded import REMOVED, Recorded, RecordedUnit
from ael_store.store.sqlite import database_path
from ael_store.testing.fresh_agent import FreshAgents
from ael_store.testing.no_effects import NoEffects
from ael_store.testing.past_unit import CannotReplay, Replayed, Setting, Stage
from ael_store.testing.replay_report import Difference, ReplayReport, compare
from ael_store.testing.routing import routed

__all__ = ["LAST", "replay"]

LAST = 1000
"""How many units are replayed where nothing is said."""

DAY_US = 86_400_000_000

UNSAVED = "a unit before it failed and may have changed the agent's metadata"

MOST_SETTINGS = 12
"""So many answers of the recording are tried for one unit."""

KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "outside")

Agents = AgentBase | type[AgentBase] | Iterable[Any] | Callable[[], Any] | str


async def replay(
    path: str | os.PathLike[str],
    agents: Agents,
    *,
    agent: str | None = None,
    iterations: int | tuple[int, int] | None = None,
    unit: int | None = None,
    last: int | None = None,
    kinds: Sequence[Kind] = (),
    allow_effects: bool = False,
    settings: Settings | None = None,
    tell: Callable[[str], None] | None = None,
) -> ReplayReport:
    """Run today's code on units that a database has recorded, and return where it does other things. Writes nothing.

    `agents` is an agent, a class, a list of these, a function that returns one of these, or a TARGET as `ael run`
    has it; `agent` is the name of the one to replay, where there are several. Replayed are the units of one iteration
    or of a first to a last one, or one unit by its number, or the `last` ones; 1000 where nothing is said; with
    `kinds` only these.

    While it runs, nothing in this process can connect, start a process or write a file, unless `allow_effects`.
    Raises AgentNotFound, HistoryGone where all that is asked for was removed, UsageError where there never was
    anything.
    """
    asked = sum(what is not None for what in (iterations, unit, last))
    if asked > 1:
        raise UsageError("iterations, unit and last each say what to replay: pass one of them")
    if last is not None and last < 1:
        raise UsageError(f"last is {last}, wanted is a number of units from 1")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise UsageError(f"kind {unknown[0]!r} can't be replayed; choose of {', '.join(KINDS)}")
    if isinstance(iterations, int):
        iterations = (iterations, iterations)
    if iterations is not None and not 0 <= iterations[0] <= iterations[1]:
        raise UsageError(f"iterations are {iterations[0]} to {iterations[1]}, wanted are a first and a later one")
    settings = settings or Settings()
    with _no_bytecode(), ExitStack() as stack:
        fresh = _fresh_agents(agents, agent)
        name = fresh.agent.name
        recorded = Recorded(database_path(path))
        stack.callback(recorded.close)
        known = recorded.agent(name)
        span = recorded.span(
            known,
            kinds=tuple(kinds),
            iterations=iterations,
            unit=unit,
            last=LAST if not asked else last,
        )
        limits = Limits(settings.key_bytes, settings.value_bytes, settings.event_bytes, settings.value_depth)
        stage = Stage(recorded, limits, settings.tick_timeout)
        replayer = _Replayer(recorded, stage, fresh, allow_effects, round(settings.task_days * DAY_US))
        stack.enter_context(stage.opened())
        stack.enter_context(routed(stage))
        if not allow_effects:
            stack.enter_context(replayer.gate)
        report = replayer.report
        for row in recorded.units(span):
            await replayer.take(row)
            if tell is not None:
                tell(f"{report.units} of {span.count} units, {report.different} different")
        replayer.conclude()
        return report


class _Replayer:
    """Replays one unit after another, and keeps the report."""

    def __init__(
        self, recorded: Recorded, stage: Stage, fresh: FreshAgents, allow_effects: bool, tasks_kept_us: int
    ) -> None:
        self.recorded = recorded
        self.stage = stage
        self.fresh = fresh
        self.gate = NoEffects()
        self.allow_effects = allow_effects
        self.tasks_kept_us = tasks_kept_us
        self.report = ReplayReport(fresh.agent.name)
        self._has_on_task = overrides(fresh.agent, "on_task")
        self._left: tuple[int, str | None] = (0, None)
        """The last unit that failed as it was replayed, and the metadata that it left: they are not rolled back."""

    async def take(self, row: RecordedUnit) -> None:
        """Replay a unit and count it."""
        report = self.report
        report.units += 1
        why = row.gone
        if why is None and row.kind == "task" and not self._has_on_task:
            why = "the agent has no `on_task`"
        differences: list[Difference] = []
        if why is None:
            try:
                differences, why = await self._compare(row)
            except CannotReplay as error:
                why = str(error)
        if why is not None:
            report.skipped[why] += 1
        elif differences:
            report.different += 1
            report.differences += differences
        else:
            report.same += 1

    async def _compare(self, row: RecordedUnit) -> tuple[list[Difference], str | None]:
        """Return the fewest differences that one of the recording's answers gives, and why none can be told."""
        best: tuple[list[Difference], str | None] | None = None
        knows_metadata = self._knows_metadata(row)
        for setting in _settings_of(row):
            replayed = await self.stage.replay(self._next_agent(), row, setting)
            found, lacking = self._judge(row, replayed)
            why = None if found else lacking
            if found and (replayed.doubts or not knows_metadata):
                why = replayed.doubts[0] if replayed.doubts else UNSAVED
            if best is None or len(found) < len(best[0]):
                best = found, why
                if row.outcome != "success":
                    self._left = row.row.id, replayed.metadata
            touched = any(difference.what == "effect" for difference in found)
            if not found or touched or self.allow_effects or replayed.outcome == "timeout":
                break
        assert best is not None
        if best[0] and self.recorded.is_gone(row):
            return [], REMOVED
        return best

    def _knows_metadata(self, row: RecordedUnit) -> bool:
        """Take up the metadata that a unit which failed has left to this one; False where they are not known.

        They are saved with the next unit that succeeds.
        """
        if row.metadata == (None,) and not self._left[0]:
            return True
        before = self.recorded.before(row)
        if before is None or before[1] == "success":
            return True
        number, metadata = self._left
        if number == before[0]:
            row.metadata = tuple(dict.fromkeys((metadata, *row.metadata)))
        return number == before[0]

    def _next_agent(self) -> AgentBase:
        if not self.fresh.is_made_anew or self.allow_effects:
            return self.fresh.next()
        with self.gate.lifted():
            return self.fresh.next()

    def _judge(self, row: RecordedUnit, replayed: Replayed) -> tuple[list[Difference], str | None]:
        blocked = self.gate.take()
        found, lacking = compare(row, replayed, self.recorded, self.tasks_kept_us)
        if not blocked or (not found and row.failure is not None and _is_blocked(row.failure.type)):
            return found, lacking
        effects = [
            Difference(row.row.id, row.row.iteration, row.kind, "effect", event, None, None) for event in blocked
        ]
        if replayed.failure is not None and _is_blocked(replayed.failure.type):
            return effects, None  # how it ended follows from that
        return effects + found, lacking

    def conclude(self) -> None:
        """Note what is to be known about the whole."""
        notes, horizon = self.report.notes, self.recorded.horizon
        if self.fresh.shared:
            notes.append(
                f"{', '.join(self.fresh.shared)} of agent {self.report.agent!r} can't be copied: all units shared it"
            )
        if self.stage.left_alone:
            notes.append(f"{self.stage.left_alone} hooks did not end although they were cancelled")
        if horizon.tick_id:
            notes.append(f"history begins after iteration {horizon.iteration}; what was before was removed")


def _is_blocked(type_name: str) -> bool:
    return type_name.rpartition(".")[2] == "EffectBlocked"


def _settings_of(row: RecordedUnit) -> Iterator[Setting]:
    """Yield what a unit can have found, the likely answer first."""
    every = product(row.runs or (None,), row.iterations, row.metadata, row.redelivered)
    return (Setting(*answers) for answers in islice(every, MOST_SETTINGS))


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Importing a module writes no `__pycache__` meanwhile."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


# -- the agents -------------------------------------------------------------------------------------


def _fresh_agents(agents: Agents, name: str | None) -> FreshAgents:
    """Return what makes the agent of this name; raises UsageError, naming those that there are."""

    def make() -> AgentBase:
        return _chosen(_made(agents), name)

    made = make()
    if check_agent(made)._host is not None:
        raise UsageError(f"agent {made.name!r} runs in a loop; pass replay an instance of its own")
    return FreshAgents(made, make)


def _made(agents: Any) -> list[AgentBase]:
    """Return the agents that a user's argument stands for."""
    if isinstance(agents, str):
        from ael_store.runtime.target import load_agents

        return load_agents(agents)
    if isinstance(agents, type) and issubclass(agents, AgentBase):
        return [agents()]
    if isinstance(agents, AgentBase):
        return [agents]
    if callable(agents):
        return _made(agents())
    if not isinstance(agents, Iterable):
        raise UsageError(f"agents is {agents!r}, wanted are agents, a function that returns them, or a file")
    return [one for item in agents for one in _made(item)]


def _chosen(made: list[AgentBase], name: str | None) -> AgentBase:
    names = ", ".join(repr(agent.name) for agent in made) or "none"
    if name is None:
        if len(made) == 1:
            return made[0]
        raise UsageError(f"there are several agents, say which one to replay: {names}" if made else "no agents")
    for agent in made:
        if agent.name == name:
            return agent
    raise UsageError(f"no agent is named {name!r}; there are: {names}")
