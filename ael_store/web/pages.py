"""The pages: what each asks, and its template. They show what `/api/v1` answers, and are made anew to be live."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ael_store._version import __version__
from ael_store.errors import TaskNotFound, UsageError
from ael_store.model.values import same
from ael_store.web.answer import answer
from ael_store.web.facts import MILD, verdict
from ael_store.web.looks import FILTERS, numeric
from ael_store.web.parameters import Parameter, read_body, read_query
from ael_store.web.routes import AFTER, AT, BEFORE, KEY, ONLY, PREFIX, SOURCE, TASK_STATUS, TEXT, TYPE
from ael_store.web.service import access_of, service_of
from ael_store.web.token import COOKIE
from ael_store.web.tree import tree_of

__all__ = ["error_page", "routes"]

TEMPLATES = Path(__file__).parent / "templates"

ROWS = 100
KEYS = 2000
PLOTTED_AGENTS = 6
PLOTTED_TICKS = 2000
PLOTTED_CHANGES = 500
PLOTTED_HOURS = 168
COOKIE_S = 30 * 86_400
TOKEN = Parameter("token", "The token.", required=True)

NAVIGATION = (
    ("/", "Overview"),
    ("/agents", "Agents"),
    ("/state", "State"),
    ("/events", "Events"),
    ("/iterations", "Iterations"),
    ("/tasks", "Tasks"),
    ("/measurements", "Metrics"),
)

PROBLEM_PAGES = {
    "quarantined_agent": "/agents/{}",
    "failing_agent": "/agents/{}",
    "dead_letters": "/events#dead-letters",
    "lagging_subscriber": "/agents",
    "expired_subscriber": "/agents",
    "overrun": "/iterations?only=missed",
    "crashed_run": "/iterations",
    "held_tasks": "/tasks?status=held",
    "failed_tasks": "/tasks?status=failed",
    "question": "/tasks",
    "limit_reached": "/tasks",
    "unknown_limit": "/tasks",
}
"""Where one does something about a problem."""

Values = dict[str, Any]
Page = Callable[[Request, Values], Awaitable[Response]]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= FILTERS
    environment.globals |= {"quote": lambda text: quote(str(text), safe=""), "version": __version__}
    return environment


async def _shown(request: Request, template: str, title: str, **values: Any) -> Response:
    facts = await service_of(request).facts.now()
    return HTMLResponse(
        _environment()
        .get_template(template)
        .render(
            title=title,
            navigation=NAVIGATION,
            path=request.url.path,
            address=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            access=access_of(request),
            now=facts,
            at=values.pop("at", None),
            has_slider=values.pop("has_slider", False),
            **values,
        )
    )


def error_page(request: Request, status: int, why: str) -> Response:
    """Return a page that says what went wrong; it needs no database."""
    page = _environment().get_template("error.html").render(status=status, why=why, path=request.url.path)
    return HTMLResponse(page, status)


def _following(request: Request, values: Values, **cursor: Any) -> str:
    """Return the address of the next page."""
    kept = {name: value for name, value in values.items() if value is not None}
    return f"{request.url.path}?{urlencode({**kept, **cursor})}"


# -- pages ------------------------------------------------------------------------------------------


async def overview(request: Request, values: Values) -> Response:
    service = service_of(request)
    now = await service.facts.now()
    at = values["at"]
    facts = now if at is None else await service.facts.then(at)
    before = None if at is None else facts["events"] + 1
    latest, _ = await service.database.read(lambda reader: reader.event_page(before=before, limit=8))
    problems = [
        {
            **problem,
            "page": PROBLEM_PAGES.get(problem["kind"], "/").format(quote(problem["subject"], safe="")),
            "level": "warn" if problem["kind"] in MILD else "bad",
        }
        for problem in now["problems"]
    ]
    return await _shown(
        request,
        "overview.html",
        "Overview",
        at=at,
        has_slider=True,
        facts=facts,
        verdict=verdict(now),
        problems=problems,
        latest=latest,
        durations=[row["duration_ms"] for row in facts["recent_iterations"]],
        emitted=[row["events"] for row in facts["recent_iterations"]],
    )


async def agents(request: Request, values: Values) -> Response:
    database = service_of(request).database
    at = values["at"]
    ticks, health = await database.read(
        lambda reader: (reader.tick_durations(PLOTTED_TICKS), reader.health_of_agents())
    )
    rows = await (database.read(lambda reader: reader.agents()) if at is None else database.past("agents", at=at))
    order = {"quarantined": 0, "active": 1, "disabled": 2, "absent": 3}
    rows.sort(key=lambda row: (order.get(row["status"], 4), -row["priority"], row["name"]))
    series: dict[str, list[float]] = {}
    for tick in ticks:
        series.setdefault(tick["agent"], []).append(tick["duration_ms"])
    return await _shown(
        request, "agents.html", "Agents", at=at, has_slider=True, agents=rows, health=health,
        series={name: values[-60:] for name, values in series.items()}, plot=_plot_of(ticks),
    )  # fmt: skip


def _plot_of(ticks: list[dict[str, Any]]) -> str:
    """Return the durations of the agents that take most time, as uPlot wants them: one list of times, one for each."""
    totals: dict[str, float] = {}
    for tick in ticks:
        totals[tick["agent"]] = totals.get(tick["agent"], 0.0) + tick["duration_ms"]
    names = sorted(sorted(totals, key=lambda name: -totals[name])[:PLOTTED_AGENTS])
    columns: list[list[float | None]] = [[] for _ in names]
    times: list[float] = []
    for tick in ticks:
        if tick["agent"] not in names:
            continue
        if not times or times[-1] != tick["at"]:
            times.append(tick["at"])
            for column in columns:
                column.append(None)
        columns[names.index(tick["agent"])][-1] = round(tick["duration_ms"], 3)
    return json.dumps({"x": times, "series": names, "values": columns, "unit": "ms", "time": True})


async def agent(request: Request, values: Values) -> Response:
    name = values["name"]
    row, health, units, hours = await service_of(request).database.read(
        lambda reader: (
            reader.agent(name),
            reader.health_of_agents()[name],
            reader.durations_of(name, 300),
            reader.agent_hours(name),
        )
    )
    measured = await service_of(request).database.read(lambda reader: reader.metrics(name))
    ticks = [unit for unit in units if unit["kind"] in ("tick", "event", "task")]
    plot = {
        "x": [_seconds(unit["started_at"]) for unit in ticks],
        "series": ["duration"],
        "values": [[round(unit["duration_ms"], 3) for unit in ticks]],
        "unit": "ms",
        "time": True,
    }
    return await _shown(
        request, "agent.html", name, agent=row, health=health, units=units[::-1][:50], hours=hours[::-1][:24],
        plot=json.dumps(plot), plotted=len(ticks), measured=measured[:ROWS],
    )  # fmt: skip


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


async def state(request: Request, values: Values) -> Response:
    database = service_of(request).database
    at, key, prefix, one, other = (values[name] for name in ("at", "key", "prefix", "from", "to"))
    if at is None:
        rows = await database.read(lambda reader: reader.key_page(prefix=prefix or "", limit=KEYS + 1))
    else:
        rows = await database.past("keys", at=at, prefix=prefix or "", limit=KEYS + 1)
    chosen: dict[str, Any] | None = None
    changes: list[dict[str, Any]] = []
    if key is not None:
        if at is None:
            chosen, changes = await database.read(
                lambda reader: (reader.key(key), reader.changes(key=key, limit=PLOTTED_CHANGES))
            )
        else:
            found = await database.past("keys", at=at, prefix=key, limit=1)
            chosen = found[0] if found and found[0]["key"] == key else None
            changes = await database.past("history", at=at, key=key, limit=PLOTTED_CHANGES)
    differences = None
    if one is not None:
        differences = [
            row
            for row in await database.past("differences", one=one, other=other, prefix=prefix or "")
            if row["old"] is None or row["new"] is None or not same(row["old"], row["new"])
        ]
    numbers = [(_seconds(row["changed_at"]), value) for row in changes[::-1]
               if row["changed_at"] and (value := numeric(row["new_value"])) is not None]  # fmt: skip
    plot = {
        "x": [time for time, _ in numbers],
        "series": ["value"],
        "values": [[value for _, value in numbers]],
        "unit": "",
        "time": True,
        "steps": True,
    }
    return await _shown(
        request, "state.html", "State", at=at, has_slider=True, tree=tree_of(rows[:KEYS]), count=len(rows),
        more=len(rows) > KEYS, values=values, chosen=chosen, changes=changes[:50],
        plot=json.dumps(plot) if len(numbers) > 1 else None, differences=differences,
    )  # fmt: skip


async def events(request: Request, values: Values) -> Response:
    asked = {name: values[name] for name in ("type", "source", "text", "before")}

    rows, stopped, types, sources, dead = await service_of(request).database.read(
        lambda reader: (
            *reader.event_page(**asked, limit=ROWS),
            *reader.names_of_events(),
            reader.dead_letters(limit=ROWS),
        )
    )
    before = stopped if stopped is not None else rows[-1]["id"] if len(rows) == ROWS else None
    return await _shown(
        request, "events.html", "Events", events=rows, values=values, types=types, sources=sources, dead=dead[::-1],
        newest=rows[0]["id"] if rows and values["before"] is None else None, searched=stopped,
        following=None if before is None else _following(request, values, before=before),
    )  # fmt: skip


async def iterations(request: Request, values: Values) -> Response:
    rows = await service_of(request).database.read(
        lambda reader: reader.iteration_page(only=values["only"], before=values["before"], limit=ROWS)
    )
    return await _shown(
        request, "iterations.html", "Iterations", iterations=rows, values=values,
        longest=max((row["duration_ms"] for row in rows), default=0) or 1,
        following=_following(request, values, before=rows[-1]["iteration"]) if len(rows) == ROWS else None,
    )  # fmt: skip


async def iteration(request: Request, values: Values) -> Response:
    number = values["number"]
    row = await service_of(request).database.read(lambda reader: reader.iteration(number))
    if row is None:
        return error_page(request, 404, f"there is no iteration {number}")
    return await _shown(request, "iteration.html", f"Iteration {number}", iteration=row)


async def tasks(request: Request, values: Values) -> Response:
    database = service_of(request).database
    rows, waiting, limits = await database.read(
        lambda reader: (
            reader.task_page(status=values["status"], before=values["before"], limit=ROWS),
            reader.task_page(status="waiting", limit=ROWS),
            reader.limits(),
        )
    )
    questions = [row for row in waiting if row["question"] is not None]
    progress = await database.progress() if any(row["status"] == "running" for row in rows) else {}
    return await _shown(
        request, "tasks.html", "Tasks", tasks=rows, questions=questions, limits=limits, values=values,
        progress=progress, choices_of=_choices,
        following=_following(request, values, before=rows[-1]["id"]) if len(rows) == ROWS else None,
    )  # fmt: skip


def _choices(task: dict[str, Any]) -> list[str]:
    """Return the answers that a question offers; empty where any text is one."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found = json.loads(task["args"])
        offered = found.get("choices") if isinstance(found, dict) else found[0] if found else None
        if isinstance(offered, list):
            return [str(choice) for choice in offered]
    return []


