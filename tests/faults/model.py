"""The contract of the loop as plain Python: what every history of a database must look like.

The model hears what happens to a simulated loop (a run begins, a hook runs and what it did, a commit is durable,
the process dies) and knows from that what the next hook must see and what the database must hold. It shares no
code with the loop. Where the contract is exact (state, order, numbers, cursors, counts, back-off, fire times), the
model predicts; where it leaves a choice (the phase of a priority), it learns the choice and insists on it.

What differs from the contract is collected in `violations`.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

__all__ = ["Member", "Model", "ModelEvent", "Unit"]

SECOND = 1_000_000
LOOP = "ael_controller"
OUTSIDE = "(outside)"
ATTEMPTS = 5
BACKOFF_AFTER, QUARANTINE_AFTER = 5, 20
LONGEST_BACKOFF_S, PROBE_S = 300, 3600
LATEST_IDLE_COMMIT_S = 10
SLOW_AFTER_S = 1
PERIODS = (10, 10, 10, 5, 5, 3, 3, 2, 2, 2, 1)
"""Every how many iterations of the clock an agent of priority 0 to 10 is due."""


@dataclass(frozen=True)
class Member:
    """An agent as its code declares it."""

    name: str
    priority: int = 5
    enabled: bool = True
    subscriptions: tuple[str, ...] = ()
    every_s: int | None = None
    background: bool = False
    aliases: tuple[str, ...] = ()
    version: int = 1
    """Another one is changed code."""
    has_start: bool = True
    has_error: bool = True
    threaded: bool = False
    temper: str = "calm"


@dataclass
class Agent:
    """What the database knows of an agent."""

    id: int
    name: str
    version: int
    priority: int
    enabled: bool
    operator: bool | None = None
    registered: bool = True
    known: bool = True
    """False where it was forgotten."""
    ticks: int = 0
    errors: int = 0
    events: int = 0
    failures: int = 0
    retry_us: int = 0
    quarantined: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    period_us: int | None = None
    next_us: int = 0


@cache
def _matches(type: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(type, pattern) for pattern in patterns)


@dataclass
class Cursor:
    id: int
    subscriber: str
    patterns: tuple[str, ...]
    agent: int | None
    position: int
    attempts: int = 0
    attempt_event: int = 0
    retry_us: int = 0
    ended: bool = False

    def wants(self, type: str) -> bool:
        return _matches(type, self.patterns)


@dataclass(frozen=True)
class ModelEvent:
    id: int
    type: str
    source: str
    data: Any
    iteration: int
    in_delivery: bool
    """Emitted in the delivery step, so it comes in the next iteration."""


@dataclass
class World:
    """Everything that a commit makes durable."""

    iteration: int = 0
    clock: int = 0
    paused: bool = False
    agent_ids: int = 0
    cursor_ids: int = 0
    delayed_ids: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    setter: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    cursors: dict[int, Cursor] = field(default_factory=dict)
    delayed: list[tuple[int, int, str, str, Any]] = field(default_factory=list)
    runs: list[list[Any]] = field(default_factory=list)
    last_began_us: int = 0
    """When the last iteration began, or the run where it has had none."""
    # logs, which only grow
    history: list[tuple[str, Any, Any, int, int]] = field(default_factory=list)
    events: list[ModelEvent] = field(default_factory=list)
    ticks: list[tuple[int, int, str, str]] = field(default_factory=list)
    iterations: list[tuple[int, ...]] = field(default_factory=list)
    dead: list[tuple[int, int]] = field(default_factory=list)

    def copy(self) -> World:
        twin = copy.copy(self)
        for name in ("state", "setter", "names", "history", "events", "ticks", "iterations", "dead", "delayed"):
            setattr(twin, name, copy.copy(getattr(self, name)))
        twin.runs = [list(run) for run in self.runs]
        twin.agents = {name: copy.copy(agent) for name, agent in self.agents.items()}
        twin.cursors = {number: copy.copy(cursor) for number, cursor in self.cursors.items()}
        return twin

    def event(self, type: str, source: str, data: Any, in_delivery: bool) -> None:
        self.events.append(ModelEvent(len(self.events) + 1, type, source, data, self.iteration, in_delivery))

    def pending(self, cursor: Cursor) -> list[ModelEvent]:
        return [event for event in self.events[cursor.position :] if cursor.wants(event.type)]


@dataclass(eq=False)
class Unit:
    """What one hook does, as the model saw it."""

    kind: str
    subject: str
    agent: Agent | None
    now_us: int
    view: dict[str, Any]
    """The state that it sees, its own writes included."""
    mark: int
    """Changes before it began."""
    background: bool = False
    event: ModelEvent | None = None
    cursor: Cursor | None = None
    of_loop: bool = False
    """What it handles comes from the loop itself, so a failure emits nothing more."""
    writes: dict[str, Any] = field(default_factory=dict)
    """None deletes."""
    added: dict[str, int] = field(default_factory=dict)
    emitted: list[tuple[str, str, Any, int]] = field(default_factory=list)
    """Type, source, data, and when it is due."""
    metadata: dict[str, Any] | None = None
    """The agent's attribute itself, read when the unit takes effect."""
    outcome: str = ""
    slow: bool = False

    def set(self, key: str, value: Any) -> None:
        self.added.pop(key, None)
        self.writes[key] = value
        self.view[key] = value

    def delete(self, key: str) -> bool:
        existed = key in self.view
        if existed:
            self.added.pop(key, None)
            self.writes[key] = None
            del self.view[key]
        return existed

    def increment(self, key: str, by: int) -> int:
        if key in self.added:
            self.added[key] += by
        elif key not in self.writes:
            self.added[key] = by
        result: int = self.view.get(key, 0) + by
        self.writes[key] = self.view[key] = result
        return result

    def compare_and_set(self, key: str, expected: Any, new: Any) -> bool:
        if self.view.get(key) != expected:
            return False
        self.set(key, new)
        return True

    def setdefault(self, key: str, default: Any) -> Any:
        if key not in self.view:
            self.set(key, default)
        return self.view[key]

    def emit(self, type: str, source: str, data: Any, after_s: int = 0) -> None:
        self.emitted.append((type, source, data, self.now_us + after_s * SECOND if after_s else 0))


