"""What every handler works with: the database, its tail, its figures and its token."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from ael_store.web.database import Database
from ael_store.web.facts import Facts
from ael_store.web.guard import Access
from ael_store.web.tail import Tail
from ael_store.web.token import Token

__all__ = ["Service", "access_of", "service_of"]


@dataclass(frozen=True, slots=True)
class Service:
    """One server's parts."""

    database: Database
    tail: Tail
    facts: Facts
    token: Token | None
    idle_commit_s: float
    """How late idle iterations may be committed."""


def service_of(request: Request) -> Service:
    """Return the parts of the server that a request reached."""
    found: Service = request.app.state.service
    return found


def access_of(request: Request) -> Access:
    """Return what whoever asks may do, as the guard has found."""
    found: Access = request.state.access
    return found
