"""Delivers events: a cursor per subscription, strict order, each delivery in a unit that also moves the cursor.

Pending events of subscribers that are there wait in memory, up to a bound; what is beyond it, or was left from an
earlier run, is read from the log when its turn comes (only committed events are read). Among all subscriptions the
oldest event goes first. In an iteration only events are delivered that were emitted before its delivery step, so
it always ends; what handlers emit comes in the next one, which follows at once.

A delivery that fails is tried again after a pause that doubles, and blocks its subscription meanwhile, so that
order holds; after the last attempt it becomes a dead letter and the cursor moves on. A conflict is tried again at
once and counts as no attempt.

An event knows how many handlers led to it, one after another. Where these are more than `hop_limit` it is a dead
letter at once, when its turn comes: agents that answer each other for ever would keep the loop busy for ever.
Limiting the rate instead would only make the same chain slower, and its log would grow without end.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ael_store.model.event import Event, EventRecord, compile_patterns
from ael_store.model.records import DeadLetterRecord, SubscriptionRecord
from ael_store.model.unit import Unit
from ael_store.runtime.agent import overrides
from ael_store.runtime.journal import Journal
from ael_store.runtime.redelivery import Redeliveries

if TYPE_CHECKING:
    from ael_store.runtime.roster import AgentSlot
    from ael_store.settings import Settings

__all__ = ["Deliveries", "Subscription"]

QUEUE_LIMIT = 1000
REFILL = 256
FIRST_RETRY_S = 1.0
TYPES_REMEMBERED = 10_000
WARN_EVERY_US = 10_000_000
"""How often an event type is warned of that goes beyond the hop limit."""

log = logging.getLogger("ael_store.delivery")


class Subscription:
    """One cursor with its subscriber, if that is there."""

    __slots__ = ("busy", "callback", "complete", "matches", "queue", "queued", "record", "slot", "wild_only")

    def __init__(self, record: SubscriptionRecord) -> None:
        self.record = record
        self.slot: AgentSlot | None = None
        self.callback: Callable[[Event], Any] | None = None
        self.queue: deque[EventRecord] = deque()
        self.queued = False
        self.busy = False
        """True while its first event is being delivered, in the background too."""
        self.complete = False
        """True where `queue` holds everything that is pending."""
        self.compile()

    def compile(self) -> None:
        """Take over the patterns of the record."""
        self.matches = compile_patterns(self.record.patterns)
        self.wild_only = all(set(pattern) == {"*"} for pattern in self.record.patterns)

    def wants(self, event: EventRecord) -> bool:
        """True where an event is for this subscriber: its type is wanted, or it is a reply to it."""
        if event.target is None:
            return self.matches(event.type)
        record = self.record
        return event.target == record.subscriber and (record.agent_id is not None or self.matches(event.type))

    @property
    def attached(self) -> bool:
        return self.callback is not None or (self.record.agent_id is not None and self.slot is not None)

    def away(self) -> str | None:
        """Say why its subscriber gets nothing for the time being; None where it is there."""
        if not self.attached:
            return "absent"
        return None if self.slot is None else self.slot.away()

    def ready(self, now_us: int) -> bool:
        """True where its next event may be delivered now."""
        retry_us = self.record.retry_us
        return (retry_us is None or retry_us <= now_us) and self.free(now_us)

    def free(self, now_us: int) -> bool:
        """True where its subscriber is there and may handle something now."""
        if self.busy:
            return False
        if self.slot is not None:
            return self.slot.started and self.slot.ready(now_us)
        return self.callback is not None


class Deliveries:
    """All subscriptions of a database, and what waits for them."""

    def __init__(
        self,
        journal: Journal,
        settings: Settings,
        records: Iterable[SubscriptionRecord],
        requested: Iterable[DeadLetterRecord] = (),
    ) -> None:
        self.journal = journal
        self.settings = settings
        self.known_types: set[str] = set()
        self.subscriptions: dict[int, Subscription] = {record.id: Subscription(record) for record in records}
        self.redeliveries = Redeliveries(journal, self.subscriptions, requested)
        self._of_agent: dict[int, Subscription] = {}
        self._of_callback: dict[tuple[str, str], Subscription] = {}
        for subscription in self.subscriptions.values():
            self._index(subscription)
        self._by_type: dict[str, tuple[Subscription, ...]] = {}
        self._by_name: dict[str, list[Subscription]] = {}
        self._heap: list[tuple[int, int]] = []
        self._waiting: set[int] = set()
        """Subscriptions that have something pending and could not get it when their turn came."""
        self._under_way: set[int] = set()
        """Subscriptions whose first event is being delivered."""
        self._warn_us: dict[str, int] = {}
        """Event types that went beyond the hop limit: warned of again from this instant."""

    # -- who is subscribed --

    def _index(self, subscription: Subscription) -> None:
        record = subscription.record
        if record.agent_id is not None:
            self._of_agent[record.agent_id] = subscription
        else:
            self._of_callback[record.subscriber, record.patterns[0]] = subscription

    def _open(self, subscriber: str, patterns: tuple[str, ...], agent_id: int | None, now_us: int) -> Subscription:
        self.journal.subscription_id += 1
        record = SubscriptionRecord(
            self.journal.subscription_id,
            subscriber,
            agent_id,
            self.journal.event_id,
            0,
            None,
            None,
            now_us,
            now_us,
            None,
            0,
            patterns,
        )
        subscription = self.subscriptions[record.id] = Subscription(record)
        subscription.complete = True
        self.journal.changed(record)
        self.journal.commit.patterns.append(record)
        self._index(subscription)
        self._forget_matches()
        return subscription

    def attach_agent(self, slot: AgentSlot, now_us: int) -> None:
        """Connect an agent to the cursor of its `subscriptions`; a new one starts from now.

        Where the patterns have changed since, the cursor goes on with the new ones.
        """
        patterns = tuple(sorted(set(slot.agent.subscriptions)))
        found = self._of_agent.get(slot.record.id)
        if not patterns and not overrides(slot.agent, "on_event"):  # with the hook alone it still gets replies
            if found is not None:
                self._end(found, now_us)
            return
        if found is not None and bool(patterns) != bool(found.record.patterns):
            self._end(found, now_us)  # a cursor for replies alone is another one than that of subscriptions
            found = None
        if found is None:
            found = self._open(slot.name, patterns, slot.record.id, now_us)
        elif found.record.patterns != patterns:
            self._change_patterns(found, patterns)
        found.record.subscriber = slot.name
        found.slot = slot
        self._seen(found, now_us)

    def _change_patterns(self, subscription: Subscription, patterns: tuple[str, ...]) -> None:
        record = subscription.record
        record.patterns = patterns
        record.attempts, record.attempt_event_id, record.retry_us = 0, None, None
        subscription.compile()
        subscription.queue.clear()
        subscription.complete = False
        self.journal.commit.patterns.append(record)
        self._forget_matches()

    def _seen(self, subscription: Subscription, now_us: int) -> None:
        """Its subscriber is there."""
        record = subscription.record
        record.seen_us = now_us
        if record.retry_us is not None:  # the clock may have been set back since
            record.retry_us = min(record.retry_us, now_us + _pause_us(record.attempts))
        self.journal.changed(subscription.record)
        self._wait_for(subscription)

    def attach_callback(
        self,
        subscriber: str,
        pattern: str,
        callback: Callable[[Event], Any],
        slot: AgentSlot | None,
        now_us: int,
    ) -> None:
        """Connect a callback to the cursor of (subscriber, pattern); a new one starts from now."""
        found = self._of_callback.get((subscriber, pattern))
        if found is None:
            found = self._open(subscriber, (pattern,), None, now_us)
        found.callback = callback
        found.slot = slot
        self._seen(found, now_us)

    def join_callbacks(self, slot: AgentSlot) -> None:
        """An agent has joined: callbacks that were subscribed under its name before are its own from now on."""
        for subscription in self._of_callback.values():
            if subscription.callback is not None and subscription.record.subscriber == slot.name:
                subscription.slot = slot

    def rename(self, subscriber: str, new_name: str) -> None:
        """Give the cursors of a subscriber to its new name; one that the new name has already stays as it is."""
        self._forget_matches()
        for subscription in self.subscriptions.values():
            record = subscription.record
            if record.subscriber == subscriber:
                if record.agent_id is None and (new_name, record.patterns[0]) in self._of_callback:
                    log.warning(
                        "%s has a cursor for %s already; that of %s stays", new_name, record.patterns[0], subscriber
                    )
                    continue
                record.subscriber = new_name
                self.journal.changed(record)
                if record.agent_id is None:
                    self._of_callback.pop((subscriber, record.patterns[0]), None)
                    self._index(subscription)

    def end(self, subscriber: str, pattern: str | None, now_us: int) -> None:
        """End the callbacks' cursors of a subscriber: of one pattern, or all of them."""
        for (name, wanted), subscription in list(self._of_callback.items()):
            if name == subscriber and pattern in (None, wanted):
                self._end(subscription, now_us)

    def end_agent(self, agent_id: int, name: str, now_us: int) -> None:
        """End every cursor of an agent, its callbacks' too."""
        own = self._of_agent.get(agent_id)
        if own is not None:
            self._end(own, now_us)
        self.end(name, None, now_us)

    def _end(self, subscription: Subscription, now_us: int) -> None:
        record = subscription.record
        record.ended_us = now_us
        self.journal.changed(record)
        del self.subscriptions[record.id]
        if record.agent_id is not None:
            self._of_agent.pop(record.agent_id, None)
        else:
            self._of_callback.pop((record.subscriber, record.patterns[0]), None)
        self._waiting.discard(record.id)
        self.redeliveries.drop(record.id)
        self._forget_matches()

    def subscribers_of(self, type: str) -> tuple[Subscription, ...]:
        found = self._by_type.get(type)
        if found is None:
            if len(self._by_type) > TYPES_REMEMBERED:
                self._by_type.clear()
            found = tuple(s for s in self.subscriptions.values() if s.matches(type))
            self._by_type[type] = found
        return found

    def _subscribers_for(self, event: EventRecord) -> Iterable[Subscription]:
        if event.target is None:
            return self.subscribers_of(event.type)
        if not self._by_name:
            for subscription in self.subscriptions.values():
                self._by_name.setdefault(subscription.record.subscriber, []).append(subscription)
        return [subscription for subscription in self._by_name.get(event.target, ()) if subscription.wants(event)]

    def _forget_matches(self) -> None:
        """Subscriptions have changed: who wants what is found anew."""
        self._by_type.clear()
        self._by_name.clear()

    def wanted(self, type: str) -> bool:
        """True where a pattern other than a bare `*` matches a type."""
        found = self.subscribers_of(type)
        return bool(found) and any(not subscription.wild_only for subscription in found)

    # -- what waits --

    def route(self, events: Iterable[EventRecord]) -> None:
        """Queue new events with those who want them."""
        for event in events:
            self.known_types.add(event.type)
            for subscription in self._subscribers_for(event):
                if not subscription.attached or not subscription.complete:
                    subscription.complete = False
                    if subscription.attached:
                        self._waiting.add(subscription.record.id)
                    continue
                if len(subscription.queue) >= QUEUE_LIMIT:
                    subscription.complete = False
                    continue
                subscription.queue.append(event)
                if not subscription.queued:
                    self._push(subscription)

    def _push(self, subscription: Subscription) -> None:
        subscription.queued = True
        heapq.heappush(self._heap, (subscription.queue[0].id, subscription.record.id))

    def _wait_for(self, subscription: Subscription) -> None:
        if subscription.queue or not subscription.complete:
            self._waiting.add(subscription.record.id)

    def to_refill(self, now_us: int) -> list[Subscription]:
        """Return those whose queue has run empty while the log has more for them; the one furthest behind first."""
        found = [
            subscription
            for number in self._waiting
            if (subscription := self.subscriptions.get(number)) is not None
            and not subscription.queue
            and not subscription.complete
            and subscription.attached
            and subscription.ready(now_us)
        ]
        return sorted(found, key=lambda subscription: subscription.record.cursor)

    def types_for(self, subscription: Subscription) -> list[str]:
        """Return the known event types that a subscription wants."""
        return [type for type in self.known_types if subscription.matches(type)]

    def refilled(self, subscription: Subscription, records: list[EventRecord], until: int) -> None:
        """Queue what was read from the log; `until` is the last event that was looked at.

        Where the log has no more, what is not committed yet follows, and the queue is complete.
        """
        subscription.queue.extend(records)
        subscription.complete = len(records) < REFILL
        if subscription.complete:
            fresh = self.journal.commit.events
            subscription.queue.extend(event for event in fresh if event.id > until and subscription.wants(event))
        if subscription.queue:
            if not subscription.queued:
                self._push(subscription)
        elif subscription.complete:
            self._waiting.discard(subscription.record.id)

    def wake(self, now_us: int) -> None:
        """Put those that could not get their event, and can now, back in line."""
        for number in list(self._waiting):
            subscription = self.subscriptions.get(number)
            if subscription is None:
                self._waiting.discard(number)
            elif subscription.queue and not subscription.queued and subscription.ready(now_us):
                self._waiting.discard(number)
                self._push(subscription)

    def has_next(self, boundary: int) -> bool:
        """True where an event up to `boundary` is in line."""
        return bool(self._heap) and self._heap[0][0] <= boundary

    def next(self, boundary: int, now_us: int) -> tuple[Subscription, EventRecord] | None:
        """Return the oldest event up to `boundary` that can be delivered, with its subscription."""
        heap = self._heap
        while heap and heap[0][0] <= boundary:
            _, number = heapq.heappop(heap)
            subscription = self.subscriptions.get(number)
            if subscription is None:
                continue
            subscription.queued = False
            if not subscription.ready(now_us):
                self._wait_for(subscription)
                continue
            self._lay_aside(subscription, boundary, now_us)
            if not subscription.queue:
                self._wait_for(subscription)
            elif subscription.queue[0].id > boundary:
                self._push(subscription)
            else:
                return subscription, subscription.queue[0]
        return None

    def _lay_aside(self, subscription: Subscription, boundary: int, now_us: int) -> None:
        """Make dead letters of the next events up to `boundary` that are beyond the hop limit."""
        limit, queue = self.settings.hop_limit, subscription.queue
        while limit and queue and queue[0].id <= boundary and (queue[0].hops or 0) > limit:
            event = queue[0]
            error = f"hop limit: {event.hops} handlers led to it, one after another"
            self._bury(subscription.record, event.id, 0, error, event.tick_id, now_us)
            if self._warn_us.get(event.type, now_us) <= now_us:
                self._warn_us[event.type] = now_us + WARN_EVERY_US
                log.warning(
                    "%s does not get event %d (%s): %d handlers led to it, one after another (hop_limit = %d); "
                    "it is a dead letter, like others of this type that may follow",
                    subscription.record.subscriber,
                    event.id,
                    event.type,
                    event.hops,
                    limit,
                )
            self._advance(subscription, event.id)

    def pending(self) -> int:
        """Return how many deliveries wait in memory, those under way included."""
        numbers = {number for _, number in self._heap} | self._waiting | self._under_way
        return sum(len(self.subscriptions[number].queue) for number in numbers if number in self.subscriptions)

    def pending_now(self, now_us: int) -> bool:
        """True where something can be delivered at once."""
        if self._heap or self.redeliveries.pending_now(now_us):
            return True
        return any(
            subscription.ready(now_us) and (subscription.queue or (subscription.attached and not subscription.complete))
            for number in self._waiting
            if (subscription := self.subscriptions.get(number)) is not None
        )

    def next_retry_us(self, now_us: int) -> int | None:
        """Return when a blocked subscription may try again."""
        times = []
        for number in self._waiting:
            subscription = self.subscriptions.get(number)
            retry_us = None if subscription is None else subscription.record.retry_us
            if retry_us is not None and retry_us > now_us:  # one that has passed waits for its subscriber
                times.append(retry_us)
        return min(times, default=None)

    def jumped(self, by_us: int) -> None:
        """The wall clock was set: pauses take as long as they would have."""
        for subscription in self.subscriptions.values():
            if subscription.record.retry_us is not None:
                subscription.record.retry_us += by_us
                self.journal.changed(subscription.record)
        self._warn_us.clear()

    # -- those that are away too long --

    def away(self) -> list[Subscription]:
        """Return those that can't get what waits for them: absent, disabled or quarantined subscribers."""
        return [
            subscription
            for subscription in self.subscriptions.values()
            if (subscription.queue or not subscription.complete) and subscription.away() is not None
        ]

    def skip(self, subscription: Subscription, until: int, number: int) -> None:
        """Move a cursor over `number` events that have waited too long."""
        record = subscription.record
        queue = subscription.queue
        while queue and queue[0].id <= until:
            queue.popleft()
        record.cursor, record.skipped = until, record.skipped + number
        record.attempts, record.attempt_event_id, record.retry_us = 0, None, None
        self.journal.changed(record)
        value = {"subscription": record.id, "skipped": number, "until": until}
        self.journal.move("cursor", record.subscriber, value)
        log.warning(
            "%s was away too long: %d events up to %d are skipped (backlog_days = %g)",
            record.subscriber,
            number,
            until,
            self.settings.backlog_days,
        )

    def redact(self, event_id: int, text: str) -> None:
        """Blank an event that waits in a queue; the log is the store's business."""
        for subscription in self.subscriptions.values():
            for place, record in enumerate(subscription.queue):
                if record.id == event_id:
                    subscription.queue[place] = replace(record, data=text, metadata=None)
        self.redeliveries.redact(event_id, text)

    # -- after a delivery --

    def began(self, subscription: Subscription) -> None:
        """The first event of the queue is being delivered; nothing else of this subscription until it ended."""
        subscription.busy = True
        self._under_way.add(subscription.record.id)
        self._waiting.discard(subscription.record.id)

    def settle(self, subscription: Subscription, event_id: int, unit: Unit, failed: bool) -> SubscriptionRecord | None:
        """Move the cursor, or count the attempt, before the unit is applied.

        Returns the record where the cursor moves with this unit.
        """
        record = subscription.record
        if unit.outcome == "success":
            self._advance(subscription, event_id)
            return record
        if failed:
            record.attempts = record.attempts + 1 if record.attempt_event_id == event_id else 1
            record.attempt_event_id = event_id
            if record.attempts < self.settings.delivery_attempts:
                record.retry_us = unit.now_us + _pause_us(record.attempts)
        self.journal.changed(record)
        return None

    def give_up(self, subscription: Subscription, event_id: int, unit: Unit) -> None:
        """After the last attempt: lay the event aside as a dead letter and move on; the unit is applied already."""
        record = subscription.record
        if record.attempt_event_id != event_id or record.attempts < self.settings.delivery_attempts:
            return
        if record.ended_us is not None:  # unsubscribed meanwhile
            return
        self._bury(record, event_id, record.attempts, str(unit.failure)[:500], self.journal.tick_id, unit.now_us)
        log.error(
            "%s could not handle event %d after %d attempts; it is a dead letter now: %s",
            record.subscriber,
            event_id,
            record.attempts,
            unit.failure,
        )
        self._advance(subscription, event_id)

    def _bury(
        self, record: SubscriptionRecord, event_id: int, attempts: int, error: str, tick_id: int, now_us: int
    ) -> None:
        """Lay an event down as a dead letter of a subscription."""
        self.journal.dead_letter_id += 1
        self.journal.changed(
            DeadLetterRecord(
                self.journal.dead_letter_id, record.id, event_id, attempts, error, tick_id, now_us, None, None
            )
        )
        self.journal.move("cursor", record.subscriber, {"subscription": record.id, "dead_letter": event_id})

    def _advance(self, subscription: Subscription, event_id: int) -> None:
        record = subscription.record
        record.cursor = event_id
        record.attempts, record.attempt_event_id, record.retry_us = 0, None, None
        queue = subscription.queue
        if queue and queue[0].id == event_id:
            queue.popleft()
        self.journal.changed(record)

    def ended(self, subscription: Subscription) -> None:
        """A delivery has ended, whatever its outcome: put the subscription back in line if it has more."""
        subscription.busy = False
        self._under_way.discard(subscription.record.id)
        if subscription.record.id not in self.subscriptions:
            return
        if subscription.queue:
            if not subscription.queued:
                self._push(subscription)
        elif not subscription.complete:
            self._waiting.add(subscription.record.id)


def _pause_us(attempts: int) -> int:
    """Return how long a subscription waits after so many attempts."""
    return int(FIRST_RETRY_S * 2 ** max(0, attempts - 1) * 1_000_000)
