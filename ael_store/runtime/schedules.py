"""Agents with a trigger of their own: when each fires next, kept in the database.

A fire time that passed while the process was down, or while the agent was busy, fires once, late. `every` counts
real time: when the wall clock is set, its next fire time moves with it. A cron line keeps to the wall. What the clock
skips fires once, late; what it repeats does not fire again, unless the line fires in each hour (it would be silent
for as long as the clock was set back) or the clock was set back by more than a day, which puts an error right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ael_store.clock import iso
from ael_store.model.records import ScheduleRecord
from ael_store.runtime.journal import Journal
from ael_store.runtime.trigger import FireTimes, parse_trigger

if TYPE_CHECKING:
    from ael_store.runtime.roster import AgentSlot

__all__ = ["Schedules"]

DAY_US = 86_400_000_000


class Schedules:
    """Fire times of the agents that have a trigger."""

    def __init__(self, journal: Journal, records: dict[int, ScheduleRecord], default_zone: str) -> None:
        self.journal = journal
        self.default_zone = default_zone
        self.records = records
        self._armed: dict[str, tuple[AgentSlot, FireTimes]] = {}

    def add(self, slot: AgentSlot, now_us: int) -> None:
        """Arm an agent's trigger: a known one goes on, a new or changed one starts from now."""
        text = slot.agent.trigger
        if text is None:
            return
        times = parse_trigger(text, self.default_zone, f"agent {slot.name!r}")
        record = self.records.get(slot.record.id)
        if record is None or record.trigger != text:
            record = self.records[slot.record.id] = ScheduleRecord(slot.record.id, text, times.after(now_us), None)
            self._moved(record)
        elif record.next_us is not None and record.next_us > now_us:
            self._bring_forward(record, times, now_us)  # the clock may have been set back since
        self._armed[slot.name] = (slot, times)

    def remove(self, name: str) -> None:
        self._armed.pop(name, None)

    def has(self, name: str) -> bool:
        return name in self._armed

    def due(self, now_us: int) -> list[AgentSlot]:
        """Return the agents whose time has come and that can run, higher priority first."""
        found = [slot for slot, _ in self._armed.values() if self._is_due(slot, now_us)]
        return sorted(found, key=lambda slot: (-slot.record.priority, slot.order))

    def _is_due(self, slot: AgentSlot, now_us: int) -> bool:
        next_us = self.records[slot.record.id].next_us
        return next_us is not None and next_us <= now_us and slot.started and slot.ready(now_us)

    def fired(self, slot: AgentSlot, now_us: int) -> None:
        """The agent's tick has been taken up: compute its next fire time; what was missed is one."""
        record = self.records[slot.record.id]
        _, times = self._armed[slot.name]
        last = record.next_us
        assert last is not None
        record.last_us = last
        if times.period_us is not None:
            record.next_us = last + times.period_us * (1 + (now_us - last) // times.period_us)
        else:
            record.next_us = times.after(max(last, now_us))
        self._moved(record)

    def jumped(self, by_us: int, now_us: int) -> None:
        """The wall clock was set: keep the distance of `every`, compute cron lines anew."""
        for slot, times in self._armed.values():
            record = self.records[slot.record.id]
            if record.next_us is None:
                continue
            if times.period_us is not None:
                record.next_us += by_us
            elif record.next_us > now_us:
                record.next_us = _next_on_the_wall(times, record, now_us, set_right=by_us < -DAY_US)
            self._moved(record)

    def _bring_forward(self, record: ScheduleRecord, times: FireTimes, now_us: int) -> None:
        """After a restart: a fire time is no further away than it can be."""
        assert record.next_us is not None
        soonest_us = times.after(now_us) if times.period_us is not None else _next_on_the_wall(times, record, now_us)
        if soonest_us is not None and soonest_us < record.next_us:
            record.next_us = soonest_us
            self._moved(record)

    def next_us(self, now_us: int) -> int | None:
        """Return the next fire time of an agent that can run now; the end of a back-off wakes by itself."""
        times = [
            record.next_us
            for slot, _ in self._armed.values()
            if (record := self.records[slot.record.id]).next_us is not None and slot.started and slot.ready(now_us)
        ]
        return min(times, default=None)

    def _moved(self, record: ScheduleRecord) -> None:
        self.journal.commit.schedules[record.agent_id] = record

    def log_moves(self) -> None:
        """Log the fire times that moved since the last commit, one row for each agent."""
        names = {slot.record.id: slot.name for slot, _ in self._armed.values()}
        for record in self.journal.commit.schedules.values():
            value = {
                "trigger": record.trigger,
                "next_at": None if record.next_us is None else iso(record.next_us),
                "last_at": None if record.last_us is None else iso(record.last_us),
            }
            self.journal.move("schedule", names.get(record.agent_id, str(record.agent_id)), value)


def _next_on_the_wall(times: FireTimes, record: ScheduleRecord, now_us: int, *, set_right: bool = False) -> int | None:
    """Return when a cron line fires next, without what it has fired already."""
    last_us = record.last_us
    if last_us is None or set_right or times.each_hour or last_us - now_us > DAY_US:
        return times.after(now_us)
    return times.after(max(now_us, last_us))
