"""Delivers dead letters again, for an operator who asked for it: once for each request, beside the cursors.

A request is a mark on the dead letter, so it survives a restart and waits for a subscriber that is away, disabled,
quarantined or busy. The delivery comes out of order: the cursor has passed the event long ago, does not move, and
does not wait either. Success closes the dead letter in the commit of its effects. A failure takes back the request,
not the dead letter: an operator decides on the next attempt. A conflict is tried again at once, as always.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from ael_store.model.event import EventRecord
from ael_store.model.records import DeadLetterRecord
from ael_store.model.unit import Unit
from ael_store.runtime.journal import Journal

if TYPE_CHECKING:
    from ael_store.runtime.delivery import Subscription

__all__ = ["Redeliveries"]

log = logging.getLogger("ael_store.delivery")


class Redeliveries:
    """The dead letters that were asked for and not delivered yet, by subscription, in the order of the requests."""

    def __init__(
        self,
        journal: Journal,
        subscriptions: Mapping[int, Subscription],
        requested: Iterable[DeadLetterRecord] = (),
    ) -> None:
        self.journal = journal
        self.subscriptions = subscriptions
        self._waiting: dict[int, deque[DeadLetterRecord]] = {}
        self._requested: dict[int, DeadLetterRecord] = {}
        """By number, those that are being delivered too."""
        self._events: dict[int, EventRecord] = {}
        """By letter, the events of those whose turn is next, as they stand in the log."""
        for letter in requested:
            self._add(letter)

    def _add(self, letter: DeadLetterRecord) -> None:
        self._requested[letter.id] = letter
        self._waiting.setdefault(letter.subscription_id, deque()).append(letter)

    # -- asking --

    def request(self, found: Iterable[DeadLetterRecord], now_us: int) -> tuple[list[DeadLetterRecord], int]:
        """Mark open dead letters for one more delivery each, durable with the next commit.

        Returns those that were marked, and how many had been before. `found` comes from the last commit; what has
        happened to a letter since then counts.
        """
        marked: list[DeadLetterRecord] = []
        already = 0
        for record in found:
            letter = self._requested.get(record.id) or self.journal.commit.dead_letters.get(record.id, record)
            if letter.redelivered_us is not None:
                continue
            if letter.requested_us is not None:
                already += 1
                continue
            letter.requested_us = now_us
            self.journal.changed(letter)
            self._add(letter)
            marked.append(letter)
        return marked, already

    def drop(self, subscription_id: int) -> None:
        """Forget the requests of a subscription that ended."""
        for letter in self._waiting.pop(subscription_id, ()):
            self._close(letter)

    def redact(self, event_id: int, text: str) -> None:
        """Blank an event that was read already."""
        for number, event in self._events.items():
            if event.id == event_id:
                self._events[number] = replace(event, data=text, metadata=None)

    # -- delivering --

    def pending_now(self, now_us: int) -> bool:
        """True where a dead letter can be delivered at once."""
        return any(True for _ in self._ready(now_us))

    def _ready(self, now_us: int) -> Iterator[tuple[Subscription, deque[DeadLetterRecord]]]:
        for number, letters in self._waiting.items():
            subscription = self.subscriptions.get(number)
            if letters and subscription is not None and subscription.free(now_us):
                yield subscription, letters

    def to_load(self, now_us: int, limit: int) -> list[DeadLetterRecord]:
        """Return the next letters, at most `limit`, whose events must be read from the log before their turn."""
        following = (letter for _, letters in self._ready(now_us) for letter in islice(letters, limit))
        return [letter for letter in islice(following, limit) if letter.id not in self._events]

    def loaded(self, letters: Iterable[DeadLetterRecord], records: Iterable[EventRecord]) -> None:
        """Take up events that were read; a letter whose event is not in the log any more can't be delivered."""
        events = {record.id: record for record in records}
        for letter in letters:
            if letter.event_id in events:
                self._events[letter.id] = events[letter.event_id]
            elif letter.id in self._requested:
                log.warning("event %d is not in the log any more, so it can't be delivered again", letter.event_id)
                self._waiting[letter.subscription_id].remove(letter)
                self._close(letter)

    def next(self, now_us: int) -> tuple[Subscription, DeadLetterRecord, EventRecord] | None:
        """Return a dead letter that can be delivered, with its subscriber and its event; it is under way then."""
        for subscription, letters in self._ready(now_us):
            event = self._events.get(letters[0].id)
            if event is None:
                continue
            letter = letters.popleft()
            if not letters:
                del self._waiting[letter.subscription_id]
            subscription.busy = True
            log.info("%s gets event %d again, out of order", subscription.record.subscriber, event.id)
            return subscription, letter, event
        return None

    def settle(self, letter: DeadLetterRecord, unit: Unit, failed: bool) -> None:
        """A delivery has ended, and its unit is applied: close the letter, or note why it stays."""
        if unit.outcome == "success":
            letter.redelivered_us = unit.now_us
        elif failed:
            letter.attempts += 1
            letter.error = str(unit.failure)[:500]
            letter.tick_id = self.journal.tick_id
            letter.failed_us = unit.now_us
            log.warning(
                "%s could not handle event %d this time either; it stays a dead letter", unit.subject, letter.event_id
            )
        elif letter.subscription_id in self.subscriptions:
            self._waiting.setdefault(letter.subscription_id, deque()).appendleft(letter)
            return
        self._close(letter)

    def _close(self, letter: DeadLetterRecord) -> None:
        letter.requested_us = None
        self._requested.pop(letter.id, None)
        self._events.pop(letter.id, None)
        self.journal.changed(letter)
