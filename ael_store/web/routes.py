"""Every address that the server answers, with what it takes: the routes and the OpenAPI description are this list.

To add one, write a handler `async def handler(request, values)` that returns what is to be JSON, or a Response, and
add an `Endpoint` to `ENDPOINTS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ael_store.errors import UsageError
from ael_store.model.task import STATUSES
from ael_store.web import api, health, stream
from ael_store.web.answer import answer
from ael_store.web.parameters import Parameter, read_body, read_query

__all__ = ["ENDPOINTS", "Endpoint", "route_of"]

Handler = Callable[[Request, dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address. Parameters of the path are in braces; `:int` says that one is a number."""

    path: str
    about: str
    handler: Handler
    parameters: tuple[Parameter, ...] = ()
    body: tuple[Parameter, ...] = ()
    method: str = "GET"
    media_type: str = "application/json"


AT = Parameter("at", "As it was: after this iteration, or at this ISO time.")
LIMIT = Parameter("limit", "Most rows of a page.", "integer", default=100, low=1, high=1000)
BEFORE = Parameter("before", "Only rows with a lower number, newest first.", "integer")
AFTER = Parameter("after", "Only rows with a higher number, oldest first.", "integer")
KEY = Parameter("key", "Only this key.")
PREFIX = Parameter("prefix", "Only keys that begin so.")
TYPE = Parameter("type", "Only this event type; `*` stands for any text.")
SOURCE = Parameter("source", "Only from this source.")
TEXT = Parameter("text", "Only events with this text in type, source or data.")
SUBSCRIBER = Parameter("subscriber", "Only of this subscriber.")
AGENT_STATUS = Parameter("status", "Only with this status.", choices=("active", "disabled", "quarantined", "absent"))
TASK_STATUS = Parameter("status", "Only with this status.", choices=STATUSES)
CHANNEL = Parameter("channel", "Its channel.", required=True)
METRIC = Parameter("name", "Its name.", required=True)
ONLY = Parameter("only", "Only iterations that had some.", choices=("errors", "events", "missed"))

EVENTS = "text/event-stream"


async def _scrape(request: Request, values: dict[str, Any]) -> Response:
    from ael_store.web.metrics import scrape  # brings the client of Prometheus, which not everybody uses

    return await scrape(request, values)


