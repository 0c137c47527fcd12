"""The agents of a run: what is known of each, whether it may run now, and how it is doing.

After errors in a row an agent backs off, later it is quarantined; so it is after taking the process down several
times in a row. All of this lives in its record, so it survives a restart. The rule for running is one: enabled,
started, not busy, and not before `retry_us` (the end of a back-off, or the next probe of a quarantine).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING

import orjson

from ael_store.errors import InvalidAgent
from ael_store.model.event import Emission
from ael_store.model.records import AgentRecord, AgentStats, Resumed
from ael_store.model.unit import Unit
from ael_store.model.values import encode
from ael_store.runtime.agent import HOOKS, AgentBase, check_agent, fingerprint, overrides
from ael_store.runtime.journal import Journal, loop_event

if TYPE_CHECKING:
    from ael_store.settings import Settings
    from ael_store.store.unit_note import NotedUnit

__all__ = ["AgentSlot", "Roster"]

LONGEST_BACKOFF_S = 300
PROBE_S = 3600

log = logging.getLogger("ael_store.agents")


class AgentSlot:
    """One agent in a run."""

    __slots__ = (
        "agent",
        "busy",
        "has_tick",
        "leaving",
        "limit_s",
        "order",
        "record",
        "refused",
        "started",
        "stats",
        "threaded",
        "upgrade_from",
    )

    def __init__(
        self, agent: AgentBase, record: AgentRecord, stats: AgentStats, order: int, default_limit_s: float
    ) -> None:
        self.agent = agent
        self.record = record
        self.stats = stats
        self.order = order
        self.started = False
        self.leaving = False
        """Unregistered while a hook runs; `on_shutdown` is still to come."""
        self.busy: object | None = None
        """The job that runs now."""
        self.upgrade_from: int | None = None
        """The version of the data, where the code is newer and `on_upgrade` is still to come."""
        self.refused: str | None = None
        """Why none of its hooks may run: its data are newer than its code."""
        self.limit_s = default_limit_s if agent.tick_timeout is None else float(agent.tick_timeout)
        self.has_tick = overrides(agent, "on_tick") or not agent.subscriptions
        self.threaded = {hook: not iscoroutinefunction(getattr(agent, hook)) for hook in HOOKS}

    @property
    def name(self) -> str:
        return self.record.name

    def ready(self, now_us: int) -> bool:
        """True where a hook of this agent may run now."""
        record = self.record
        return (
            self.busy is None
            and record.enabled == 1
            and (record.retry_us is None or record.retry_us <= now_us)
            and self.refused is None
        )

    def away(self) -> str | None:
        """Say why the agent does nothing for the time being; None where it is there."""
        if not self.record.enabled:
            return "disabled"
        return "quarantined" if self.record.quarantined_us is not None else None

    def show_counts(self) -> None:
        """Put the counts where the agent's code sees them."""
        agent = self.agent
        object.__setattr__(agent, "tick_count", self.stats.ticks)
        object.__setattr__(agent, "error_count", self.stats.errors)


