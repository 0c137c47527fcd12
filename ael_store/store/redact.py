"""Blanks a value wherever the database holds it, and keeps the proof that nothing else changed.

Part of a commit (`Writer.write`). Each row that is blanked first leaves its digest in `row_digests`, so the seal of
the commit that wrote it still holds. Names stay: the key, the type and source of an event, who did it and when.
Backups and copies made before keep the value.
"""

from __future__ import annotations

from typing import Any

from orjson import loads

from ael_store.model.event import REDACTED
from ael_store.model.records import Redaction
from ael_store.schema.recent import CHANGES
from ael_store.store.digest import change_content, event_content, row_digest

__all__ = ["redact"]


def redact(cursor: Any, redaction: Redaction) -> None:
    """Blank every value of a state key, or one event, inside the transaction that is open."""
    if redaction.key is not None:
        _redact_key(cursor, redaction.key)
    if redaction.event_id is not None:
        _redact_event(cursor, redaction.event_id)


def _keep(cursor: Any, kind: str, rows: list[tuple[int, int]]) -> None:
    cursor.executemany(
        "INSERT INTO row_digests (kind, row_id, digest, why) VALUES (?, ?, ?, 'redacted') ON CONFLICT DO NOTHING",
        [(kind, number, digest) for number, digest in rows],
    )


def _redact_key(cursor: Any, key: str) -> None:
    found = cursor.execute(
        f"SELECT c.id, k.name, c.value, c.previous_id, c.tick_id FROM {CHANGES} c JOIN keys k ON k.id = c.key_id "
        "WHERE c.key_id = (SELECT id FROM keys WHERE name = ?) AND c.value IS NOT NULL AND c.value <> ?",
        (key, REDACTED),
    ).fetchall()
    _keep(cursor, "state_changes", [(row[0], row_digest(change_content(*row))) for row in found])
    cursor.executemany("UPDATE state_changes SET value = ? WHERE id = ?", [(REDACTED, row[0]) for row in found])
    _redact_commands(cursor, "state.set", "key", key, "value")


def _redact_event(cursor: Any, event_id: int) -> None:
    found = cursor.execute(
        "SELECT e.id, y.name, s.name, e.data, e.metadata, e.timestamp_us, e.tick_id, e.hops, o.name FROM events e "
        "JOIN event_types y ON y.id = e.type_id JOIN event_sources s ON s.id = e.source_id "
        "LEFT JOIN event_sources o ON o.id = e.target_id WHERE e.id = ?",
        (event_id,),
    ).fetchall()
    for row in found:
        _keep(cursor, "events", [(event_id, row_digest(event_content(*row)))])
        cursor.execute("UPDATE events SET data = ?, metadata = NULL WHERE id = ?", (REDACTED, event_id))
        if row[3] is not None:
            _redact_commands(cursor, "events.emit", "data", loads(row[3]), "data")
    delayed = cursor.execute("SELECT * FROM delayed_events WHERE event_id = ?", (event_id,)).fetchall()
    names = [column[0] for column in cursor.description]
    for row in delayed:
        values = dict(zip(names, row, strict=True)) | {"data": REDACTED, "metadata": None}
        digest = row_digest([value for name, value in values.items() if name != "digest"])
        cursor.execute(
            "UPDATE delayed_events SET data = ?, metadata = NULL, digest = ? WHERE id = ?",
            (REDACTED, digest, values["id"]),
        )


def _redact_commands(cursor: Any, name: str, field: str, wanted: Any, blank: str) -> None:
    """Blank the value in the audit: of the commands whose argument `field` is what was redacted."""
    found = cursor.execute(
        "SELECT id, commit_id, at_us, actor, name, arguments, error FROM commands WHERE name = ?", (name,)
    ).fetchall()
    for row in found:
        arguments = loads(row[5])
        if isinstance(arguments, dict) and arguments.get(field) == wanted and arguments.get(blank) != "(redacted)":
            _keep(cursor, "commands", [(row[0], row_digest(row))])
            cursor.execute(
                "UPDATE commands SET arguments = json_set(arguments, ?, '(redacted)') WHERE id = ?",
                (f"$.{blank}", row[0]),
            )
            if name == "events.emit":
                cursor.execute(
                    "UPDATE commands SET arguments = json_remove(arguments, '$.metadata') WHERE id = ?", row[:1]
                )