ENDPOINTS: list[Endpoint] = [
    Endpoint("/api/v1/status", "The whole in a few figures, with problems.", api.status, (AT,)),
    Endpoint("/api/v1/agents", "Every agent that the database knows.", api.agents, (AT, AGENT_STATUS)),
    Endpoint("/api/v1/agents/{name}", "All about one agent, with its last ticks and hours.", api.agent),
    Endpoint(
        "/api/v1/state",
        "Keys and values, in order of the keys.",
        api.state,
        (AT, KEY, PREFIX, Parameter("after", "Only keys that follow this one."), LIMIT),
    ),
    Endpoint("/api/v1/state/history", "Changes of a key, or of all.", api.history, (KEY, BEFORE, AFTER, LIMIT)),
    Endpoint(
        "/api/v1/state/diff",
        "What differs between two moments.",
        api.differences,
        (Parameter("from", "The one moment.", required=True), Parameter("to", "The other; now without it."), PREFIX),
    ),
    Endpoint(
        "/api/v1/state/stream", "Changes as they are committed.", stream.change_stream, (KEY, AFTER), media_type=EVENTS
    ),
    Endpoint("/api/v1/events", "The event log.", api.events, (TYPE, SOURCE, TEXT, BEFORE, AFTER, LIMIT)),
    Endpoint("/api/v1/events/dead", "Deliveries that were given up.", api.dead_letters, (SUBSCRIBER, TYPE, LIMIT)),
    Endpoint(
        "/api/v1/events/stream",
        "Events as they are committed.",
        stream.event_stream,
        (TYPE, SOURCE, TEXT, AFTER),
        media_type=EVENTS,
    ),
    Endpoint("/api/v1/iterations", "Iterations.", api.iterations, (ONLY, BEFORE, AFTER, LIMIT)),
    Endpoint(
        "/api/v1/iterations/stream",
        "Iterations as they are committed.",
        stream.iteration_stream,
        (AFTER,),
        media_type=EVENTS,
    ),
    Endpoint("/api/v1/iterations/{number:int}", "An iteration: what ran, what it wrote and emitted.", api.iteration),
    Endpoint(
        "/api/v1/tasks",
        "Tasks, newest first.",
        api.tasks,
        (
            TASK_STATUS,
            Parameter("agent", "Only of this agent."),
            Parameter("name", "Only of this function."),
            BEFORE,
            LIMIT,
        ),
    ),
    Endpoint("/api/v1/tasks/{id:int}", "All about one task, with its attempts.", api.task),
    Endpoint(
        "/api/v1/stream", "The newest commit, whenever there is a newer one.", stream.commit_stream, media_type=EVENTS
    ),
    Endpoint("/api/v1/agents/{name}/enable", "Let an agent run again.", api.enable, method="POST"),
    Endpoint("/api/v1/agents/{name}/disable", "Keep an agent from running.", api.disable, method="POST"),
    Endpoint("/api/v1/agents/{name}/release", "End an agent's quarantine or back-off.", api.release, method="POST"),
    Endpoint("/api/v1/agents/{name}/run", "Have an agent tick once, now.", api.run_agent, method="POST"),
    Endpoint(
        "/api/v1/events/{id:int}/redeliver",
        "Deliver the dead letters of an event once more.",
        api.redeliver,
        body=(SUBSCRIBER,),
        method="POST",
    ),
    Endpoint("/api/v1/tasks/{id:int}/retry", "Try a task again.", api.retry_task, method="POST"),
    Endpoint("/api/v1/tasks/{id:int}/cancel", "Cancel a task.", api.cancel_task, method="POST"),
    Endpoint(
        "/api/v1/tasks/{id:int}/answer",
        "Answer a question.",
        api.answer_task,
        method="POST",
        body=(Parameter("choice", "The answer.", required=True), Parameter("by", "Who answers; without it this user.")),
    ),
    Endpoint("/api/v1/loop/pause", "Pause the loop.", api.pause, method="POST"),
    Endpoint("/api/v1/loop/resume", "Let the loop go on.", api.resume, method="POST"),
    Endpoint(
        "/api/v1/loop/step",
        "Run so many iterations of a paused loop.",
        api.step,
        method="POST",
        body=(Parameter("iterations", "How many.", "integer", default=1, low=1, high=1_000_000),),
    ),
    Endpoint(
        "/api/v1/metrics",
        "Metrics of agents, and what they stand at.",
        api.metrics,
        (Parameter("channel", "Only of this channel."),),
    ),
    Endpoint("/api/v1/metrics/samples", "The newest samples of a metric.", api.samples, (CHANNEL, METRIC, LIMIT)),
    Endpoint("/api/v1/metrics/hours", "The newest hours of a metric.", api.metric_hours, (CHANNEL, METRIC, LIMIT)),
    Endpoint("/metrics", "Everything for Prometheus.", _scrape, media_type="text/plain"),
    Endpoint("/livez", "Whether the loop is best left alone (200) or not (503).", health.livez),
    Endpoint("/readyz", "Whether agents run and what they do is kept (200) or not (503).", health.readyz),
    Endpoint("/api/status", "The figures in the shape of FAZA 28.", api.ancestor_status),
    Endpoint(
        "/api/events",
        "The last events in the shape of FAZA 28.",
        api.ancestor_events,
        (Parameter("event_type", "Only this type."), SOURCE, LIMIT),
    ),
]
"""What answers JSON or streams; pages are in `pages.py`."""


def route_of(endpoint: Endpoint) -> Route:
    """Return the route of an endpoint."""

    async def handle(request: Request) -> Response:
        values = {**read_query(request, endpoint.parameters), **request.path_params}
        for parameter in endpoint.parameters:
            if parameter.required and values[parameter.name] is None:
                raise UsageError(f"the parameter {parameter.name!r} is missing: {parameter.about}")
        if endpoint.method == "POST":
            values |= await read_body(request, endpoint.body)
        result = await endpoint.handler(request, values)
        if isinstance(result, Response):
            return result
        back = getattr(request.state, "back", "")
        if back.startswith("/") and not back.startswith(("//", "/\\")):  # a form of a browser without scripts
            return RedirectResponse(back, 303)
        return answer(result)

    return Route(endpoint.path, handle, methods=[endpoint.method], name=f"{endpoint.method} {endpoint.path}")