async def task(request: Request, values: Values) -> Response:
    number = values["id"]
    database = service_of(request).database
    row = await database.read(lambda reader: reader.task(number))
    if row is None:
        raise TaskNotFound(f"there is no task {number}")
    progress = (await database.progress()).get(str(number)) if row["status"] == "running" else None
    return await _shown(request, "task.html", f"Task {number}", task=row, progress=progress, choices_of=_choices)


async def measurements(request: Request, values: Values) -> Response:
    channel, name = values["channel"], values["name"]
    known = await service_of(request).database.read(lambda reader: reader.metrics())
    chosen = next((row for row in known if (row["channel"], row["name"]) == (channel, name)), None)
    if chosen is None and name is not None:
        return error_page(request, 404, f"there is no metric {name!r} in channel {channel!r}")
    samples: list[dict[str, Any]] = []
    hours: list[dict[str, Any]] = []
    if chosen is not None:
        samples, hours = await service_of(request).database.read(
            lambda reader: (
                reader.samples(channel, name, PLOTTED_CHANGES),
                reader.metric_hours(channel, name, PLOTTED_HOURS),
            )
        )
    is_counter = chosen is not None and chosen["kind"] == "counter"
    return await _shown(
        request, "measurements.html", "Metrics", metrics=known[:KEYS], more=max(0, len(known) - KEYS), chosen=chosen,
        plotted=len(samples),
        plot=_plot(samples, "recorded_at", {"value": "value"}),
        hours_plot=_plot(hours, "hour", {"total": "total"} if is_counter else {c: c for c in ("min", "mean", "max")}),
    )  # fmt: skip


