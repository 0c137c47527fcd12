"""Why an agent did or did not run: what the loop knows right now, and what its history proves of past iterations.

A tick that changed nothing leaves no row, so that an agent ran is often a conclusion: it was due, nothing kept it,
and the iteration counted more ticks than there are rows. Each reason here is one that the loop itself goes by, in the
order in which it does (`roster.py`, `schedules.py`, `scheduler.py`); where the history can't tell, the answer says so.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ael_store.clock import iso
from ael_store.runtime.past_fires import Fire, past_fires
from ael_store.runtime.roster import LONGEST_BACKOFF_S, PROBE_S
from ael_store.runtime.scheduler import PERIODS, is_turn
from ael_store.schema.tables import KINDS, OUTCOMES

if TYPE_CHECKING:
    from ael_store.runtime.run import Run
    from ael_store.runtime.tick import Job
    from ael_store.settings import Settings
    from ael_store.store.agent_facts import AgentFacts

__all__ = ["agent_now", "explain"]

Row = dict[str, Any]

KIND_NAMES = {number: name for name, number in KINDS.items()}
OUTCOME_NAMES = {number: name for name, number in OUTCOMES.items()}

STARTING = "its on_start, or its on_upgrade,"

ORDINALS = {1: "every", 2: "every 2nd", 3: "every 3rd"}


def agent_now(run: Run, name: str) -> Row:
    """Return what a loop knows of an agent right now; `registered` is false where it has no such agent."""
    slot = run.roster.slots.get(name)
    now_us = run.clock.now_us()
    found: Row = {
        "at": iso(now_us),
        "iteration": run.journal.iteration,
        "paused": run.desk.paused,
        "strategy": run.scheduler.strategy,
        "max_agents": run.settings.max_agents,
        "registered": slot is not None,
    }
    if slot is None:
        return found
    job: Job | None = slot.busy  # type: ignore[assignment]
    record, trigger = slot.record, slot.agent.trigger
    next_us = run.schedules.records[record.id].next_us if trigger is not None else None
    return {
        **found,
        "enabled": bool(record.enabled),
        "ready": slot.started and slot.ready(now_us),
        "started": slot.started,
        "busy": None if job is None else job.hook,
        "busy_since": None if job is None else iso(job.unit.now_us),
        "retry_at": None if record.retry_us is None else iso(record.retry_us),
        "quarantined_at": None if record.quarantined_us is None else iso(record.quarantined_us),
        "ticked_by": "trigger" if trigger is not None else "clock" if name in run.roster.tickers else None,
        "trigger": trigger,
        "next_at": None if next_us is None else iso(next_us),
    }


def explain(facts: AgentFacts, now: Row | None, settings: Settings) -> list[Row]:
    """Return what the agent did in each iteration, newest first, or why it did nothing.

    `now` is what the running loop says, None where none answers. In a row `ran` is None where that can't be told.
    """
    return _Judge(facts, now, settings).rows()


class _Judge:
    def __init__(self, facts: AgentFacts, now: Row | None, settings: Settings) -> None:
        self.facts = facts
        self.now = now
        self.settings = settings
        self.record = facts.record
        self.name: str = facts.record["name"]
        self.flags = [move for move in facts.moves if move["kind"] == "flag"]
        self.fires = past_fires(facts, settings.timezone) if self._has_trigger() else {}

    def rows(self) -> list[Row]:
        rows = []
        for iteration in self.facts.iterations:
            if not iteration["asked"]:
                continue
            carrying = [unit for unit in self.facts.units if unit["iteration"] == iteration["id"]]
            units = [unit for unit in carrying if not _is_between(unit, iteration)]
            ran: bool | None
            if units:
                ran, reason, why = True, "ran", _in_words(units)
            else:
                ran, reason, why = self._reason(iteration)
            if len(units) < len(carrying):
                between = [unit for unit in carrying if unit not in units]
                why += f"; after it, before the next: {_in_words(between)}"
            pause = self._pause_before(iteration)
            rows.append(
                {
                    "iteration": iteration["id"],
                    "started_at": iso(iteration["started_us"]),
                    "clock": iteration["clocked"],
                    "ran": ran,
                    "reason": reason,
                    "why": f"{why}; {pause}" if pause else why,
                    "units": [
                        {
                            "id": unit["id"],
                            "kind": KIND_NAMES[unit["kind"]],
                            "outcome": OUTCOME_NAMES[unit["outcome"]],
                            "changes": unit["changes"],
                            "events": unit["events"],
                        }
                        for unit in carrying
                    ],
                }
            )
        return rows

    # -- what kept it --

    def _reason(self, iteration: Row) -> tuple[bool | None, str, str]:
        """Return whether it ran, in one word why, and in a sentence."""
        at_us = iteration["started_us"]
        return (
            self._not_there(at_us)
            or self._disabled(iteration)
            or self._ailing(iteration)
            or self._busy(at_us)
            or self._not_started(iteration)
            or (self._by_trigger(iteration) if self._has_trigger() else self._by_clock(iteration))
        )

    def _not_there(self, at_us: int) -> tuple[bool, str, str] | None:
        created_us = self.record["created_us"]
        if created_us > at_us:
            return False, "unknown_agent", f"it was registered for the first time later, at {iso(created_us)}"
        gone = not self.now["registered"] if self.now is not None else not self.record["registered"]
        seen = max(
            [unit["started_us"] for unit in self.facts.units] + [self.record["last_tick_us"] or 0], default=created_us
        )
        if gone and at_us > seen:
            return False, "absent", f"absent: the loop does not have it; it was there last at {iso(seen)} or later"
        return None

    def _disabled(self, iteration: Row) -> tuple[bool | None, str, str] | None:
        switches = [move for move in self.flags if move["subject"] == self.name and "enabled" in move["value"]]
        past = [move for move in switches if move["iteration"] <= iteration["id"] and _still_holds(move, iteration)]
        if past:
            move = past[-1]
            if move["value"]["enabled"]:
                return None
            if move["by"] is not None:
                since = f"since {iso(move['at_us'])} by {move['by']}"
            else:
                since = f"by the program since iteration {move['iteration']}"
            return False, "disabled", f"disabled {since}"
        # No switch before it is known: the next one tells, else what holds now.
        following = [move for move in switches if move["iteration"] > iteration["id"]]
        following += [move for move in self.facts.later if "enabled" in _value_of(move, self.name)]
        if following and following[0]["value"]["enabled"]:
            return None, "unknown", "disabled, or it ran without effect: it was enabled later, and before is not known"
        if following or self.record["enabled"]:
            return None
        by = "by an operator" if self.record["operator_enabled"] == 0 else "by its code"
        return False, "disabled", f"disabled {by}; since when is not in the history"

    def _ailing(self, iteration: Row) -> tuple[bool | None, str, str] | None:
        at_us, record = iteration["started_us"], self.record
        quarantined_us, retry_us, failed_us = record["quarantined_us"], record["retry_us"], record["last_error_us"]
        if quarantined_us is not None and quarantined_us <= at_us:
            probe = "" if retry_us is None else f", next probe at {iso(retry_us)}"
            why = f"quarantined since {iso(quarantined_us)}{probe}; `ael agents release` ends it"
            if not record["failures"] and not record["deaths"]:  # its data are newer than its code
                why = f"quarantined since {iso(quarantined_us)}: {record['last_error']}"
            return False, "quarantined", why
        if retry_us is not None and failed_us is not None and failed_us <= at_us < retry_us:
            return False, "backing_off", f"backing off after {_errors(record['failures'])} until {iso(retry_us)}"
        return self._ailing_by_its_errors(iteration)

    def _ailing_by_its_errors(self, iteration: Row) -> tuple[bool | None, str, str] | None:
        """Reckon a back-off of the past from the errors in a row before an iteration, as the roster does.

        A success that left no row may have been between two errors, so they are counted twice: those that can't have
        had one between them, and all of them.
        """
        at_us = iteration["started_us"]
        errors = self._errors_in_a_row(iteration)
        if not errors:
            return None
        mended = [m for m in self.flags if m["subject"] == self.name and m["value"].get("released")]
        if any(errors[-1]["iteration"] < move["iteration"] <= iteration["id"] for move in mended):
            return None
        surely = 0
        for place, unit in enumerate(errors):
            surely = surely + 1 if place and not self._may_have_succeeded(errors[place - 1], unit, surely) else 1
        word, until_us = self._kept_until(errors[-1], len(errors))
        if at_us >= until_us:
            return None
        why = f"{word.replace('_', ' ')} after {_errors(len(errors))} until {iso(until_us)}, reckoned from its errors"
        if at_us < self._kept_until(errors[-1], surely)[1] or self._surely_idle(iteration):
            return False, word, why
        if self._has_trigger():
            return None
        return None, "unknown", f"{why}, unless it ran without effect meanwhile: the history does not tell"

    def _errors_in_a_row(self, iteration: Row) -> list[Row]:
        """Return the failed units right before an iteration, oldest first."""
        failed = (OUTCOMES["error"], OUTCOMES["timeout"])
        found: list[Row] = []
        for unit in reversed(self.facts.units):
            if unit["iteration"] >= iteration["id"] or unit["kind"] == KINDS["error"]:
                continue
            if unit["outcome"] in failed:
                found.append(unit)
            elif unit["kind"] != KINDS["shutdown"]:
                break
        return found[::-1]

    def _kept_until(self, last: Row, failures: int) -> tuple[str, int]:
        """Return in which way, and until when, an agent is kept after so many errors in a row."""
        settings, failed_us = self.settings, last["started_us"]
        if failures >= settings.quarantine_after:
            return "quarantined", failed_us + PROBE_S * 1_000_000
        if failures < settings.backoff_after:
            return "", failed_us
        return "backing_off", failed_us + min(LONGEST_BACKOFF_S, 2 ** (failures - settings.backoff_after)) * 1_000_000

    def _may_have_succeeded(self, one: Row, other: Row, failures: int) -> bool:
        """True where there is room for a success between two errors, the first of which was that many in a row."""
        if other["iteration"] - one["iteration"] <= 1:
            return False
        free_us = self._kept_until(one, failures)[1]
        between = [it for it in self.facts.iterations if one["iteration"] < it["id"] < other["iteration"]]
        all_known = len(between) == other["iteration"] - one["iteration"] - 1
        return not all_known or any(it["started_us"] >= free_us for it in between)

    def _surely_idle(self, iteration: Row) -> bool:
        """True where the agent can't have run a tick that left no row."""
        if self._has_trigger():
            return self.fires.get(iteration["id"], Fire(None, None)).fired is False
        return self._unproven(iteration) <= 0

    def _unproven(self, iteration: Row) -> int:
        """Return how many ticks of an iteration have left no row."""
        return int(iteration["ticks"]) - self.facts.ticks.get(iteration["id"], 0)

    def _busy(self, at_us: int) -> tuple[bool, str, str] | None:
        for unit in self.facts.units:
            if unit["started_us"] < at_us < unit["started_us"] + unit["duration_us"]:
                hook = f"on_{KIND_NAMES[unit['kind']]}"
                took = f"took {unit['duration_us'] / 1e6:.3g} s"
                return False, "busy", f"its {hook} of {iso(unit['started_us'])} still ran, in unit {unit['id']}: {took}"
        if self.now is not None and self.now.get("busy_since") is not None and self.now["busy_since"] < iso(at_us):
            return False, "busy", f"its {self.now['busy']} still runs, since {self.now['busy_since']}"
        return None

    def _not_started(self, iteration: Row) -> tuple[bool, str, str] | None:
        starts = [unit for unit in self.facts.units if unit["kind"] != KINDS["error"]]
        starts = [unit for unit in starts if unit["iteration"] <= iteration["id"]]
        if starts and starts[-1]["kind"] == KINDS["start"] and starts[-1]["outcome"] != OUTCOMES["success"]:
            return False, "not_started", f"{STARTING} has not succeeded yet: unit {starts[-1]['id']} failed"
        if self.now is not None and self.now.get("started") is False:
            return False, "not_started", f"{STARTING} has not succeeded yet"
        return None

    # -- whose turn it was --

    def _has_trigger(self) -> bool:
        if self.now is not None and self.now["registered"]:
            return bool(self.now["ticked_by"] == "trigger")
        return self.facts.schedule is not None

    def _by_trigger(self, iteration: Row) -> tuple[bool | None, str, str]:
        schedule = self.facts.schedule or {"trigger": self.now["trigger"] if self.now else "?"}
        trigger = f"its trigger {schedule['trigger']!r}"
        fire = self.fires.get(iteration["id"], Fire(None, None))
        at_us, until_us = iteration["started_us"], fire.next_us
        if fire.fired:
            return True, "no_effect", f"{trigger} fired, and it ran without effect: such a tick leaves no row"
        if until_us is not None and until_us > at_us and fire.fired is False:
            return False, "trigger_not_due", f"{trigger} was not due until {iso(until_us)}"
        if fire.fired is None or until_us is None:
            return None, "unknown", f"{trigger} was not due, or it ran without effect: the history does not tell"
        why = f"{trigger} was due at {iso(until_us)}, and it did not run: why is not in the history"
        return False, "unknown", why

    def _by_clock(self, iteration: Row) -> tuple[bool | None, str, str]:
        if iteration["clocked"] is False:
            why = (
                "no iteration of the clock: the loop was woken by an event, a task, a trigger or a change from outside"
            )
            return False, "not_clock", why
        if self.now is not None and self.now["registered"] and self.now["ticked_by"] is None:
            return False, "no_tick", "it has no on_tick: it only handles events and tasks"
        if self.now is None and not self.record["measured"]:
            return False, "no_tick", "it was never ticked; where it has no on_tick it only handles events and tasks"
        if iteration["clocked"] is None:
            return None, "unknown", "whether this was an iteration of the clock is before the beginning of the history"
        unproven = self._unproven(iteration)
        run = self.facts.runs.get(iteration["run_id"])
        strategy = None if run is None else run["strategy"]
        if strategy == "priority":
            return self._by_priority(iteration, unproven)
        if strategy is None:
            tail = "by which strategy agents were chosen is not in the history"
            if unproven <= 0:
                return False, "not_selected", f"not selected; {tail}"
            return None, "unknown", f"not selected, or it ran without effect; {tail}"
        return self._by_turns(iteration, unproven, strategy)

    def _by_priority(self, iteration: Row, unproven: int) -> tuple[bool | None, str, str]:
        """Decide with the scheduler's own rule; who was cut by `max_agents` waits, and its position tells of that."""
        clock, priority = iteration["clock"], self._priority(iteration)
        before, after = self._waiting(iteration)
        turn = is_turn(self.name, priority, clock)
        if after is not None and self.name in after:
            why = f"due since iteration {after[self.name]} of the clock, but cut by max_agents: it stays due"
            return False, "not_selected", f"{why}, {iteration['ticks']} others ran"
        if not turn and before is not None and self.name not in before:
            period = PERIODS[priority]
            following = next(n for n in range(clock + 1, clock + period + 1) if is_turn(self.name, priority, n))
            rule = f"priority {priority} has it run in {_every(period)} iteration of the clock"
            return False, "not_its_turn", f"not its turn: {rule}; this was {clock}, its next is {following}"
        if after is None or (before is None and not turn):
            # Who was cut is logged once for iterations that were committed together.
            if unproven <= 0:
                return False, "not_selected", "cut by max_agents, or not its turn: which of them is not in the history"
            return (
                None,
                "unknown",
                "cut by max_agents, not its turn, or it ran without effect: the history does not tell",
            )
        if unproven <= 0 and self._is_last_of_its_run(iteration):
            return False, "stopping", "it was its turn, but the loop was told to stop before that came"
        if unproven <= 0:
            why = "it was its turn, and every tick of this iteration was another agent's: why is not in the history"
            return False, "unknown", why
        return True, "no_effect", "it was its turn, and it ran without effect: such a tick leaves no row"

    def _is_last_of_its_run(self, iteration: Row) -> bool:
        """True for the last iteration of the clock in a run that has ended: what was still to be ticked was left."""
        run = self.facts.runs.get(iteration["run_id"])
        following = [one for one in self.facts.iterations if one["id"] > iteration["id"]]
        clocked = any(one["run_id"] == iteration["run_id"] and one["clocked"] is not False for one in following)
        return self.facts.until_now and run is not None and run["ended_us"] is not None and not clocked

    def _by_turns(self, iteration: Row, unproven: int, strategy: str) -> tuple[bool | None, str, str]:
        ran, takers = iteration["ticks"], self.facts.takers
        run = self.facts.runs[iteration["run_id"]]
        cuts = ["the budget of time"] if strategy == "load_aware" else []
        if "max_agents" not in run:
            cuts.append("max_agents")
        elif run["max_agents"] is not None:
            cuts.append(f"max_agents = {run['max_agents']}")
        counts = f"{takers} agent{' takes' if takers == 1 else 's take'} turns now, {ran} ran"
        why = f"not selected by {strategy} ({' or '.join(cuts)}; {counts})" if cuts else f"not selected ({counts})"
        if unproven <= 0:
            stop = ", or the loop was told to stop first" if self._is_last_of_its_run(iteration) else ""
            return False, "not_selected", f"{why}{stop}"
        if not cuts or ran - self.facts.triggered >= self.facts.takers_ever:
            return True, "no_effect", "it was its turn, and it ran without effect: such a tick leaves no row"
        return None, "unknown", f"{why}, or it ran without effect: the history does not tell"

    def _priority(self, iteration: Row) -> int:
        said = [move for move in self.flags if move["subject"] == self.name and "priority" in move["value"]]
        past = [move for move in said if move["iteration"] <= iteration["id"]]
        return int(past[-1]["value"]["priority"] if past else self.record["priority"])

    def _waiting(self, iteration: Row) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        """Return who was cut and waited before an iteration, and after it; None where that is not known.

        The scheduler's position is logged with each commit in which it has moved, and idle iterations share one.
        """
        moves = [move for move in self.facts.moves if move["kind"] == "scheduler"]
        earlier = [move for move in moves if move["commit_id"] < iteration["commit_id"]]
        here = [move for move in moves if move["commit_id"] == iteration["commit_id"]]
        before = _waiters(earlier[-1]) if earlier else {}
        if not here:
            return before, {}
        together = [one["id"] for one in self.facts.iterations if one["commit_id"] == iteration["commit_id"]]
        return (
            before if iteration["id"] == min(together) else None,
            _waiters(here[-1]) if iteration["id"] == max(together) else None,
        )

    # -- pauses --

    def _pause_before(self, iteration: Row) -> str:
        """Say that the loop was paused before an iteration; nothing where it was not."""
        pauses = [m for m in self.flags if m["subject"] == "loop" and m["iteration"] == iteration["id"]]
        paused = next((move for move in pauses if move["value"].get("paused")), None)
        if paused is None:
            return ""
        since = "" if paused["at_us"] is None else f" since {iso(paused['at_us'])}"
        by = "" if paused["by"] is None else f" by {paused['by']}"
        return f"the loop was paused before it{since}{by}"