class Roster:
    """Slots by name, in order of registration."""

    def __init__(self, journal: Journal, settings: Settings, resumed: Resumed) -> None:
        self.journal = journal
        self.settings = settings
        self.slots: dict[str, AgentSlot] = {}
        self._by_id: dict[int, AgentSlot] = {}
        self.stats = dict(resumed.stats)
        self.records = {name: record for name, record in resumed.agents.items() if record.id in self.stats}
        self._forgotten = {name: record for name, record in resumed.agents.items() if record.id not in self.stats}
        """Agents that an operator has forgotten: only their names stay, for the history."""
        self.tickers: dict[str, AgentSlot] = {}
        """Those that the clock ticks: with an `on_tick`, without a trigger."""
        self._ailing: set[str] = set()
        self._died_in: dict[int, str] = {}
        """The kind of unit in which an agent took the last run down."""
        self._order = 0
        self._refusals: list[Emission] = []

    def __iter__(self) -> Iterator[AgentSlot]:
        return iter(self.slots.values())

    def slot_of(self, agent_id: int) -> AgentSlot | None:
        """Return the slot of an agent by its number; None where it is not registered."""
        return self._by_id.get(agent_id)

    # -- coming and going --

    def add(self, agent: AgentBase, now_us: int) -> tuple[AgentSlot, str | None]:
        """Give an agent its slot, with everything that the database knows of its name or of an alias.

        Returns the slot, and the alias that it was known by.
        """
        check_agent(agent)
        record, alias = self.records.get(agent.name), None
        if record is None:
            record, alias = self._adopt(agent)
        is_first = record is None
        if record is None and agent.name in self._forgotten:
            record = self.records[agent.name] = self._forgotten.pop(agent.name)
            record.created_us = now_us
        class_path = f"{type(agent).__module__}:{type(agent).__qualname__}"
        code = fingerprint(agent)
        if record is None:
            self.journal.agent_id += 1
            record = AgentRecord(
                self.journal.agent_id,
                agent.name,
                class_path,
                code,
                agent.priority,
                int(agent.enabled),
                None,
                1,
                0,
                None,
                None,
                "{}",
                None,
                None,
                now_us,
                0,
            )
            self.records[agent.name] = record
        if record.fingerprint != code and (record.retry_us is not None or record.failures or record.deaths):
            log.info("agent %s: its code has changed, so its errors in a row are forgotten", agent.name)
            self._mend(record)
        record.class_path, record.fingerprint, record.registered = class_path, code, 1
        record.priority = agent.priority
        if record.operator_enabled is not None:
            object.__setattr__(agent, "enabled", bool(record.operator_enabled))
        record.enabled = int(agent.enabled)
        stats = self.stats.get(record.id)
        if stats is None:
            stats = self.stats[record.id] = AgentStats(record.id)
        slot = AgentSlot(agent, record, stats, self._order, self.settings.tick_timeout)
        self._order += 1
        self._compare_versions(slot, now_us, is_first)
        self.slots[agent.name] = self._by_id[record.id] = slot
        if slot.has_tick and agent.trigger is None:
            self.tickers[agent.name] = slot
        if record.retry_us is not None:
            longest_s = LONGEST_BACKOFF_S if record.quarantined_us is None else PROBE_S
            record.retry_us = min(record.retry_us, now_us + longest_s * 1_000_000)  # the clock may have been set back
            self._ailing.add(agent.name)
        if record.metadata != "{}":
            agent.metadata.clear()
            agent.metadata.update(orjson.loads(record.metadata))
        slot.show_counts()
        self.journal.changed(record)
        self.journal.changed(stats)
        return slot, alias

    def _compare_versions(self, slot: AgentSlot, now_us: int, is_first: bool) -> None:
        """See whether the agent's data are of the version of its code: else they are to be upgraded, or left alone."""
        record, version = slot.record, slot.agent.version
        stored = record.data_version or 0
        if version < stored and not is_first:
            slot.refused = (
                f"its data are of version {stored}, its code is of version {version} and would not understand them: "
                "go back to the newer code, or restore a backup from before the upgrade"
            )
            log.error("agent %s does not run: %s", slot.name, slot.refused)
            if record.quarantined_us is None:
                record.quarantined_us = now_us
            record.failures, record.deaths, record.retry_us = 0, 0, None
            record.last_error, record.last_error_us = slot.refused, now_us
            self._refusals.append(
                loop_event("agent_quarantined", {"agent": slot.name, "failures": 0, "deaths": 0, "error": slot.refused})
            )
            return
        if record.quarantined_us is not None and not record.failures and not record.deaths:  # it was refused before
            self._mend(record)
        if is_first:
            record.data_version = version or None
        elif version > stored:
            slot.upgrade_from = stored
            if not overrides(slot.agent, "on_upgrade"):
                self.upgraded(slot, None)

    def upgraded(self, slot: AgentSlot, tick_id: int | None) -> None:
        """The agent's data are of the version of its code now; `tick_id` is the unit that made them so, if any."""
        before, slot.upgrade_from = slot.upgrade_from, None
        slot.record.data_version = slot.agent.version
        self.journal.changed(slot.record)
        self.journal.move("version", slot.name, {"from": before, "to": slot.agent.version, "unit": tick_id})
        log.info("agent %s: its data are upgraded from version %s to %d", slot.name, before, slot.agent.version)

    def take_refusals(self) -> list[Emission]:
        """Return the events of the loop that tell of agents which do not run because of their version."""
        refusals, self._refusals = self._refusals, []
        return refusals

    def _adopt(self, agent: AgentBase) -> tuple[AgentRecord | None, str | None]:
        for alias in agent.aliases:
            record = self.records.get(alias)
            if record is not None and alias not in self.slots:
                self.rename(alias, agent.name)
                self.journal.move("flag", agent.name, {"renamed_from": alias})
                log.info("agent %s takes over state, statistics and cursors of %s", agent.name, alias)
                return record, alias
        return None, None

    def rename(self, name: str, new_name: str) -> None:
        """Give an agent that is not registered another name; a forgotten one that bore it gives it up."""
        record = self.records.pop(name)
        before = self._forgotten.pop(new_name, None)
        if before is not None:
            before.name = f"({new_name} {before.id})"
            self._forgotten[before.name] = before
            self.journal.commit.agents.pop(record.id, None)  # names are unique: the other one is written first
            self.journal.changed(before)
        self.records[new_name] = record
        record.name = new_name
        self.journal.changed(record)

    def forget(self, name: str) -> None:
        """Keep nothing of an agent that is not registered but its name."""
        record = self.records.pop(name)
        self.stats.pop(record.id, None)
        self._forgotten[name] = record

    def remove(self, name: str) -> AgentSlot:
        """Take an agent out; what the database knows of it stays."""
        slot = self.slots.pop(name)
        del self._by_id[slot.record.id]
        self.tickers.pop(name, None)
        self._ailing.discard(name)
        slot.record.registered = 0
        self.journal.changed(slot.record)
        return slot

    def absent(self) -> None:
        """Mark every known agent that is not registered as absent."""
        for name, record in self.records.items():
            if name not in self.slots and record.registered:
                record.registered = 0
                self.journal.changed(record)

    # -- flags --

    def follow(self, agent: AgentBase) -> None:
        """Take over `enabled` and `priority` that code has changed on the agent."""
        slot = self.slots.get(agent.name)
        if slot is None or slot.agent is not agent:
            return
        record = slot.record
        if type(agent.priority) is int and 0 <= agent.priority <= 10:
            record.priority = agent.priority
        if record.operator_enabled is None:
            record.enabled = int(agent.enabled)
        elif record.operator_enabled != int(agent.enabled):
            log.warning(
                "agent %s: enabled=%s is not taken over, an operator has said otherwise", slot.name, agent.enabled
            )
            object.__setattr__(agent, "enabled", bool(record.operator_enabled))
        self.journal.changed(record)
        self.journal.move("flag", agent.name, {"enabled": bool(record.enabled), "priority": record.priority})

    def set_enabled(self, name: str, enabled: bool) -> AgentRecord:
        """Carry out an operator's word; it wins over the class and survives restarts."""
        record = self.known(name)
        record.operator_enabled = record.enabled = int(enabled)
        slot = self.slots.get(name)
        if slot is not None:
            object.__setattr__(slot.agent, "enabled", enabled)
        self.journal.changed(record)
        self.journal.move("flag", name, {"enabled": enabled})
        return record

    def release(self, name: str) -> AgentRecord:
        """End back-off and quarantine of an agent."""
        record = self.known(name)
        slot = self.slots.get(name)
        if slot is not None and slot.refused is not None:
            raise InvalidAgent(f"agent {name!r} can't be released: {slot.refused}")
        self._mend(record)
        self.journal.changed(record)
        self.journal.move("flag", name, {"released": True})
        return record

    def known(self, name: str) -> AgentRecord:
        """Return the record of an agent; raises InvalidAgent naming those that exist."""
        record = self.records.get(name)
        if record is None:
            from ael_store.errors import AgentNotFound

            known = ", ".join(sorted(self.records)) or "none"
            raise AgentNotFound(f"no agent {name!r} is known; known are: {known}")
        return record

    # -- after a unit --

    def save_metadata(self, slot: AgentSlot, unit: Unit) -> str | None:
        """Return the agent's metadata as text if it has changed; raises where it is not JSON."""
        metadata = slot.agent.metadata
        if not isinstance(metadata, dict):
            raise InvalidAgent(f"agent {slot.name!r}: metadata is {type(metadata).__name__}, wanted is a dict")
        if not metadata and slot.record.metadata == "{}":
            return None
        text = encode(metadata, f"metadata of agent {slot.name!r}", unit.limits)
        return None if text == slot.record.metadata else text

    def count(self, slot: AgentSlot, unit: Unit) -> list[Emission]:
        """Count a finished unit and judge the agent's health; returns events of the loop that this makes."""
        record, stats = slot.record, slot.stats
        if unit.kind == "tick":
            stats.last_tick_us = unit.now_us
            if unit.outcome not in ("conflict", "cancelled"):
                stats.measure(unit.duration_us)
        made: list[Emission] = []
        if unit.outcome == "success":
            if unit.kind == "tick":
                stats.ticks += 1
            elif unit.kind == "event":
                stats.events += 1
            ailing = record.failures or record.deaths or record.retry_us is not None
            if ailing and self._proves_health(record, unit):
                self._mend(record)
                self.journal.changed(record)
        elif unit.outcome in ("error", "timeout"):
            stats.errors += 1
            record.last_error = str(unit.failure)[:500]
            record.last_error_us = unit.now_us
            if unit.kind != "error":
                made = self._fail(slot, unit)
            self.journal.changed(record)
        self.journal.commit.stats[stats.agent_id] = stats
        slot.show_counts()
        return made

    def _fail(self, slot: AgentSlot, unit: Unit) -> list[Emission]:
        record, settings = slot.record, self.settings
        record.failures += 1
        if record.failures >= settings.backoff_after:
            self._ailing.add(slot.name)
        if record.failures >= settings.quarantine_after or record.quarantined_us is not None:
            record.retry_us = unit.now_us + PROBE_S * 1_000_000
            if record.quarantined_us is None:
                record.quarantined_us = unit.now_us
                log.error(
                    "agent %s is quarantined after %d errors in a row; one probe an hour, or `ael agents release %s`",
                    slot.name,
                    record.failures,
                    slot.name,
                )
                return [
                    loop_event(
                        "agent_quarantined",
                        {
                            "agent": slot.name,
                            "failures": record.failures,
                            "deaths": record.deaths,
                            "error": record.last_error,
                        },
                    )
                ]
        elif record.failures >= settings.backoff_after:
            wait_s = min(LONGEST_BACKOFF_S, 2 ** (record.failures - settings.backoff_after))
            record.retry_us = unit.now_us + wait_s * 1_000_000
            log.warning("agent %s: %d errors in a row, next try in %d s", slot.name, record.failures, wait_s)
        return []

    def _proves_health(self, record: AgentRecord, unit: Unit) -> bool:
        """True where the success of this unit ends a back-off or a quarantine.

        What runs whatever the agent's health proves nothing; nor does another hook than the one in which the
        process died: a good `on_start` before each deadly `on_tick` would let it go on for ever.
        """
        if unit.kind in ("error", "shutdown"):
            return False
        return self._died_in.get(record.id, unit.kind) == unit.kind

    def _mend(self, record: AgentRecord) -> None:
        record.failures, record.deaths, record.retry_us, record.quarantined_us = 0, 0, None, None
        self._died_in.pop(record.id, None)

    def jumped(self, by_us: int) -> None:
        """The wall clock was set: pauses take as long as they would have."""
        for record in self.records.values():
            if record.retry_us is not None:
                record.retry_us += by_us
                self.journal.changed(record)

    # -- after the process died --

    def blame(self, unit: NotedUnit, why: str, now_us: int) -> list[Emission]:
        """Count that the process died while a unit ran; returns events of the loop that this makes.

        `why` tells of the death, for `last_error`. Several units may have run: each is suspected, and the innocent
        are acquitted by their next success.
        """
        record = self.records.get(unit.subject)
        if record is None:
            return []
        record.deaths += 1
        record.last_error, record.last_error_us = why[:500], now_us
        if unit.kind not in ("error", "shutdown"):
            self._died_in[record.id] = unit.kind
        self.journal.changed(record)
        limit = self.settings.quarantine_after_deaths
        if not limit or record.deaths < limit:
            return []
        record.retry_us = now_us + PROBE_S * 1_000_000
        if record.quarantined_us is not None:
            return []
        record.quarantined_us = now_us
        log.error(
            "agent %s is quarantined: %s; one probe an hour, or `ael agents release %s`", record.name, why, record.name
        )
        return [
            loop_event(
                "agent_quarantined",
                {"agent": record.name, "failures": record.failures, "deaths": record.deaths, "error": why[:500]},
            )
        ]

    def next_retry_us(self, now_us: int) -> int | None:
        """Return when the next back-off of an enabled agent ends."""
        times: list[int] = []
        for name in list(self._ailing):
            slot = self.slots.get(name)
            if slot is None or slot.record.retry_us is None:
                self._ailing.discard(name)
            elif slot.record.enabled and slot.record.retry_us > now_us:
                times.append(slot.record.retry_us)
        return min(times, default=None)
