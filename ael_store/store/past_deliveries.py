"""Subscriptions with their cursors, dead letters and delayed events, as they were at a past moment.

A cursor is where the last unit that moved it has put it, or a move that tells of a dead letter or of skipped events.
One that nothing had moved by then stands before the first event that moved it later, which is the same to its
subscriber. Patterns that an agent has changed since are not told by anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ael_store.model.event import compile_patterns
from ael_store.model.records import DeadLetterRecord, DelayedRecord, SubscriptionRecord
from ael_store.store.past import Past, Rewind, records_of

__all__ = ["rewind_delayed", "rewind_deliveries"]

FIRST_RETRY_US = 1_000_000
"""How long the first pause after a failed delivery is; twice as long each time (`runtime/delivery.py`)."""


class _Cursors:
    """What has moved each cursor, before the moment and after it."""

    def __init__(self, past: Past) -> None:
        self.last: dict[int, int] = {}
        """The last event that a subscription had handled, laid aside or skipped."""
        self.first: dict[int, int] = {}
        """The first event that it handled or laid aside after the moment."""
        self.skipped: dict[int, int] = {}
        """How many events it skipped after the moment."""
        self.buried: set[tuple[int, int]] = set()
        """Subscription and event of dead letters that were laid down after the moment."""
        t = past.moment.tick_id
        for number, last, first in past.rows(
            "SELECT subscription_id, max(CASE WHEN id <= :t THEN cause_event_id END), "
            "min(CASE WHEN id > :t THEN cause_event_id END) FROM ticks WHERE subscription_id IS NOT NULL GROUP BY 1",
            t=t,
        ):
            if last is not None:
                self.last[number] = last
            if first is not None:
                self.first[number] = first
        for move, text in past.rows("SELECT id, value FROM moves WHERE kind = 'cursor' ORDER BY id"):
            said = json.loads(text)
            number, event_id = said["subscription"], said.get("dead_letter", said.get("until"))
            if move <= past.move_id:
                self.last[number] = max(self.last.get(number, 0), event_id)
            elif "dead_letter" in said:
                self.buried.add((number, event_id))
                self.first[number] = min(self.first.get(number, event_id), event_id)
            else:
                self.skipped[number] = self.skipped.get(number, 0) + said["skipped"]

    def at_moment(self, past: Past, now: SubscriptionRecord) -> int:
        if now.id in self.last:
            return self.last[now.id]
        until = past.moment.event_id
        if now.id in self.first:
            return min(until, self.first[now.id] - 1)
        if now.id in self.skipped:
            return min(
                until,
                past.number("SELECT max(event_id + events) FROM ticks WHERE started_us < :c", c=now.created_us),
            )
        return min(until, now.cursor)


def rewind_deliveries(past: Past, rewind: Rewind) -> None:
    """Cursors and dead letters that came later go, those that ended later live, and each stands where it stood."""
    if past.is_present:
        return
    cursors = _Cursors(past)
    known = _subscriptions(past)
    live = _rewind_subscriptions(past, rewind, cursors, known)
    _rename_callbacks(past, live)
    _count_attempts(past, live)
    for then in live:
        rewind.commit.subscriptions[then.id] = then
    _tell_what_is_gone(past, rewind, live)
    _rewind_letters(past, rewind, cursors, {record.id: record for record in known})


def _subscriptions(past: Past) -> list[SubscriptionRecord]:
    patterns: dict[int, list[str]] = {}
    for number, pattern in past.rows("SELECT subscription_id, pattern FROM subscription_patterns ORDER BY 1, 2"):
        patterns.setdefault(number, []).append(pattern)
    known: list[SubscriptionRecord] = records_of(past, "subscriptions", SubscriptionRecord)
    for record in known:
        record.patterns = tuple(patterns.get(record.id, ()))
    return known


def _rewind_subscriptions(
    past: Past, rewind: Rewind, cursors: _Cursors, known: Iterable[SubscriptionRecord]
) -> list[SubscriptionRecord]:
    """Return those that lived at the moment, as they were."""
    gone = rewind.removed.get("agents", set())
    # Numbers are given out in order, and a cursor begins at the last event of its time.
    moved = [*cursors.last, *(number for number, first in cursors.first.items() if first <= past.moment.event_id)]
    last_known = max(moved, default=0)
    live = []
    for now in known:
        if now.agent_id in gone or (now.id > last_known and past.is_after(now.created_us)):
            rewind.remove("subscriptions", now.id)
            rewind.remove("subscription_patterns", now.id)
            continue
        if now.ended_us is not None and not past.is_after(now.ended_us):
            continue
        then = replace(now, ended_us=None, cursor=cursors.at_moment(past, now))
        then.skipped -= cursors.skipped.get(now.id, 0)
        if then.agent_id is not None:
            then.subscriber = past.names.get(then.agent_id, then.subscriber)
        if past.is_after(then.seen_us):
            then.seen_us = max(then.created_us, past.run_started_us)
        live.append(then)
    return live


def _rename_callbacks(past: Past, live: Iterable[SubscriptionRecord]) -> None:
    """Callbacks that went with a renamed agent have its name of then."""
    for move in past.moves("flag"):
        if move.id > past.move_id and "renamed_from" in move.value and move.agent_id is not None:
            for record in live:
                if record.agent_id is None and record.subscriber == move.subject:
                    record.subscriber = past.names.get(move.agent_id, record.subscriber)


def _count_attempts(past: Past, live: Sequence[SubscriptionRecord]) -> None:
    """Count the failed attempts at the next event of each, as far as it is clear whose they were."""
    for then in live:
        then.attempts, then.attempt_event_id, then.retry_us = 0, None, None
    failed = past.rows(
        "SELECT t.agent_id, t.cause_event_id, y.name, count(*), max(t.started_us) FROM ticks t "
        "JOIN events e ON e.id = t.cause_event_id JOIN event_types y ON y.id = e.type_id "
        "WHERE t.id <= :t AND t.kind = 1 AND t.outcome IN (1, 2) AND t.subscription_id IS NULL "
        "AND t.cause_event_id > :c GROUP BY 1, 2, 3 ORDER BY 2",
        **{"t": past.moment.tick_id, "c": min((record.cursor for record in live), default=0)},
    )
    for agent_id, event_id, type, attempts, last_us in failed:
        suitors = [
            other
            for other in live
            if other.cursor < event_id and _units_of(past, other) == agent_id and compile_patterns(other.patterns)(type)
        ]
        if len(suitors) == 1 and suitors[0].attempt_event_id is None:
            then = suitors[0]
            then.attempts, then.attempt_event_id = attempts, event_id
            then.retry_us = last_us + FIRST_RETRY_US * 2 ** (attempts - 1)


def _units_of(past: Past, record: SubscriptionRecord) -> int:
    """Return the agent to which its units belong: a callback under an agent's name is the agent's."""
    return record.agent_id if record.agent_id is not None else past.ids.get(record.subscriber, 0)


def _tell_what_is_gone(past: Past, rewind: Rewind, live: Iterable[SubscriptionRecord]) -> None:
    forgotten = min(past.horizon.forgotten_event_id, past.moment.event_id)
    behind = sorted(record.subscriber for record in live if record.cursor < forgotten)
    if behind:
        rewind.untold.append(
            f"events up to {forgotten} were removed since (event_days), so {', '.join(dict.fromkeys(behind))} may not "
            "get all that waited then"
        )


# -- dead letters and delayed events ----------------------------------------------------------------


def _rewind_letters(past: Past, rewind: Rewind, cursors: _Cursors, owners: Mapping[int, SubscriptionRecord]) -> None:
    """Dead letters that were laid down later go, and those that were delivered later are open again."""
    gone, t = rewind.removed.get("subscriptions", set()), past.moment.tick_id
    tries: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for agent_id, event_id, *unit in past.rows(
        "SELECT agent_id, cause_event_id, id, outcome, started_us FROM ticks WHERE kind = 1 "
        "AND subscription_id IS NULL AND cause_event_id IN (SELECT event_id FROM dead_letters) ORDER BY id"
    ):
        tries.setdefault((agent_id, event_id), []).append((unit[0], unit[1], unit[2]))
    requests = past.rows(
        "SELECT commit_id, at_us, arguments FROM commands WHERE name = 'events.redeliver' AND error IS NULL ORDER BY id"
    )
    for now in records_of(past, "dead_letters", DeadLetterRecord):
        if now.subscription_id in gone or (now.subscription_id, now.event_id) in cursors.buried:
            rewind.remove("dead_letters", now.id)
            continue
        owner = owners[now.subscription_id]
        units = tries.get((_units_of(past, owner), now.event_id), [])
        since = [unit for unit in units if unit[0] > t]
        asked = [
            (commit_id, at_us)
            for commit_id, at_us, arguments in requests
            if _asks_for(json.loads(arguments), now, owner, past)
        ]
        if not since and not any(commit_id > past.moment.commit_id for commit_id, _ in asked):
            continue
        then = replace(now)
        if any(outcome == 0 and us == now.redelivered_us for _, outcome, us in since):
            then.redelivered_us = None
        failed = [unit for unit in units if unit[0] <= t and unit[1] in (1, 2)]
        if failed_since := sum(outcome in (1, 2) for _, outcome, _ in since):
            then.attempts -= failed_since
            if failed:
                then.tick_id, _, then.failed_us = failed[-1]
                then.error = past.error_of(then.tick_id) or then.error
        before = max((at_us for commit_id, at_us in asked if commit_id <= past.moment.commit_id), default=None)
        tried_us = max((us for number, _, us in units if number <= t), default=0)
        then.requested_us = before if before is not None and before > tried_us else None
        if then != now:
            rewind.commit.dead_letters[now.id] = then


def _asks_for(said: dict[str, object], letter: DeadLetterRecord, owner: SubscriptionRecord, past: Past) -> bool:
    """True where a command asked for another delivery of a letter."""
    if said.get("event_id") not in (None, letter.event_id) or said.get("subscriber") not in (None, owner.subscriber):
        return False
    if (pattern := said.get("type")) is None:
        return True
    found = past.rows(
        "SELECT y.name FROM events e JOIN event_types y ON y.id = e.type_id WHERE e.id = :e", e=letter.event_id
    )
    return bool(found) and compile_patterns((str(pattern),))(found[0][0])


def rewind_delayed(past: Past, rewind: Rewind) -> None:
    """Those that were emitted later go, and those that have happened later wait again."""
    moment = past.moment
    rewind.remove(
        "delayed_events",
        *(row[0] for row in past.rows("SELECT id FROM delayed_events WHERE tick_id > :t", t=moment.tick_id)),
    )
    for now in records_of(
        past, "delayed_events", DelayedRecord, "tick_id <= :t AND event_id > :e", t=moment.tick_id, e=moment.event_id
    ):
        rewind.commit.delayed[now.id] = replace(now, event_id=None)