def _still_holds(move: Row, iteration: Row) -> bool:
    """True where a switch counts for an iteration: an operator's survives restarts, that of code does not."""
    return "priority" not in move["value"] or move["run_id"] == iteration["run_id"]


def _is_between(unit: Row, iteration: Row) -> bool:
    """True for hooks of the start or end of a run, which carry the number of the last iteration begun."""
    over_us = iteration["started_us"] + iteration["duration_us"]
    return unit["kind"] in (KINDS["start"], KINDS["shutdown"]) and unit["started_us"] >= over_us


def _value_of(move: Row, name: str) -> Row:
    is_its = move["kind"] == "flag" and move["subject"] == name
    return dict(move["value"]) if is_its else {}


def _waiters(move: Row) -> dict[str, int]:
    return dict(json.loads(move["value"]["position"]).get("waiting", {}))


# -- words ------------------------------------------------------------------------------------------


def _in_words(units: list[Row]) -> str:
    parts = []
    for unit in units:
        text = f"{KIND_NAMES[unit['kind']]} (unit {unit['id']}): {OUTCOME_NAMES[unit['outcome']]}"
        for count, noun in ((unit["changes"], "change"), (unit["events"], "event")):
            if count:
                text += f", {count} {noun}{'' if count == 1 else 's'}"
        if unit["cause_event_id"] is not None:
            text += f", for event {unit['cause_event_id']}"
        if unit["cause_task_id"] is not None:
            text += f", for task {unit['cause_task_id']}"
        parts.append(text)
    return "; ".join(parts)


def _errors(count: int) -> str:
    return f"{count} error{'' if count == 1 else 's'} in a row"


def _every(period: int) -> str:
    return ORDINALS.get(period, f"every {period}th")