def _plot(rows: list[dict[str, Any]], time: str, columns: dict[str, str]) -> str | None:
    """Return rows as uPlot wants them; None where there are too few for a line."""
    if len(rows) < 2:
        return None
    return json.dumps(
        {
            "x": [_seconds(row[time]) for row in rows],
            "series": list(columns.values()),
            "values": [[row[column] for row in rows] for column in columns],
            "unit": "",
            "time": True,
        }
    )


# -- logging in -------------------------------------------------------------------------------------


async def login(request: Request, values: Values) -> Response:
    return _login_page(request, "")


def _login_page(request: Request, why: str) -> Response:
    page = _environment().get_template("login.html").render(why=why, access=access_of(request))
    return HTMLResponse(page, 403 if why else 200)


async def log_in(request: Request) -> Response:
    """Give a browser that shows the token a cookie that only it can send, and only to pages of ours."""
    token = service_of(request).token
    wants_page = "text/html" in request.headers.get("accept", "")
    why = "this is not the token of this database"
    try:
        given = await read_body(request, (TOKEN, Parameter("username", "Ignored: for managers of passwords.")))
        fits = token is not None and token.fits(given["token"])
    except UsageError as error:
        fits, why = False, str(error)
    if not fits or token is None:
        return _login_page(request, why) if wants_page else answer({"error": why}, 403)
    done = RedirectResponse("/", 303) if wants_page else answer({"known": True})
    done.set_cookie(COOKIE, token.session, max_age=COOKIE_S, path="/", httponly=True, samesite="strict")
    return done


