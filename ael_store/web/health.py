"""`/livez` and `/readyz`: whether the loop works, told by what it has committed and not by the process that is there.

*Live* means: leave it alone. A loop holds the database, and its last committed iteration is as young as its clock
promises, or it says that it waits: for room on the disk, or paused by somebody. Restarting would not help then.
*Ready* means: agents run and what they do is kept. A loop that waits, is paused, starts or has lost the database to
another owner is not ready.

Idle iterations may be committed `idle_commit` seconds late, so only what is older than that and two slots of the clock
counts as a standstill.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ael_store.errors import AelError
from ael_store.store.figures import Ownership, ownership
from ael_store.web.answer import answer
from ael_store.web.service import service_of

__all__ = ["Health", "health_of", "livez", "readyz"]

SLACK_S = 5.0
"""What an iteration and its commit may take beyond their time before that is a standstill."""
STARTING_S = 600.0
"""How long a loop may take from holding the database to its first iteration: it may upgrade a large file before."""


@dataclass(frozen=True, slots=True)
class Health:
    """How the loop is, and why."""

    is_live: bool
    is_ready: bool
    reason: str


def health_of(
    facts: dict[str, Any], owner: Ownership, *, idle_commit_s: float, now_s: float
) -> tuple[Health, dict[str, Any]]:
    """Return how the loop is, told by the figures of the overview and the database, with what that was told by."""
    began_us = owner.started_us
    age_s = None if began_us is None else max(0.0, now_s - began_us / 1e6)
    allowed_s = idle_commit_s + 2 * (facts["tick_rate"] or 0.0) + SLACK_S
    shown = {
        "status": facts["status"],
        "iteration": facts["iteration"],
        "age_s": None if age_s is None else round(age_s, 3),
        "allowed_s": round(allowed_s, 3),
        "run": None if facts["run"] is None else facts["run"]["run_id"],
        "pid": facts["pid"],
        "revision": facts["revision"],
    }
    return _judged(facts, owner, age_s, allowed_s, now_s), shown


def _judged(facts: dict[str, Any], owner: Ownership, age_s: float | None, allowed_s: float, now_s: float) -> Health:
    status = facts["status"]
    if not facts["running"]:
        return Health(False, False, f"no loop holds the database; the last run is {_word(status)}")
    if owner.lease_token != owner.run_token and status != "starting":
        return Health(False, False, "the run has lost the database to another owner and can commit nothing more")
    if facts["answers"] is False and (status in ("paused", "waiting") or age_s is None or age_s > allowed_s):
        return Health(False, False, "the loop does not answer, and commits nothing")
    if status == "waiting":
        return Health(True, False, f"the disk is full: a commit waits since {facts['waiting_for_room_since']}")
    if status == "paused":
        return Health(True, False, "the loop is paused")
    is_of_run = owner.iteration_run == owner.run
    if status == "starting" or not is_of_run or age_s is None:
        since_s = now_s - datetime.fromisoformat(facts["since"]).timestamp()
        if since_s > STARTING_S:
            return Health(False, False, f"the loop began {since_s:.0f} s ago and has committed no iteration")
        return Health(True, False, "the loop is starting: its first iteration is not committed yet")
    if age_s > allowed_s:
        return Health(
            False, False, f"the last committed iteration began {age_s:.1f} s ago, allowed are {allowed_s:.1f} s"
        )
    return Health(True, True, f"iteration {facts['iteration']} is committed, {age_s:.1f} s old")


def _word(status: str) -> str:
    return {"new": "none", "crashed": "one that crashed", "stopped": "one that was stopped"}.get(status, status)


async def livez(request: Request, values: dict[str, Any]) -> Response:
    """200 where the loop is best left alone, else 503; the body says why."""
    health, shown = await _ask(request)
    return answer({"live": health.is_live, "reason": health.reason, **shown}, 200 if health.is_live else 503)


async def readyz(request: Request, values: dict[str, Any]) -> Response:
    """200 where agents run and what they do is kept, else 503; the body says why."""
    health, shown = await _ask(request)
    return answer({"ready": health.is_ready, "reason": health.reason, **shown}, 200 if health.is_ready else 503)


async def _ask(request: Request) -> tuple[Health, dict[str, Any]]:
    service = service_of(request)
    try:
        facts = await service.facts.now()
        owner = await service.database.read(ownership)
    except AelError as error:  # damaged, of another revision, gone: whatever it is, nothing is known to work
        return Health(False, False, str(error)), {}
    return health_of(facts, owner, idle_commit_s=service.idle_commit_s, now_s=time.time())
