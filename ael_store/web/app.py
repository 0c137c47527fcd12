"""The application: routes, pages, files, errors, and the guard around them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ael_store.errors import AelError
from ael_store.web import pages
from ael_store.web.address import Address
from ael_store.web.answer import answer, status_of
from ael_store.web.guard import Guard
from ael_store.web.openapi import DESCRIPTION_PATH, describe
from ael_store.web.routes import ENDPOINTS, route_of
from ael_store.web.service import Service
from ael_store.web.token import Token

__all__ = ["make_app", "routes"]

STATIC = Path(__file__).parent / "static"

log = logging.getLogger("ael_store.web")


def routes() -> list[BaseRoute]:
    """Return every route of the server."""

    async def description(request: Request) -> Response:
        return answer(describe())

    return [
        *(route_of(endpoint) for endpoint in ENDPOINTS),
        Route(DESCRIPTION_PATH, description),
        *pages.routes(),
        Mount("/static", StaticFiles(directory=STATIC), name="static"),
    ]


def make_app(
    service: Service, address: Address, token: Token | None, *, hosts: Iterable[str] = (), read_only: bool = False
) -> ASGIApp:
    """Return the whole application."""
    app = Starlette(
        routes=routes(),
        exception_handlers={AelError: _failed, HTTPException: _refused, Exception: _broken},  # type: ignore[dict-item]
    )
    app.state.service = service
    app.state.streams = set()
    return Guard(app, address, token, hosts=hosts, read_only=read_only)


async def _failed(request: Request, error: AelError) -> Response:
    """Answer with what an error says."""
    return _told(request, status_of(error), str(error))


async def _refused(request: Request, error: HTTPException) -> Response:
    """Answer what starlette itself refuses: no such address, another method."""
    why = {404: "there is no such page", 405: "this address takes another method"}.get(error.status_code, error.detail)
    return _told(request, error.status_code, why)


async def _broken(request: Request, error: Exception) -> Response:
    """Answer to a mistake in the server itself; its log, which uvicorn writes, has the traceback."""
    return _told(request, 500, f"internal error: {type(error).__name__}; the server's log says where")


def _told(request: Request, status: int, why: str) -> Response:
    wants_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")
    if request.method == "GET" and wants_page:
        return pages.error_page(request, status, why)
    return answer({"error": why}, status)
