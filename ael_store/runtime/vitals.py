"""How the process of a loop is right now, which its database does not say: who holds it, whether it answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ael_store.clock import iso
from ael_store.errors import AelError
from ael_store.runtime.control import HEALTH, ask
from ael_store.store.lock import LOOP, Holder, current_holder

__all__ = ["status_word", "vitals"]

PATIENCE_S = 2.0
"""How long a loop may take to say how it is."""


def vitals(path: Path) -> dict[str, Any]:
    """Return who holds a database, whether it answers, and how large the files are. May wait for two seconds.

    `answers` is None where there is no loop to ask; `live_iteration` is the iteration that a loop is in, which may
    be ahead of the last one that is committed.
    """
    holder = current_holder(path)
    if holder is not None and holder.what != LOOP:
        holder = None
    return {
        "running": holder is not None,
        "pid": None if holder is None else holder.pid,
        "host": None if holder is None else holder.host,
        "since": None if holder is None else iso(holder.since_us),
        "takes_commands": holder is not None and holder.socket is not None,
        **_health(holder),
        "size_bytes": _size(path),
        "wal_bytes": _size(path.with_name(path.name + "-wal")),
    }


def _health(holder: Holder | None) -> dict[str, Any]:
    said: dict[str, Any] = {"answers": None, "waiting_for_room_since": None, "live_iteration": None}
    if holder is None or holder.socket is None:
        return said
    try:
        health = ask(holder.socket, HEALTH, {}, PATIENCE_S)
    except AelError:
        return {**said, "answers": False}
    return {
        "answers": True,
        "waiting_for_room_since": health.get("waiting_for_room_since"),
        "live_iteration": health.get("iteration"),
    }


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def status_word(facts: dict[str, Any]) -> str:
    """Return one word for what `Reader.status` and `vitals` say together.

    `running`, `paused`, `waiting` (for room on the disk), `starting`, `stopped`, `crashed`, or `new`.
    """
    run = facts["run"]
    if facts["running"]:
        if run is None or run["pid"] != facts["pid"] or run["status"] != "running":
            return "starting"
        if facts["waiting_for_room_since"] is not None:
            return "waiting"
        return "paused" if facts["paused"] else "running"
    if run is None:
        return "new"
    return "crashed" if run["status"] == "running" else str(run["status"])
