"""The data as JSON, and changes: `/api/v1/…`. Each handler gets its parameters checked."""

from __future__ import annotations

import os
import pwd
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request

from ael_store.errors import AelError, TaskNotFound
from ael_store.store.plain_reader import PlainReader
from ael_store.web.answer import embed
from ael_store.web.service import service_of

__all__ = [
    "agent",
    "agents",
    "ancestor_events",
    "ancestor_status",
    "answer_task",
    "cancel_task",
    "dead_letters",
    "differences",
    "disable",
    "enable",
    "events",
    "history",
    "iteration",
    "iterations",
    "metric_hours",
    "metrics",
    "pause",
    "redeliver",
    "release",
    "resume",
    "retry_task",
    "run_agent",
    "samples",
    "state",
    "status",
    "step",
    "task",
    "tasks",
]

Values = dict[str, Any]


class NothingThere(AelError, LookupError):
    """There is no such row."""


def _page(request: Request, values: Values, rows: list[dict[str, Any]], cursor: str, number: str) -> dict[str, Any]:
    """Return rows with the address of the next page, None where there is none."""
    following = None
    if rows and len(rows) == values["limit"]:
        query = {name: value for name, value in values.items() if value is not None and name != "before"}
        following = f"{request.url.path}?{urlencode({**query, cursor: rows[-1][number]})}"
    return {"items": [embed(row) for row in rows], "next": following}


# -- reading ----------------------------------------------------------------------------------------


async def status(request: Request, values: Values) -> Any:
    facts = service_of(request).facts
    return await (facts.now() if values["at"] is None else facts.then(values["at"]))


async def agents(request: Request, values: Values) -> Any:
    database = service_of(request).database
    if values["at"] is None:
        rows = await database.read(PlainReader.agents)
    else:
        rows = await database.past("agents", at=values["at"])
    if values["status"] is not None:
        rows = [row for row in rows if row["status"] == values["status"]]
    return {"items": [{**embed(row), "enabled": bool(row["enabled"])} for row in rows], "next": None}


async def agent(request: Request, values: Values) -> Any:
    name = values["name"]
    row, hours = await service_of(request).database.read(lambda reader: (reader.agent(name), reader.agent_hours(name)))
    return {**embed(row), "enabled": bool(row["enabled"]), "hours": hours}


async def state(request: Request, values: Values) -> Any:
    database = service_of(request).database
    wanted = {"prefix": values["prefix"] or "", "after": values["after"] or "", "limit": values["limit"]}
    if values["key"] is not None:
        rows = (
            await database.past("keys", at=values["at"], prefix=values["key"], limit=1)
            if values["at"]
            else [row for row in [await database.read(lambda reader: reader.key(values["key"]))] if row is not None]
        )
        rows = [row for row in rows if row["key"] == values["key"]]
        if not rows:
            raise NothingThere(f"there is no key {values['key']!r}")
    elif values["at"] is None:
        rows = await database.read(lambda reader: reader.key_page(**wanted))
    else:
        rows = await database.past("keys", at=values["at"], **wanted)
    return _page(request, values, rows, "after", "key")


async def history(request: Request, values: Values) -> Any:
    wanted = {name: values[name] for name in ("key", "before", "after", "limit")}
    rows = await service_of(request).database.read(lambda reader: reader.changes(**wanted))
    return _page(request, values, rows, "before" if values["after"] is None else "after", "id")


async def differences(request: Request, values: Values) -> Any:
    rows = await service_of(request).database.past(
        "differences", one=values["from"], other=values["to"], prefix=values["prefix"] or ""
    )
    return {"items": [embed(row) for row in rows], "next": None}


async def events(request: Request, values: Values) -> Any:
    rows, stopped = await service_of(request).database.read(lambda reader: reader.event_page(**values))
    page = _page(request, values, rows, "before" if values["after"] is None else "after", "id")
    if stopped is not None:
        query = {name: value for name, value in values.items() if value is not None}
        page["next"] = f"{request.url.path}?{urlencode({**query, 'before': stopped})}"
    return page


async def dead_letters(request: Request, values: Values) -> Any:
    rows = await service_of(request).database.read(lambda reader: reader.dead_letters(**values))
    return {"items": [embed(row) for row in rows[::-1]], "next": None}


async def iterations(request: Request, values: Values) -> Any:
    rows = await service_of(request).database.read(lambda reader: reader.iteration_page(**values))
    return _page(request, values, rows, "before" if values["after"] is None else "after", "iteration")


