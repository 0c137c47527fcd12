"""What became of an event: who has handled it, who has still to, and who has given it up.

Units know their event, and no index leads back. So the units that follow an event are looked through, and for a
subscriber that was away meanwhile its own: these are few.
"""

from __future__ import annotations

from sqlalchemy import text

from ael_store.clock import iso
from ael_store.model.event import compile_patterns
from ael_store.schema.recent import TICKS
from ael_store.store.questions import Questions, Row

__all__ = ["QUERIES", "deliveries"]

LOOK_UNITS = 10_000
"""How many units after an event are looked at for those that handled it."""

LOOK_OWN_UNITS = 10_000
"""The same for the units of a single subscriber."""

QUERIES = {
    "handlers": (
        "SELECT t.id FROM ticks t WHERE t.id > :after AND t.id <= :until AND t.cause_event_id = :event AND t.kind = 1 "
        "ORDER BY t.id"
    ),
    "handler later": (  # the index of the agent, from the event on
        f"SELECT id FROM (SELECT id, kind, cause_event_id FROM {TICKS} "
        "WHERE agent_id = :agent AND id > :after "
        "ORDER BY id LIMIT :most) WHERE kind = 1 AND cause_event_id = :event LIMIT 1"
    ),
    "subscriptions": (
        "SELECT s.id, s.subscriber, coalesce(s.agent_id, a.id, 0) AS agent_id, s.cursor FROM subscriptions s "
        "LEFT JOIN agents a ON a.name = s.subscriber WHERE s.created_us <= :at_us AND s.cursor >= :event"
    ),
    "pending": "SELECT subscriber, attempts FROM v_pending WHERE event_id = :id ORDER BY subscriber",
    "dead letters": (
        "SELECT s.subscriber AS subscriber, d.attempts AS attempts, d.error AS error, d.failed_us AS failed_us, "
        "d.redelivered_us AS redelivered_us, s.ended_us IS NOT NULL AS is_over "
        "FROM dead_letters d JOIN subscriptions s ON s.id = d.subscription_id WHERE d.event_id = :id ORDER BY d.id"
    ),
}


def deliveries(ask: Questions, event: Row) -> Row:
    """Return who has handled an event, who has still to, and who has given it up."""
    number, unit_id = event["id"], event["unit_id"]
    until = 2**62 if ask.moment is None else ask.moment.tick_id
    found = {
        int(row["id"]): None
        for row in ask.rows("handlers", event=number, after=unit_id, until=min(until, unit_id + LOOK_UNITS))
    }
    units = [unit for one in found if (unit := ask.row("unit", id=one)) is not None]
    emitted = ask.row("unit", id=unit_id)
    if emitted is not None:
        units += _handled_later(ask, event, emitted["started_us"], units, until)
    handled = [
        {
            "unit_id": unit["id"],
            "subscriber": unit["subscriber"] or unit["agent"],
            "outcome": unit["outcome"],
            "iteration": unit["iteration"],
            "started_at": unit["started_at"],
            "error": unit["error"],
        }
        for unit in units
    ]
    if ask.moment is not None:  # cursors and dead letters are known as of now only
        return {"handled": handled, "pending": None, "dead_letters": None}
    letters = ask.rows("dead letters", id=number)
    return {
        "handled": handled,
        "pending": ask.rows("pending", id=number),
        "dead_letters": [
            {
                "subscriber": row["subscriber"],
                "attempts": row["attempts"],
                "error": row["error"],
                "failed_at": iso(row["failed_us"]),
                "redelivered_at": None if row["redelivered_us"] is None else iso(row["redelivered_us"]),
                "ended": bool(row["is_over"]),
            }
            for row in letters
        ],
    }


def _handled_later(ask: Questions, event: Row, at_us: int, found: list[Row], until: int) -> list[Row]:
    """Look for subscribers that were away, whose units are far behind the event: among their own."""
    done = {unit["subscription_id"] for unit in found}
    patterns: dict[int, list[str]] = {}
    every = text("SELECT subscription_id, pattern FROM subscription_patterns")
    for number, pattern in ask.connection.execute(every):
        patterns.setdefault(number, []).append(pattern)
    later: list[Row] = []
    for row in ask.rows("subscriptions", at_us=at_us, event=event["id"]):
        if row["id"] in done:
            continue
        if event["target"] not in (None, row["subscriber"]):
            continue
        if event["target"] is None and not compile_patterns(patterns.get(row["id"], ()))(event["type"]):
            continue
        span = {"agent": row["agent_id"], "after": event["unit_id"], "event": event["id"], "most": LOOK_OWN_UNITS}
        late = ask.scalar("handler later", **span)
        if late is not None and late <= until and late not in {unit["id"] for unit in found}:
            unit = ask.row("unit", id=late)
            if unit is not None:
                later.append(unit)
    return later
