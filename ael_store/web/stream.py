"""Streams of server-sent events. Each is a cursor: it sends what follows the last number it sent.

The id of a message is the number of its row, so a browser that comes back says with `Last-Event-ID` where to go on,
and the file has all of it, whichever server asks. A stream waits for its own client and for nobody else's; it holds
one page of rows at most. Who is further behind than anybody wants to read gets `resync` and loads the page anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from ael_store.errors import AelError
from ael_store.store.plain_reader import PlainReader, Position
from ael_store.web.answer import answer, embed, to_json
from ael_store.web.service import Service, service_of

if TYPE_CHECKING:
    from ael_store.web.tail import Tail

__all__ = ["MOST_STREAMS", "change_stream", "commit_stream", "event_stream", "iteration_stream"]

PAGE = 50
FURTHEST = 5000
"""How many rows a stream sends to catch up; who is further behind reads pages instead."""

MOST_STREAMS = 100
PING_S = 15
SEND_TIMEOUT_S = 60.0
"""How long a client may take nothing; then it is dropped, and comes back where it was."""

Values = dict[str, Any]
Rows = list[dict[str, Any]]


async def commit_stream(request: Request, values: Values) -> Response:
    """Say which commit is the newest, whenever there is a newer one."""
    return _stream(request, _commits(service_of(request).tail))


async def event_stream(request: Request, values: Values) -> Response:
    wanted = {name: values[name] for name in ("type", "source", "text")}

    def page(reader: PlainReader, after: int) -> Rows:
        return reader.event_page(**wanted, after=after, limit=PAGE)[0]

    return _log(request, values, "event", "id", lambda position: position.event, page)


async def iteration_stream(request: Request, values: Values) -> Response:
    def page(reader: PlainReader, after: int) -> Rows:
        return reader.iteration_page(after=after, limit=PAGE)

    return _log(request, values, "iteration", "iteration", lambda position: position.iteration, page)


async def change_stream(request: Request, values: Values) -> Response:
    def page(reader: PlainReader, after: int) -> Rows:
        return reader.changes(key=values["key"], after=after, limit=PAGE)

    return _log(request, values, "change", "id", lambda position: position.change, page)


def _stream(request: Request, messages: AsyncIterator[ServerSentEvent]) -> Response:
    counts = request.app.state.streams
    if len(counts) >= MOST_STREAMS:
        return answer({"error": f"{MOST_STREAMS} streams are open already; try again later"}, 503)

    async def counted() -> AsyncIterator[ServerSentEvent]:
        counts.add(messages)
        try:
            with service_of(request).tail.following():
                async for message in messages:
                    yield message
        except AelError:
            return  # the browser comes back, and then the database may be there again
        finally:
            counts.discard(messages)

    return EventSourceResponse(counted(), ping=PING_S, send_timeout=SEND_TIMEOUT_S, sep="\n")


async def _commits(tail: Tail) -> AsyncIterator[ServerSentEvent]:
    position: Position | None = None
    while (position := await tail.after(position)) is not None:
        data = {
            "commit": position.commit,
            "iteration": position.iteration,
            "event": position.event,
            "change": position.change,
        }
        yield ServerSentEvent(to_json(data).decode(), event="commit", id=str(position.commit))


def _log(
    request: Request,
    values: Values,
    name: str,
    number: str,
    newest_of: Callable[[Position], int],
    page: Callable[[PlainReader, int], Rows],
) -> Response:
    given = request.headers.get("last-event-id", "")
    begin = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else values["after"]
    return _stream(request, _rows(service_of(request), begin, name, number, newest_of, page))


async def _rows(
    service: Service,
    begin: int | None,
    name: str,
    number: str,
    newest_of: Callable[[Position], int],
    page: Callable[[PlainReader, int], Rows],
) -> AsyncIterator[ServerSentEvent]:
    """Yield the rows that follow `begin`, without end; without it those that come from now on."""
    position = await service.tail.after(None)
    last = begin
    while position is not None:
        newest = newest_of(position)
        if last is None:
            last = newest
        elif newest < last:  # the client may know more than this tail has seen, from another server
            newest = newest_of(await service.tail.newest())
        if not 0 <= newest - last <= FURTHEST:  # far behind; or another file has this name now
            last = newest
            yield ServerSentEvent(to_json({"newest": newest}).decode(), event="resync", id=str(newest))
        while newest > last:
            rows = await service.database.read(lambda reader, after=last: page(reader, after))  # type: ignore[misc]
            for row in rows:
                last = row[number]
                yield ServerSentEvent(to_json(embed(row)).decode(), event=name, id=str(last))
            if len(rows) < PAGE:
                last = max(last, newest)  # what does not match is not looked at again
        position = await service.tail.after(position)
