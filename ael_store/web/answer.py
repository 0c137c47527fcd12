"""Answers in JSON: values of the database as they are stored, and errors with the status that they mean."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from ael_store.errors import (
    AelError,
    DatabaseDamaged,
    HistoryGone,
    LoopNotRunning,
    NotADatabase,
    OwnedElsewhere,
    SchemaTooNew,
    SchemaTooOld,
    StorageFailed,
)

__all__ = ["answer", "embed", "status_of", "to_json"]

JSON_COLUMNS = frozenset(("value", "old_value", "new_value", "data", "metadata", "args", "result", "old", "new"))
"""Columns that hold JSON text; it goes into an answer as it is, so its depth and size cost nothing."""

UNAVAILABLE = (NotADatabase, DatabaseDamaged, SchemaTooNew, SchemaTooOld, StorageFailed)


def embed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a view whose JSON columns are JSON."""
    return {
        name: orjson.Fragment(value) if name in JSON_COLUMNS and isinstance(value, str) else value
        for name, value in row.items()
    }


def to_json(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)


def answer(content: Any, status: int = 200) -> Response:
    """Return content as a JSON answer."""
    return Response(to_json(content), status, media_type="application/json")


def status_of(error: AelError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, HistoryGone):
        return 410
    if isinstance(error, OwnedElsewhere | LoopNotRunning):
        return 409
    if isinstance(error, UNAVAILABLE):
        return 503
    if isinstance(error, LookupError):
        return 404
    if isinstance(error, OSError) or type(error).__name__ == "TookTooLong":
        return 503
    return 400 if isinstance(error, ValueError | TypeError) else 500