async def iteration(request: Request, values: Values) -> Any:
    row = await service_of(request).database.read(lambda reader: reader.iteration(values["number"]))
    if row is None:
        raise NothingThere(f"there is no iteration {values['number']}")
    return {
        **row,
        "changes": [embed(change) for change in row["changes"]],
        "events_emitted": [embed(event) for event in row["events_emitted"]],
    }


async def tasks(request: Request, values: Values) -> Any:
    database = service_of(request).database
    rows = await database.read(lambda reader: reader.task_page(**values))
    progress = await database.progress() if any(row["status"] == "running" for row in rows) else {}
    for row in rows:
        row["progress"] = progress.get(str(row["id"])) if row["status"] == "running" else None
    return _page(request, values, rows, "before", "id")


async def task(request: Request, values: Values) -> Any:
    number = values["id"]
    database = service_of(request).database
    row = await database.read(lambda reader: reader.task(number))
    if row is None:
        raise TaskNotFound(f"there is no task {number}")
    progress = (await database.progress()).get(str(number)) if row["status"] == "running" else None
    return {**embed(row), "progress": progress}


async def metrics(request: Request, values: Values) -> Any:
    rows = await service_of(request).database.read(lambda reader: reader.metrics(values["channel"]))
    return {"items": rows, "next": None}


async def samples(request: Request, values: Values) -> Any:
    rows = await service_of(request).database.read(lambda reader: reader.samples(**values))
    return {"items": rows, "next": None}


async def metric_hours(request: Request, values: Values) -> Any:
    rows = await service_of(request).database.read(lambda reader: reader.metric_hours(**values))
    return {"items": rows, "next": None}


async def ancestor_status(request: Request, values: Values) -> Any:
    """The figures of FAZA 28's `get_stats()`, for pages that were written for its dashboard."""
    facts = await service_of(request).facts.now()
    counts = facts["agents"]
    return {
        "running": facts["running"],
        "status": facts["status"],
        "iteration": facts["live_iteration"] or facts["iteration"],
        "tick_rate": facts["tick_rate"],
        "start_time": facts["since"],
        "agent_manager": {
            "total_agents": sum(count for word, count in counts.items() if word != "absent"),
            "enabled_agents": counts.get("active", 0),
        },
        "event_bus": {"total_events": facts["position"]["event"], "pending": facts["pending"]},
        "state_context": {"total_keys": facts["keys"]},
        "problems": facts["problems"],
    }


async def ancestor_events(request: Request, values: Values) -> Any:
    """The last events as FAZA 28's bus gave them: a list, oldest first."""
    rows, _ = await service_of(request).database.read(
        lambda reader: reader.event_page(type=values["event_type"], source=values["source"], limit=values["limit"])
    )
    names = ("id", "type", "source", "data", "metadata", "iteration")
    return {
        "events": [{"timestamp": row["emitted_at"], **embed({name: row[name] for name in names})} for row in rows[::-1]]
    }


# -- changing ---------------------------------------------------------------------------------------


async def _change(request: Request, command: str, **arguments: Any) -> Any:
    service = service_of(request)
    result = await service.database.change(command, arguments)
    service.facts.forget()
    return result


async def enable(request: Request, values: Values) -> Any:
    return {"name": values["name"], "changed": await _change(request, "agents.enable", name=values["name"])}


async def disable(request: Request, values: Values) -> Any:
    return {"name": values["name"], "changed": await _change(request, "agents.disable", name=values["name"])}


async def release(request: Request, values: Values) -> Any:
    return {"name": values["name"], "changed": await _change(request, "agents.release", name=values["name"])}


async def run_agent(request: Request, values: Values) -> Any:
    return {"name": values["name"], "iteration": await _change(request, "agents.run", name=values["name"])}


async def redeliver(request: Request, values: Values) -> Any:
    return await _change(request, "events.redeliver", event_id=values["id"], subscriber=values["subscriber"])


async def retry_task(request: Request, values: Values) -> Any:
    return await _change(request, "tasks.retry", id=values["id"])


async def cancel_task(request: Request, values: Values) -> Any:
    return await _change(request, "tasks.cancel", id=values["id"])


async def answer_task(request: Request, values: Values) -> Any:
    by = values["by"] or f"{_user()} (dashboard)"
    return await _change(request, "tasks.answer", id=values["id"], choice=values["choice"], by=by)


async def pause(request: Request, values: Values) -> Any:
    return {"changed": await _change(request, "loop.pause")}


async def resume(request: Request, values: Values) -> Any:
    return {"changed": await _change(request, "loop.resume")}


async def step(request: Request, values: Values) -> Any:
    return {"until": await _change(request, "loop.step", iterations=values["iterations"])}


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