async def log_out(request: Request) -> Response:
    done = RedirectResponse("/login", 303)
    done.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return done


PAGES: list[tuple[str, Page, tuple[Parameter, ...]]] = [
    ("/", overview, (AT,)),
    ("/agents", agents, (AT,)),
    ("/agents/{name}", agent, ()),
    ("/state", state, (AT, KEY, PREFIX, Parameter("from", "The one moment."), Parameter("to", "The other."))),
    ("/events", events, (TYPE, SOURCE, TEXT, BEFORE)),
    ("/iterations", iterations, (ONLY, BEFORE, AFTER)),
    ("/iterations/{number:int}", iteration, ()),
    ("/tasks", tasks, (TASK_STATUS, BEFORE)),
    ("/tasks/{id:int}", task, ()),
    ("/measurements", measurements, (Parameter("channel", "Its channel."), Parameter("name", "Its name."))),
    ("/login", login, ()),
]


def routes() -> list[Route]:
    """Return the routes of the pages."""
    return [
        *(Route(path, _handler(page, parameters), methods=["GET"]) for path, page, parameters in PAGES),
        Route("/login", log_in, methods=["POST"]),
        Route("/logout", log_out, methods=["POST"]),
    ]


def _handler(page: Page, parameters: tuple[Parameter, ...]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await page(request, {**read_query(request, parameters), **request.path_params})

    return handle
