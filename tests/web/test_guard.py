"""Who may ask the dashboard for what. Each promise of `docs/how-to/dashboard.md#how-it-is-kept-safe` is tried here."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import quote

import pytest

from ael_store.web.address import Address
from ael_store.web.guard import CONTENT_POLICY
from ael_store.web.token import Token, TokenNotUsable
from tests.web.conftest import Site, port_in, running, until

PAGES = ("/", "/agents", "/state", "/events", "/iterations", "/tasks", "/login")
DISABLE = "/api/v1/agents/counter/disable"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1:{port}@evil.example",
        "evil.example/127.0.0.1",
        "10.0.0.1:{port}",
        "0.0.0.0:{port}",
        "[::1",
        "",
        "127.0.0.1:99999999",
    ],
)
def test_unknown_name_is_refused_for_pages_data_and_changes(site: Site, host: str) -> None:
    host = host.format(port=site.port)

    for answer in (
        site.get("/", Host=host),
        site.get("/api/v1/state", Host=host, Authorization=f"Bearer {site.token}"),
        site.get("/static/page.js", Host=host),
        site.post(DISABLE, Host=host),
    ):
        assert answer.status in (400, 421)
        assert b"counter" not in answer.body


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "LOCALHOST", "127.0.0.2", "[::1]:{port}"])
def test_names_of_this_machine_are_answered(site: Site, host: str) -> None:
    assert site.get("/api/v1/status", Host=host.format(port=site.port)).status == 200


def test_change_needs_the_token(site: Site) -> None:
    for given in ("", "Bearer ", "Bearer wrong", f"Basic {site.token}", f"Bearer {site.token}x", "Bearer \xff"):
        answer = site.post(DISABLE, Authorization=given, Origin=f"http://{site.host}")
        assert answer.status == 401, given
        assert site.token not in answer.text

    assert site.get("/api/v1/agents/counter").json["status"] == "active"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://{host}.evil.example"},
        {"Origin": "http://{host}", "Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {},
    ],
)
def test_browser_changes_only_from_a_page_of_this_server(site: Site, headers: dict[str, str]) -> None:
    headers = {name: value.format(host=site.host) for name, value in headers.items()}

    answer = site.ask(
        "POST", DISABLE, b"", Cookie=f"ael_session={session(site)}", Content_Type="application/json", **headers
    )

    assert answer.status == 403
    assert site.get("/api/v1/agents/counter").json["status"] == "active"


def session(site: Site) -> str:
    """Log in as a browser does, and return the cookie."""
    answer = site.ask(
        "POST",
        "/login",
        f"token={site.token}".encode(),
        Content_Type="application/x-www-form-urlencoded",
        Origin=f"http://{site.host}",
    )
    assert answer.status == 200
    name, _, rest = answer.headers["set-cookie"].partition("=")
    value, *attributes = (part.strip().lower() for part in rest.split(";"))
    assert name == "ael_session"
    assert {"httponly", "samesite=strict", "path=/"} <= set(attributes)
    assert site.token.lower() not in value
    return value


def test_browser_that_logged_in_changes_things(site: Site) -> None:
    headers = {"Cookie": f"ael_session={session(site)}", "Origin": f"http://{site.host}"}

    disabled = site.ask("POST", DISABLE, b"", **headers)
    enabled = site.ask("POST", DISABLE.replace("disable", "enable"), b"", Sec_Fetch_Site="same-origin", **headers)

    assert (disabled.status, disabled.json) == (200, {"name": "counter", "changed": True})
    assert enabled.json["changed"]


@pytest.mark.parametrize("given", ["", "wrong", "\x00", "x" * 100_000])
def test_wrong_token_does_not_log_in(site: Site, given: str) -> None:
    answer = site.ask(
        "POST",
        "/login",
        f"token={quote(given)}".encode(),
        Content_Type="application/x-www-form-urlencoded",
        Origin=f"http://{site.host}",
    )

    assert answer.status == 403
    assert "set-cookie" not in answer.headers


def test_nothing_is_changed_by_get_and_no_other_method_is_answered(site: Site) -> None:
    bearer = f"Bearer {site.token}"

    assert site.get(DISABLE, Authorization=bearer).status == 405
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        answer = site.ask(method, DISABLE, Authorization=bearer, Origin="http://evil.example")
        assert answer.status == 405
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert site.get("/api/v1/agents/counter").json["status"] == "active"


@pytest.mark.parametrize("path", [*PAGES, "/api/v1/state", "/static/page.js", "/nothing", "/api/v1/agents/nobody"])
def test_every_answer_has_the_headers_that_bind_a_browser(site: Site, path: str) -> None:
    headers = site.get(path, Accept="text/html").headers

    assert headers["content-security-policy"] == CONTENT_POLICY
    assert "unsafe" not in CONTENT_POLICY and "http" not in CONTENT_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers
    if not path.startswith("/static/"):
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/"]
)
def test_only_files_of_the_page_are_served(site: Site, path: str) -> None:
    assert site.get(path).status == 404


def test_token_file_is_private_and_a_readable_one_is_refused(tmp_path: Path) -> None:
    token = Token(tmp_path / "ael.db.token")

    token.make()
    first = token.text()
    token.make()

    assert stat.S_IMODE(token.path.stat().st_mode) == 0o600
    assert token.text() == first and len(first) > 40
    token.path.chmod(0o644)
    with pytest.raises(TokenNotUsable, match="can be read by others"):
        token.text()
    token.path.unlink()
    token.path.symlink_to("/etc/hostname")
    with pytest.raises(TokenNotUsable):
        token.text()


def test_read_only_changes_nothing_even_with_the_token(site: Site) -> None:
    folder = site.database.parent / "read-only"
    folder.mkdir()
    with running(folder, "web", "0", "--read-only", "--db", str(site.database)) as process:
        shown = Site(site.database, port_in(folder, process))
        until(lambda: shown.get("/api/v1/status").status == 200, process)

        assert shown.post(DISABLE).status == 403
        assert 'id="disable"' not in shown.page("/agents/counter")
        assert "only shows" in shown.page("/")
    assert "token" not in (folder / "log").read_text()


def test_from_elsewhere_reading_needs_the_token_too(site: Site) -> None:
    """A server that listens everywhere, asked by a number and by a name that settings allow."""
    folder = site.database.parent / "everywhere"
    folder.mkdir()
    arguments = ("web", "0.0.0.0:0", "--hosts", "ael.example, other.example", "--db", str(site.database))
    with running(folder, *arguments) as process:
        shown = Site(site.database, port_in(folder, process))
        bearer = f"Bearer {site.token}"
        for host in (f"127.0.0.1:{shown.port}", f"192.0.2.7:{shown.port}", "ael.example", "Other.Example:443"):
            for path in (*PAGES[:-1], "/api/v1/state", "/api/v1/events/stream", "/api/v1/openapi.json"):
                assert shown.get(path, Host=host).status == 401, (host, path)
            answer = shown.get("/", Host=host, Accept="text/html")
            assert (answer.status, answer.headers["location"]) == (303, "/login")
            assert shown.get("/login", Host=host).status == 200
            assert shown.get("/api/v1/status", Host=host, Authorization=bearer).status == 200
        assert shown.get("/", Host="evil.example", Authorization=bearer).status == 421


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_loopback_addresses_are_known(text: str) -> None:
    assert Address(text, 1).is_loopback


@pytest.mark.parametrize("text", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", ""])
def test_other_addresses_are_not_loopback(text: str) -> None:
    assert not Address(text, 1).is_loopback
