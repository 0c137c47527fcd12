"""Who may ask for what: the one layer around everything that the server answers.

- **Names**: only hosts that this server is known by are answered. A page elsewhere whose name was made to mean this
  machine (DNS rebinding) sends its own name.
- **Methods**: `GET` and `HEAD` read, `POST` changes; there is nothing else, and no answer for other origins (CORS).
- **Token**: a change needs it, and so does everything that does not come by a loopback name. Scripts send it as
  `Authorization: Bearer …`; a browser shows a cookie that the login page gave for it.
- **Origin**: a `POST` of a browser must come from a page of this server. One without `Origin` must carry the bearer
  token, which no page of somebody else knows, or come from the same site by `Sec-Fetch-Site`.
- **Headers**: no script, style or frame but our own; nothing is kept by caches, sniffed, or told to other sites.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response

from ael_store.web.address import Address, is_loopback
from ael_store.web.token import COOKIE, Token

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CONTENT_POLICY", "Access", "Guard"]

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; font-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}

OPEN = ("/login", "/static/")
"""What is answered without a token, from everywhere; it says nothing of the database."""

READING = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Access:
    """What somebody who asks may do; `request.state.access` in every handler."""

    may_change: bool
    """The token was shown, and the server is not read-only."""
    is_known: bool
    """The token was shown."""
    read_only: bool


class Guard:
    """Wraps an application."""

    def __init__(
        self, app: ASGIApp, address: Address, token: Token | None, *, hosts: Iterable[str] = (), read_only: bool = False
    ) -> None:
        self.app = app
        self.address = address
        self.token = token
        self.read_only = read_only
        self.hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._refusal(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await (self.app if answer is None else answer)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is refused; None where it is not, and its state says what it may."""
        headers = Headers(scope=scope)
        method, path = scope["method"], scope["path"]
        name = _host_name(headers.getlist("host"))
        if name is None or not self._is_ours(name):
            return _refused(
                421, "this server is not known by the name in the header Host; setting web_hosts adds names"
            )
        known, by_bearer = self._knows_token(headers)
        scope.setdefault("state", {})["access"] = Access(known and not self.read_only, known, self.read_only)
        if method not in (*READING, "POST"):
            return _refused(405, f"{method} is not answered here: GET reads, POST changes", allow="GET, HEAD, POST")
        if method == "POST":
            if not _is_same_origin(headers, by_bearer):
                return _refused(403, "a change must come from a page of this server, or carry the token as a bearer")
            if path == "/login":
                return None
            if self.read_only:
                return _refused(403, "this dashboard is read-only")
            if not known:
                return _refused(401, self._how_to_login())
        elif not (known or self._is_free(name) or path.startswith(OPEN)):
            if "text/html" in headers.get("accept", ""):
                return RedirectResponse("/login", 303)
            return _refused(401, self._how_to_login())
        return None

    def _is_ours(self, name: str) -> bool:
        everywhere = self.address.host in ("0.0.0.0", "::")
        return (
            is_loopback(name)
            or name in self.hosts
            or (name == self.address.host.lower())
            or (everywhere and _is_number(name))
        )

    def _is_free(self, name: str) -> bool:
        """Say whether reading needs no token: only on this machine, and by a name that means it."""
        return self.address.is_loopback and is_loopback(name)

    def _knows_token(self, headers: Headers) -> tuple[bool, bool]:
        """Return whether the token was shown, and whether as a bearer."""
        if self.token is None:
            return False, False
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.token.fits(given):
            return True, True
        cookie = cookie_parser("; ".join(headers.getlist("cookie"))).get(COOKIE, "")
        return bool(cookie) and self.token.fits_session(cookie), False

    def _how_to_login(self) -> str:
        if self.token is None:
            return "this dashboard takes no token"
        return f"the token is missing or wrong; it stands in {self.token.path.name} beside the database"


def _host_name(values: list[str]) -> str | None:
    """Return the name in a Host header without its port; None where there is not exactly one."""
    if len(values) != 1:
        return None
    try:
        parts = urlsplit(f"//{values[0]}")
        if parts.path or parts.username is not None or parts.port == 0:
            return None
        return parts.hostname
    except ValueError:
        return None


def _is_number(name: str) -> bool:
    """Say whether a name is an IP address: nobody can make that mean something else."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same_origin(headers: Headers, by_bearer: bool) -> bool:
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    if origin not in (None, "null"):  # our own forms say `null`, because they tell nobody where they come from
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    return by_bearer or site == "same-origin"


def _refused(status: int, why: str, **headers: str) -> Response:
    return JSONResponse({"error": why}, status, headers=headers)