@dataclass
class Round:
    """The iteration under way."""

    clock: bool
    missed: int
    now_us: int
    events: int
    """Events before it."""
    due: set[str] = field(default_factory=set)
    """Agents that must tick, by the clock."""
    ticked: list[str] = field(default_factory=list)
    errors: int = 0
    delivering: bool = False
    last_delivered: int = 0


class Model:
    """The loop's promises, followed step by step."""

    def __init__(self, *, tick_rate: int, strategy: str, max_agents: int | None) -> None:
        self.tick_us = tick_rate * SECOND
        self.strategy = strategy
        self.max_agents = max_agents
        self.durable = World()
        self.now = World()
        """What has taken effect, committed or not."""
        self.violations: list[str] = []
        self.residues: dict[tuple[str, int], int] = {}
        """Learned: the phase of an agent of a period."""
        self._reset()

    def _reset(self) -> None:
        """Forget what lives in a process only."""
        self.members: dict[str, Member] = {}
        self.gone: dict[str, tuple[Agent, Member]] = {}
        """Agents that were unregistered in this run."""
        self.leaving: set[str] = set()
        """Those of them whose `on_shutdown` is still to come."""
        self.seen: set[str] = set()
        self.put_off: set[tuple[str, str]] = set()
        """Hooks that were due while paused: they run in the next iteration."""
        self.callbacks: set[tuple[str, str]] = set()
        self.started: set[str] = set()
        self.queue: list[tuple[Any, ...]] = []
        self.roster: list[tuple[str, Any]] = []
        self.background: list[Unit] = []
        self.late: list[Unit] = []
        self.open: set[Unit] = set()
        self.owed: dict[str, list[bool]] = {}
        """Failures that `on_error` must still hear of: whether an event of the loop itself was the cause."""
        self.round: Round | None = None
        self.slot_us: int | None = None
        self.first_missed = 0
        self.steps = 0
        self.stopping = False
        self.aborted = False
        self.jumped = False
        self.hungry: Counter[str] = Counter()
        """Iterations of the clock since an agent that could have run did."""
        self.answers: list[tuple[Any, Any, str | None]] = []
        """Futures of commands, with the result or the class of the error."""

    def expect(self, holds: bool, message: str) -> None:
        if not holds:
            self.violations.append(f"iteration {self.now.iteration}: {message}")

    # -- a run begins --

    def run_begins(self, now_us: int, members: Sequence[Member], callbacks: Sequence[tuple[str, str]]) -> None:
        """The first commit of a run: how the last one ended, who is there, and `ael_started`."""
        queue, self.queue = self.queue, []
        self._reset()
        self.queue = queue
        w = self.now
        recovered = bool(w.runs) and w.runs[-1][0] == "running"
        if recovered:
            w.runs[-1][0], w.runs[-1][2] = "crashed", w.iteration
            self.first_missed = max(0, (now_us - w.last_began_us) // self.tick_us - 1)
        w.runs.append(["running", w.iteration + 1, None])
        w.last_began_us = now_us
        for member in members:
            self._join(member, now_us)
        for name, agent in w.agents.items():
            if name not in self.members:
                agent.registered = False
        for subscriber, pattern in callbacks:
            self.callbacks.add((subscriber, pattern))
            if self._callback_cursor(subscriber, pattern) is None:
                self._open_cursor(subscriber, (pattern,), None)
        self._row(None, "start", "success")
        if recovered:
            w.event("ael_recovered", LOOP, ..., False)
        w.event("ael_started", LOOP, ..., False)
        self._outside(now_us)
        self.slot_us = None if w.paused else now_us

    def _join(self, member: Member, now_us: int) -> None:
        w = self.now
        agent = w.agents.get(member.name)
        if agent is None or not agent.known:
            for alias in member.aliases:
                old = w.agents.get(alias)
                if old is not None and old.known and alias not in self.members:
                    self._rename(alias, member.name)
                    agent = old
                    break
        if agent is None:
            w.agent_ids += 1
            agent = Agent(w.agent_ids, member.name, member.version, member.priority, member.enabled)
            w.agents[member.name] = agent
            w.names[agent.id] = member.name
        agent.known = True
        if agent.version != member.version:
            agent.failures, agent.retry_us, agent.quarantined = 0, 0, False
        agent.version, agent.priority, agent.registered = member.version, member.priority, True
        agent.enabled = member.enabled if agent.operator is None else agent.operator
        period_us = None if member.every_s is None else member.every_s * SECOND
        if period_us is not None and agent.period_us != period_us:
            agent.period_us, agent.next_us = period_us, now_us + period_us
        self.members[member.name] = member
        if not member.has_start:
            self.started.add(member.name)
        patterns = tuple(sorted(set(member.subscriptions)))
        cursor = self._agent_cursor(agent.id)
        if cursor is None:
            if patterns:
                self._open_cursor(member.name, patterns, agent.id)
        elif cursor.patterns != patterns:
            cursor.ended = not patterns
            cursor.patterns = patterns or cursor.patterns
            cursor.attempts, cursor.attempt_event, cursor.retry_us = 0, 0, 0

    def _rename(self, name: str, new_name: str) -> None:
        w = self.now
        agent = w.agents.pop(name)
        forgotten = w.agents.get(new_name)
        if forgotten is not None:  # it gives up its name
            w.names[forgotten.id] = f"({new_name} {forgotten.id})"
        w.agents[new_name] = agent
        agent.name = w.names[agent.id] = new_name
        for cursor in w.cursors.values():
            if not cursor.ended and cursor.subscriber == name:
                cursor.subscriber = new_name
        unit = self._outside_unit(0)
        for key in sorted(key for key in w.state if key.startswith(f"agent/{name}/")):
            unit.set(f"agent/{new_name}/{key.split('/', 2)[2]}", w.state[key])
            unit.delete(key)
        self._apply(unit)

    def _open_cursor(self, subscriber: str, patterns: tuple[str, ...], agent: int | None) -> Cursor:
        w = self.now
        w.cursor_ids += 1
        cursor = w.cursors[w.cursor_ids] = Cursor(w.cursor_ids, subscriber, patterns, agent, len(w.events))
        return cursor

    def _agent_cursor(self, agent: int) -> Cursor | None:
        found = [c for c in self.now.cursors.values() if c.agent == agent and not c.ended]
        return found[0] if found else None

    def _callback_cursor(self, subscriber: str, pattern: str) -> Cursor | None:
        for cursor in self.now.cursors.values():
            if (
                cursor.agent is None
                and not cursor.ended
                and (cursor.subscriber, cursor.patterns[0]) == (subscriber, pattern)
            ):
                return cursor
        return None

    # -- an iteration --

    def enter(self, iteration: int, now_us: int) -> None:
        """Go round, unless this iteration is under way: apply what comes before its hooks."""
        w = self.now
        if self.round is not None or iteration == w.iteration:
            self.expect(iteration == w.iteration, f"something says it is iteration {iteration}")
            return
        self.expect(iteration == w.iteration + 1, f"iteration {iteration} follows it")
        self.expect(len(w.ticks) == len(self.durable.ticks), f"iteration {iteration} began before it was committed")
        waiting = w.iterations[len(self.durable.iterations) :]
        if waiting and not self.jumped:
            waited_s = (now_us - waiting[0][-1]) / SECOND
            self.expect(waited_s <= LATEST_IDLE_COMMIT_S, f"it was not committed for {waited_s} s")
        self.expect(not w.paused or self.steps > 0 or self.stopping, "iterations go on while paused")
        clock, missed = (False, 0) if self.stopping else self._slot(now_us)
        self.steps -= clock and self.steps > 0
        w.iteration, w.clock = iteration, w.clock + clock
        self.jumped = False
        self.round = Round(clock, missed, now_us, len(w.events))
        self._reconcile(now_us)
        self._apply_late()
        self._outside(now_us)
        if clock and not self.stopping:
            self.round.due = self._due_by_clock(now_us)

    def _slot(self, now_us: int) -> tuple[bool, int]:
        """Return whether a slot of the clock has come, and how many were lost before it."""
        if self.now.paused:
            missed, self.first_missed = self.first_missed, 0
            return True, missed
        if self.slot_us is None:
            self.slot_us = now_us
        if now_us < self.slot_us:
            return False, 0
        passed = (now_us - self.slot_us) // self.tick_us
        self.slot_us += (passed + 1) * self.tick_us
        missed, self.first_missed = passed + self.first_missed, 0
        return True, missed

    def _reconcile(self, now_us: int) -> None:
        roster, self.roster = self.roster, []
        for verb, what in sorted(roster, key=lambda change: change[0] == "join"):
            if verb == "join":
                self._join(what, now_us)
                continue
            agent = self.now.agents[what]
            agent.registered = False
            for cursor in self.now.cursors.values():
                if cursor.subscriber == what:
                    cursor.ended = True
            member = self.members.pop(what)
            self.gone[what] = agent, member
            if what in self.started:
                self.leaving.add(what)
                if self.round is None:
                    self.put_off.add(("shutdown", what))
            self.started.discard(what)

    def _while_paused(self, now_us: int) -> None:
        """What is taken up all the same."""
        self._reconcile(now_us)
        self._apply_late()
        self._outside(now_us)

    def _due_by_clock(self, now_us: int) -> set[str]:
        due = set()
        for name, member in self.members.items():
            agent = self.now.agents[name]
            if member.every_s is not None or not self._ready(agent, now_us):
                self.hungry.pop(name, None)
                continue
            due.add(name)
        return due

    def _ready(self, agent: Agent, now_us: int) -> bool:
        return agent.enabled and agent.retry_us <= now_us and not any(u.agent is agent for u in self.background)

    def iteration_ends(self, iteration: int, now_us: int) -> None:
        """An iteration is over, and committed unless it was idle."""
        self.enter(iteration, now_us)
        w, round = self.now, self.round
        if round is None:
            self.expect(False, "it ended twice")
            return
        self._lay_down_iteration()
        self.round = None
        self.expect(len(w.ticks) == len(self.durable.ticks), "it ended and its units are not committed")
        if round.clock and not self.stopping:
            self._check_schedule(round)

    def _lay_down_iteration(self) -> None:
        """The row of the iteration, just before its commit."""
        w, round = self.now, self.round
        if round is not None and (not w.iterations or w.iterations[-1][0] != w.iteration):
            w.last_began_us = round.now_us
            events = len(w.events) - round.events
            w.iterations.append(
                (w.iteration, len(w.runs), len(round.ticked), round.errors, events, round.missed, round.now_us)
            )

    def _check_schedule(self, round: Round) -> None:
        ticked = [name for name in round.ticked if name in self.members and self.members[name].every_s is None]
        self.expect(len(set(round.ticked)) == len(round.ticked), f"somebody ticked twice: {round.ticked}")
        able = {name for name in round.due if name in self.started or name in ticked}
        self.expect(set(ticked) <= able, f"{set(ticked) - able} ticked and must not")
        if self.max_agents is not None:
            self.expect(len(ticked) <= self.max_agents, f"{ticked} ticked, max_agents is {self.max_agents}")
            bound = 10 * (len(self.members) + 3)
        else:
            bound = 300 if self.strategy == "load_aware" else 1  # there an expensive agent runs less often
        for name in sorted(able):
            if name in ticked:
                self.hungry.pop(name, None)
            else:
                self.hungry[name] += 1
            priority = self.now.agents[name].priority
            period = PERIODS[priority] if self.strategy == "priority" else 1
            self.expect(
                self.hungry[name] < period * bound, f"{name} (priority {priority}) starves: {dict(self.hungry)}"
            )
            if self.max_agents is None and period > 1 and name in ticked:
                residue = self.residues.setdefault((name, period), self.now.clock % period)
                self.expect(residue == self.now.clock % period, f"{name} (priority {priority}) is out of step")
        if self.strategy != "round_robin" or self.max_agents is None:
            order = [self.now.agents[name].priority for name in ticked]
            if self.strategy == "priority" and self.max_agents is None:
                self.expect(order == sorted(order, reverse=True), f"{ticked} are not in order of priority: {order}")

    # -- what comes from outside --

    def _outside_unit(self, now_us: int) -> Unit:
        return Unit("outside", OUTSIDE, None, now_us, dict(self.now.state), len(self.now.history))

    def _outside(self, now_us: int) -> None:
        """Apply what waits, in order, then the delayed events whose time has come."""
        w = self.now
        queue, self.queue = self.queue, []
        for what, *arguments in queue:
            unit = self._outside_unit(now_us)
            if what == "set":
                unit.set(*arguments)
                self._apply(unit)
            elif what == "emit":
                unit.emit(*arguments)
                self._apply(unit)
            elif what == "command":
                name, values, future = arguments
                result, error = self._command(name, values, unit, running=True)
                self.answers.append((future, result, error))
        if w.paused:
            self.slot_us = None
            return
        due = sorted(entry for entry in w.delayed if entry[0] <= now_us)
        for entry in due:
            w.delayed.remove(entry)
            unit = self._outside_unit(now_us)
            unit.emit(entry[2], entry[3], entry[4])
            self._apply(unit)

    def command_without_loop(self, name: str, arguments: dict[str, Any], now_us: int) -> tuple[Any, str | None]:
        """A command that takes the lock itself: durable at once."""
        answer = self._command(name, arguments, self._outside_unit(now_us), running=False)
        self.durable = self.now.copy()
        return answer

    def _command(self, name: str, arguments: dict[str, Any], unit: Unit, *, running: bool) -> tuple[Any, str | None]:
        """Carry a command out; returns its result and None, or None and the class of the refusal."""
        w = self.now
        changes, events = len(w.history), len(w.events)
        if name == "state.set":
            unit.set(arguments["key"], arguments["value"])
            self._apply(unit)
            return len(w.history) > changes, None
        if name == "state.delete":
            existed = unit.delete(arguments["key"])
            self._apply(unit)
            return existed, None
        if name == "events.emit":
            unit.emit(arguments["type"], "outside", arguments["data"])
            self._apply(unit)
            return events + 1, None
        if name in ("loop.pause", "loop.resume"):
            changed = w.paused != (name == "loop.pause")
            w.paused = name == "loop.pause"
            return changed, None
        if name == "loop.step":
            if not running:
                return None, "LoopNotRunning"
            if not w.paused:
                return None, "UsageError"
            self.steps += arguments["iterations"]
            return w.iteration + self.steps, None
        agent = w.agents.get(arguments["name"])
        if agent is None or not agent.known:
            return None, "AgentNotFound"
        if name in ("agents.enable", "agents.disable"):
            enabled = name == "agents.enable"
            changed = agent.enabled != enabled
            agent.enabled = agent.operator = enabled
            return changed, None
        if name == "agents.release":
            changed = agent.quarantined or agent.retry_us > 0
            agent.failures, agent.retry_us, agent.quarantined = 0, 0, False
            return changed, None
        if running and agent.name in self.members:
            return None, "UsageError"
        if name == "agents.rename":
            new = w.agents.get(arguments["new_name"])
            if new is not None and new.known:
                return None, "UsageError"
            self._rename(agent.name, arguments["new_name"])
            return True, None
        for key in sorted(key for key in w.state if key.startswith(f"agent/{agent.name}/")):
            unit.delete(key)
        self._apply(unit)
        for cursor in w.cursors.values():
            cursor.ended = cursor.ended or cursor.subscriber == agent.name
        fresh = Agent(agent.id, agent.name, agent.version, agent.priority, True, registered=False, known=False)
        fresh.period_us, fresh.next_us = agent.period_us, agent.next_us
        w.agents[agent.name] = fresh
        return True, None

    # -- units --

    def begin(
        self,
        kind: str,
        subject: str,
        iteration: int,
        now_us: int,
        clock_us: int,
        *,
        background: bool = False,
        event: tuple[int, str, str, Any] | None = None,
        pattern: str | None = None,
        live: Any = None,
    ) -> Unit:
        """A hook begins: check that it may, and return what it must see."""
        w = self.now
        if (kind, subject) in self.put_off:
            self.put_off.discard((kind, subject))
            if self.round is None:
                self.enter(w.iteration + 1, clock_us)
        elif iteration != w.iteration:
            self.enter(iteration, clock_us)
        elif self.round is None:
            if w.paused and not self.stopping:
                self._while_paused(now_us)
            allowed = self.stopping or kind in ("start", "error") or (kind == "outside" and w.paused)
            self.expect(allowed, f"{kind} of {subject} between iterations")
        agent: Agent | None = None
        if kind != "outside" and pattern is None:
            agent = w.agents.get(subject) if subject in self.members else self.gone.get(subject, (None, None))[0]
            self.expect(agent is not None, f"{kind} of {subject}, which is not registered")
        unit = Unit(kind, subject, agent, now_us, dict(w.state), len(w.history), background)
        if agent is not None:
            self._may_run(kind, agent, now_us)
            if live is not None:
                self._check_live(kind, agent, live)
                unit.metadata = live.metadata
        if kind == "tick":
            assert self.round is not None and agent is not None
            self.round.ticked.append(subject)
            if self.members[subject].every_s is not None:
                assert agent.period_us is not None
                self.expect(agent.next_us <= now_us, f"{subject} fires before its time")
                agent.next_us += agent.period_us * (1 + (now_us - agent.next_us) // agent.period_us)
        if kind == "error" and self.owed.get(subject):
            unit.of_loop = self.owed[subject].pop(0)
        if event is not None:
            unit.cursor = self._agent_cursor(agent.id) if agent else self._callback_cursor(subject, pattern or "")
            unit.event = self._delivered(unit, event, now_us)
            unit.of_loop = event[2] == LOOP
        self.open.add(unit)
        if background:
            self.background.append(unit)
        return unit

    def _may_run(self, kind: str, agent: Agent, now_us: int) -> None:
        name = agent.name
        if kind == "error":
            self.expect(bool(self.owed.get(name)), f"on_error of {name} without an error")
            return
        if kind == "shutdown":
            self.expect(self.stopping or name in self.leaving, f"on_shutdown of {name} while it runs")
            self.expect(name in self.started or name in self.leaving, f"on_shutdown of {name}, which did not start")
            self.started.discard(name)
            self.leaving.discard(name)
            return
        self.expect(agent.enabled, f"{kind} of {name}, which is disabled")
        self.expect(agent.retry_us <= now_us, f"{kind} of {name} during its back-off")
        self.expect(not any(unit.agent is agent for unit in self.background), f"{kind} of {name}, which is busy")
        self.expect((name in self.started) == (kind != "start"), f"{kind} of {name} before or after its on_start")

    def _check_live(self, kind: str, agent: Agent, live: Any) -> None:
        ticks = agent.ticks + (kind == "tick")
        self.expect(live.tick_count == ticks, f"{agent.name}.tick_count is {live.tick_count}, wanted is {ticks}")
        self.expect(
            live.error_count == agent.errors,
            f"{agent.name}.error_count is {live.error_count}, wanted is {agent.errors}",
        )
        if agent.name not in self.seen:
            self.seen.add(agent.name)
            found = live.metadata
            self.expect(found == agent.metadata, f"{agent.name}.metadata is {found}, saved was {agent.metadata}")

    def _delivered(self, unit: Unit, event: tuple[int, str, str, Any], now_us: int) -> ModelEvent | None:
        """Check that this is the one event that this subscriber must get now."""
        w, round, cursor = self.now, self.round, unit.cursor
        number, type, source, data = event
        if cursor is None or round is None:
            self.expect(False, f"{unit.subject} gets event {number} and has no subscription, or outside an iteration")
            return None
        round.delivering = True
        pending = w.pending(cursor)
        wanted = pending[0] if pending else None
        known = wanted is not None and wanted.id == number
        self.expect(known, f"{unit.subject} gets event {number} ({type}), wanted is {wanted}")
        if wanted is None or not known:
            return None
        same = (type, source) == (wanted.type, wanted.source) and wanted.data in (..., data)
        self.expect(same, f"{unit.subject} gets {event}, emitted was {wanted}")
        in_time = wanted.iteration < w.iteration or not wanted.in_delivery
        self.expect(in_time, f"event {number} is delivered in the delivery step in which it was emitted")
        self.expect(cursor.retry_us <= now_us, f"{unit.subject} gets event {number} again before its pause is over")
        return wanted

    def end(self, unit: Unit, outcome: str, now_us: int) -> None:
        """A hook has ended. One in the background takes effect later."""
        if unit not in self.open:
            return
        unit.slow = now_us - unit.now_us >= SLOW_AFTER_S * SECOND
        self.open.discard(unit)
        unit.outcome = outcome
        if not unit.background:
            self._apply(unit)

    def handed_over(self) -> None:
        """The loop has taken note of what ended in the background, in the order in which it began."""
        ended = [unit for unit in self.background if unit.outcome]
        self.background = [unit for unit in self.background if not unit.outcome]
        self.late += ended

    def abort(self) -> None:
        """The grace period is over: what still runs in the background is cancelled."""
        self.handed_over()
        self.aborted = True

    def _apply_late(self) -> None:
        if self.aborted:
            for unit in self.background:
                unit.outcome = unit.outcome or "cancelled"
            self.handed_over()
        late, self.late = self.late, []
        for unit in late:
            self._apply(unit)

    def _apply(self, unit: Unit) -> None:
        """The one moment at which a unit takes effect, whole or not at all."""
        w, agent = self.now, unit.agent
        if unit.kind == "outside":
            unit.outcome = unit.outcome or "success"
        if unit.outcome == "success":
            if unit.background and self._conflicts(unit):
                unit.outcome = "conflict"
            elif unit.metadata is not None and agent is not None:
                if "bad" in unit.metadata:
                    unit.outcome = "error"
                else:
                    agent.metadata = copy.deepcopy(unit.metadata)
        outcome = unit.outcome
        failed = outcome in ("error", "timeout")
        also = [] if agent is None else self._count(agent, unit, failed)
        if unit.of_loop:
            also = []
        if failed:
            if self.round is not None:
                self.round.errors += 1
            if (agent is not None or unit.cursor is not None) and not unit.of_loop:
                also.insert(0, "agent_error")
            if agent is not None and unit.kind != "error" and self._has_error(agent.name):
                self.owed.setdefault(agent.name, []).append(unit.of_loop)
                if self.round is None and w.paused and not self.stopping:
                    self.put_off.add(("error", agent.name))
        if unit.kind == "tick":
            ended = "agent.completed" if outcome == "success" else "agent.failed"
            also = [type for type in ("agent.started", ended) if self._wanted(type)] + also
        if unit.cursor is not None and unit.event is not None:
            self._move_cursor(unit.cursor, unit.event, unit, failed)
        if outcome != "success":
            unit.writes, unit.emitted, unit.added = {}, [], {}
        changed = self._write(unit)
        delivered = unit.cursor is not None and outcome == "success"
        if changed or unit.emitted or also or delivered or unit.slow or outcome != "success":
            self._row(agent, unit.kind, outcome)
        delivering = self.round is not None and self.round.delivering
        for type, source, data, due_us in unit.emitted:
            if due_us > unit.now_us:
                w.delayed_ids += 1
                w.delayed.append((due_us, w.delayed_ids, type, source, data))
            else:
                w.event(type, source, data, delivering)
        for type in also:
            w.event(type, LOOP, ..., delivering)
        if unit.kind == "start" and agent is not None and outcome == "success" and agent.name in self.members:
            self.started.add(agent.name)

    def _has_error(self, name: str) -> bool:
        member = self.members[name] if name in self.members else self.gone[name][1]
        return member.has_error

    def _conflicts(self, unit: Unit) -> bool:
        changed = {entry[0] for entry in self.now.history[unit.mark :]}
        return any(key in changed and key not in unit.added for key in unit.writes)

    def _count(self, agent: Agent, unit: Unit, failed: bool) -> list[str]:
        if unit.outcome == "success":
            agent.ticks += unit.kind == "tick"
            agent.events += unit.kind == "event"
            if unit.kind not in ("error", "shutdown"):
                agent.failures, agent.retry_us, agent.quarantined = 0, 0, False
        if not failed:
            return []
        agent.errors += 1
        if unit.kind == "error":
            return []
        agent.failures += 1
        if agent.failures >= QUARANTINE_AFTER:
            agent.retry_us = unit.now_us + PROBE_S * SECOND
            if not agent.quarantined:
                agent.quarantined = True
                return ["agent_quarantined"]
        elif agent.failures >= BACKOFF_AFTER:
            agent.retry_us = unit.now_us + min(LONGEST_BACKOFF_S, 2 ** (agent.failures - BACKOFF_AFTER)) * SECOND
        return []

    def _wanted(self, type: str) -> bool:
        """True where a pattern other than a bare `*` matches."""
        return any(
            cursor.wants(type) and any(set(pattern) != {"*"} for pattern in cursor.patterns)
            for cursor in self.now.cursors.values()
            if not cursor.ended
        )

    def _move_cursor(self, cursor: Cursor, event: ModelEvent, unit: Unit, failed: bool) -> None:
        if failed:
            cursor.attempts = cursor.attempts + 1 if cursor.attempt_event == event.id else 1
            cursor.attempt_event = event.id
            cursor.retry_us = unit.now_us + 2 ** (cursor.attempts - 1) * SECOND
        if unit.outcome == "success" or (failed and cursor.attempts >= ATTEMPTS):
            if failed:
                self.now.dead.append((cursor.id, event.id))
            cursor.position = event.id
            cursor.attempts, cursor.attempt_event, cursor.retry_us = 0, 0, 0

    def _write(self, unit: Unit) -> bool:
        w = self.now
        before = len(w.history)
        agent = 0 if unit.agent is None else unit.agent.id
        changed = {entry[0] for entry in w.history[unit.mark :]} if unit.background else set()
        for key, value in unit.writes.items():
            if key in unit.added and key in changed:
                value = w.state.get(key, 0) + unit.added[key]
            old = w.state.get(key)
            if old == value:
                continue
            if value is None:
                del w.state[key], w.setter[key]
            else:
                w.state[key] = value
                w.setter[key] = agent
            w.history.append((key, old, value, agent, w.iteration))
        return len(w.history) > before

    def _row(self, agent: Agent | None, kind: str, outcome: str) -> None:
        self.now.ticks.append((0 if agent is None else agent.id, self.now.iteration, kind, outcome))

    # -- commits, ends and rest --

    def committing(self, kind: str, iteration: int, now_us: int) -> None:
        """A commit is about to be written."""
        if iteration != self.now.iteration:
            self.enter(iteration, now_us)
        if kind == "iteration" and self.round is not None:
            self._lay_down_iteration()
        elif kind == "command":
            self._while_paused(now_us)
        elif kind == "shutdown":
            self._row(None, "shutdown", "success")
            self.now.event("ael_shutdown", LOOP, ..., False)
            self.now.runs[-1][0], self.now.runs[-1][2] = "stopped", self.now.iteration
            for name in sorted(self.started & set(self.members)):
                busy = any(unit.subject == name for unit in self.background)
                self.expect(busy, f"on_shutdown of {name} did not run")

    def committed(self) -> None:
        """What has taken effect is durable."""
        self.durable = self.now.copy()

    def crash(self) -> None:
        """The process is gone, and with it everything that was not committed."""
        self.now = self.durable.copy()
        self._reset()

    def rest(self, now_us: int) -> None:
        """The loop waits: nothing that is due may be left."""
        w = self.now
        if w.paused or self.stopping:
            return
        self.expect(not self.queue, f"changes from outside were not taken up: {self.queue}")
        self.expect(all(entry[0] > now_us for entry in w.delayed), f"delayed events are late: {w.delayed}")
        self.expect(not any(self.owed.values()), f"on_error did not run: {self.owed}")
        for cursor in w.cursors.values():
            if cursor.ended or cursor.retry_us > now_us:
                continue
            if cursor.agent is not None:
                name = w.names[cursor.agent]
                there = name in self.members and name in self.started and self._ready(w.agents[name], now_us)
            else:
                there = (cursor.subscriber, cursor.patterns[0]) in self.callbacks
            if there:
                self.expect(not w.pending(cursor), f"{cursor.subscriber} waits for {w.pending(cursor)[:1]}")
        for name in self.members:
            agent = w.agents[name]
            if self._ready(agent, now_us):
                self.expect(name in self.started, f"{name} was not started")
                late = self.members[name].every_s is not None and name in self.started and agent.next_us <= now_us
                self.expect(not late, f"{name} did not fire")

    # -- comparing --

    def compare(self, rows: Callable[[str], list[tuple[Any, ...]]], load: Callable[[str], Any]) -> None:
        """Compare the public views with what must be durable; `rows` answers a query, `load` reads JSON."""
        w = self.durable
        names = {0: OUTSIDE, **w.names}

        def same(what: str, found: list[Any], wanted: list[Any]) -> None:
            if found != wanted:
                odd = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), None)
                found_n, wanted_n = len(found), len(wanted)
                tail = found[wanted_n:][:3], wanted[found_n:][:3]
                self.violations.append(
                    f"{what}: {found_n} rows, wanted are {wanted_n}; first difference (found, wanted): {odd}, "
                    f"only in one: {tail}"
                )

        def value(text: str | None) -> Any:
            return None if text is None else load(text)

        same(
            "v_state",
            [(k, value(v), a) for k, v, a in rows("SELECT key, value, agent FROM v_state ORDER BY key")],
            [(key, w.state[key], names[w.setter[key]]) for key in sorted(w.state)],
        )
        same(
            "v_state_history",
            [
                (i, k, o, value(old), value(new), a, n)
                for i, k, o, old, new, a, n in rows(
                    "SELECT id, key, operation, old_value, new_value, agent, iteration FROM v_state_history ORDER BY id"
                )
            ],
            [
                (i, key, "delete" if new is None else "set", old, new, names[agent], iteration)
                for i, (key, old, new, agent, iteration) in enumerate(w.history, 1)
            ],
        )
        events = [
            (i, t, s, value(d), n)
            for i, t, s, d, n in rows("SELECT id, type, source, data, iteration FROM v_events ORDER BY id")
        ]
        wanted_events = [(e.id, e.type, e.source, e.data, e.iteration) for e in w.events]
        same(
            "v_events",
            [
                (*row[:3], ..., row[4]) if place < len(wanted_events) and wanted_events[place][3] is ... else row
                for place, row in enumerate(events)
            ],
            wanted_events,
        )
        same(
            "v_ticks",
            rows("SELECT agent, iteration, kind, outcome FROM v_ticks ORDER BY id"),
            [(names[agent], iteration, kind, outcome) for agent, iteration, kind, outcome in w.ticks],
        )
        same(
            "v_iterations",
            rows("SELECT iteration, run_id, ticks, errors, events, missed FROM v_iterations ORDER BY iteration"),
            [row[:-1] for row in w.iterations],
        )
        runs = [(status, first, w.iteration if last is None else last) for status, first, last in w.runs]
        same(
            "v_runs",
            rows("SELECT status, first_iteration, last_iteration FROM v_runs ORDER BY run_id"),
            [(status, first, last) if last >= first else (status, None, None) for status, first, last in runs],
        )
        same(
            "v_agents",
            [
                (*row[:-1], load(row[-1]))
                for row in rows(
                    "SELECT name, priority, enabled, status, tick_count, error_count, event_count, metadata "
                    "FROM v_agents ORDER BY name"
                )
            ],
            [
                (
                    name,
                    agent.priority,
                    int(agent.enabled),
                    _status(agent),
                    agent.ticks,
                    agent.errors,
                    agent.events,
                    agent.metadata,
                )
                for name, agent in sorted(w.agents.items())
                if agent.known
            ],
        )
        same(
            "v_pending",
            sorted(rows("SELECT subscriber, event_id, type, attempts FROM v_pending")),
            sorted(
                (cursor.subscriber, event.id, event.type, cursor.attempts if event.id == cursor.attempt_event else 0)
                for cursor in w.cursors.values()
                if not cursor.ended
                for event in w.pending(cursor)
            ),
        )
        same(
            "v_dead_letters",
            sorted(rows("SELECT subscriber, event_id, type, attempts FROM v_dead_letters")),
            sorted(
                (w.cursors[number].subscriber, event, w.events[event - 1].type, ATTEMPTS)
                for number, event in w.dead
                if not w.cursors[number].ended
            ),
        )


def _status(agent: Agent) -> str:
    if not agent.registered:
        return "absent"
    return "disabled" if not agent.enabled else "quarantined" if agent.quarantined else "active"
