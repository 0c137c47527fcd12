"""Digests of what is committed, so that bits that change on a disk later are found and located.

SQLite's own check sees a broken structure and not a changed value. So each commit carries a *seal*: for each of
four groups of rows that it wrote (units with their errors, state changes, events, the rest) a digest of the
digests of the rows. Rows of tables that are updated in place carry their own digest.

A row's digest is the CRC-32 of its public content as JSON: names instead of interned numbers, so that a later
schema needs no new digests, and so that a change in the tables of names is seen as well. A CRC finds every single
changed bit and every burst up to 32 bits, others but for one in four billion, and costs a fifth of a cryptographic
hash. It proves nothing against somebody who can write the file: neither would a hash without a key.

A row that is not any more what it was, because its value was redacted or its commit was pruned, leaves its digest
in `row_digests`, and the seal still holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from zlib import crc32

from orjson import dumps

from ael_store.model.event import EventRecord
from ael_store.model.records import Commit, IterationRecord, TickError, TickRow
from ael_store.model.state import Change

__all__ = [
    "GROUPS",
    "Seal",
    "agent_content",
    "change_content",
    "event_content",
    "fold",
    "iteration_content",
    "row_digest",
    "seal",
    "tick_content",
]

GROUPS = ("ticks", "state_changes", "events", "the rest")
"""What each digest of a seal is of."""

_LAYOUT = struct.Struct("<QIIIII")


def row_digest(content: Sequence[Any]) -> int:
    """Return the digest of a row, given its public content."""
    return crc32(dumps(content))


def fold(digests: Sequence[int]) -> int:
    """Return the digest of a sequence of digests; 0 of none."""
    return crc32(struct.pack(f"<{len(digests)}I", *digests)) if digests else 0


class Seal(NamedTuple):
    """What a commit says of itself: which units it wrote, and a digest for each of `GROUPS`."""

    tick_id: int
    """The last unit up to it."""
    ticks: int
    """How many units it wrote: those up to `tick_id`."""
    digests: tuple[int, int, int, int]

    def pack(self) -> bytes:
        return _LAYOUT.pack(self.tick_id, self.ticks, *self.digests)

    @classmethod
    def unpack(cls, raw: bytes) -> Seal | None:
        """Return a stored seal; None where these are not the bytes of one."""
        if len(raw) != _LAYOUT.size:
            return None
        tick_id, ticks, *digests = _LAYOUT.unpack(raw)
        return cls(tick_id, ticks, tuple(digests))


# -- the public content of rows ----------------------------------------------------------------------


def change_content(id: int, key: str, value: str | None, previous_id: int | None, tick_id: int) -> tuple[Any, ...]:
    return (id, key, value, previous_id, tick_id)


def event_content(
    id: int,
    type: str,
    source: str,
    data: str | None,
    metadata: str | None,
    timestamp_us: int | None,
    tick_id: int,
    hops: int | None,
    target: str | None = None,
) -> tuple[Any, ...]:
    row = (id, type, source, data, metadata, timestamp_us, tick_id, hops)
    return row if target is None else (*row, target)  # younger than the seals of the others


def tick_content(row: Sequence[Any]) -> tuple[Any, ...]:
    """Return what counts of a unit's row: its last column is younger than digests, and counts where it is not NULL."""
    return tuple(row) if row[-1] is not None else tuple(row[:-1])


def agent_content(row: Sequence[Any]) -> tuple[Any, ...]:
    """Return what counts of an agent's row: its last column is younger than digests, too."""
    return tick_content(row)


def iteration_content(row: IterationRecord) -> tuple[Any, ...]:
    return (
        row.id,
        row.run_id,
        row.commit_id,
        row.clock,
        row.started_us,
        row.duration_us,
        row.ticks,
        row.errors,
        row.events,
        row.missed,
        row.tick_id,
    )


# -- a whole commit ----------------------------------------------------------------------------------


def seal(commit: Commit, moves: Iterable[tuple[Any, ...]]) -> Seal:
    """Return the seal of a commit; `moves` are its rows of that table."""
    return Seal(
        commit.tick_id,
        len(commit.ticks),
        (
            fold(tick_digests(commit.ticks, commit.errors)),
            fold(_row_digests(map(_of_change, commit.changes))),
            fold(_row_digests(map(_of_event, commit.events))),
            fold(
                rest_digests(
                    None
                    if commit.kind == "iteration"
                    else (commit.id, commit.kind, commit.iteration, commit.run_id, commit.at_us),
                    map(iteration_content, commit.iterations),
                    (
                        (row.id, row.commit_id, row.at_us, row.actor, row.name, row.arguments, row.error)
                        for row in commit.commands
                    ),
                    moves,
                )
            ),
        ),
    )


def tick_digests(ticks: Iterable[TickRow], errors: Iterable[TickError]) -> list[int]:
    """Return the digests of units and of their errors, each in order of the ids."""
    return _row_digests(map(tick_content, ticks)) + _row_digests(map(tuple, errors))


def rest_digests(
    commit: tuple[Any, ...] | None,
    iterations: Iterable[tuple[Any, ...]],
    commands: Iterable[tuple[Any, ...]],
    moves: Iterable[tuple[Any, ...]],
) -> list[int]:
    """Return the digests of everything else, in this order; `commit` is its row where it is of no iteration."""
    digests = [] if commit is None else [row_digest(commit)]
    for rows in (iterations, commands, moves):
        digests += _row_digests(rows)
    return digests


def _row_digests(contents: Iterable[tuple[Any, ...]]) -> list[int]:
    return list(map(crc32, map(dumps, contents)))


def _of_change(change: Change) -> tuple[Any, ...]:
    old, new = change.old, change.new
    return change_content(
        change.id,
        change.key,
        None if new is None else new.text,
        None if old is None else old.change_id,
        change.tick_id,
    )


def _of_event(event: EventRecord) -> tuple[Any, ...]:
    return event_content(
        event.id,
        event.type,
        event.source,
        event.data,
        event.metadata,
        event.timestamp_us,
        event.tick_id,
        event.hops,
        event.target,
    )
