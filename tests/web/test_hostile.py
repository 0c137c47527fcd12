"""What agents store is shown as text, whatever it is."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

from tests.web.conftest import MARKUP, Site

ALLOWED_SCRIPTS = {"/static/page.js", "/static/login.js"}


class Seen(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.scripts: set[str] = set()
        self.handlers: set[str] = set()
        self.addresses: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = {name: value or "" for name, value in attributes}
        self.handlers |= {name for name in given if name.startswith("on") or name in ("style", "srcdoc")}
        self.addresses |= {value for name, value in given.items() if name in ("href", "src", "action")}
        if tag == "script":
            self.scripts.add(given.get("src", "(inline)"))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def agent(site: Site) -> str:
    return quote("deaf " + MARKUP.replace("/", "|"), safe="")


PATHS = (
    "/",
    "/agents",
    "/agents/{agent}",
    "/state",
    "/state?key={key}",
    "/state?key=evil/control",
    "/state?key=evil/deep",
    "/state?key=evil/long",
    "/state?from=0&prefix=evil/",
    "/state?at=3",
    "/events",
    "/events?type={key}&source={markup}&text={markup}",
    "/iterations",
    "/iterations/1",
    "/tasks",
    "/measurements",
    "/tasks/1",
    "/tasks/2",
    "/?at=2",
    "/agents?at=2",
)


@pytest.mark.parametrize("path", PATHS)
def test_payload_is_text_on_every_page(site: Site, agent: str, path: str) -> None:
    page = site.page(path.format(agent=agent, key=quote("evil/" + MARKUP), markup=quote(MARKUP)))

    seen = Seen(page)

    assert seen.scripts <= ALLOWED_SCRIPTS
    assert not seen.handlers
    assert "img" not in seen.tags and "style" not in seen.tags
    assert all(address.startswith(("/", "#")) and not address.startswith("//") for address in seen.addresses)
    assert not set("\x1b\u202e\u2028\x07") & set(page)
    assert len(page) < 1_000_000


def test_payload_stays_whole_where_it_is_shown(site: Site) -> None:
    seen = Seen(site.page(f"/state?key={quote('evil/' + MARKUP)}"))

    assert MARKUP in seen.text  # the heading
    assert json.dumps(MARKUP) in seen.text  # the value
    assert "\\u202e" in Seen(site.page("/state?key=evil/control")).text


def test_json_gives_payloads_as_they_are(site: Site) -> None:
    items = site.get(f"/api/v1/state?key={quote('evil/' + MARKUP)}").json["items"]
    deep = site.get("/api/v1/state?key=evil/deep").text
    long = site.get("/api/v1/state?key=evil/long").json["items"][0]["value"]

    assert items[0]["value"] == MARKUP
    assert 98 * "[" + "1" + 98 * "]" in deep
    assert len(long) == 300_003


def test_error_repeats_hostile_input_as_text(site: Site) -> None:
    for path in (f"/agents/{quote(MARKUP.replace('/', '|'))}", f"/?at={quote(MARKUP)}", f"/?{quote(MARKUP)}=1"):
        answer = site.get(path, Accept="text/html")
        assert answer.status in (400, 404)
        seen = Seen(answer.text)
        assert not seen.scripts and not seen.handlers and "img" not in seen.tags


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/events?limit=0",
        "/api/v1/events?limit=1001",
        "/api/v1/events?limit=-1",
        "/api/v1/events?before=99999999999999999999",
        "/api/v1/events?after=x",
        "/api/v1/events?tpye=x",
        "/api/v1/events?text=%00",
        "/api/v1/tasks?status=lost",
        "/api/v1/state?at=soon",
        "/api/v1/state?at=999999999",
        "/api/v1/state/diff",
        "/state?from=soon",
    ],
)
def test_wrong_parameter_is_named(site: Site, path: str) -> None:
    answer = site.get(path)

    assert answer.status == 400
    assert len(answer.json["error"]) > 20


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'"x"', b"[" * 100_000, b'{"choice": {}}', b'{"choise": "yes"}', b"\xff"]
)
def test_wrong_body_is_refused(site: Site, body: bytes) -> None:
    before = site.get("/api/v1/tasks/1").json

    answer = site.ask(
        "POST",
        "/api/v1/tasks/1/answer",
        body,
        Content_Type="application/json",
        Authorization=f"Bearer {site.token}",
    )

    assert answer.status == 400, answer.text
    assert site.get("/api/v1/tasks/1").json == before


def test_body_without_end_is_refused(site: Site) -> None:
    answer = site.ask(
        "POST",
        "/api/v1/tasks/1/answer",
        b'{"choice": "' + 2_000_000 * b"x" + b'"}',
        Content_Type="application/json",
        Authorization=f"Bearer {site.token}",
    )

    assert answer.status == 400
    assert "longer than" in answer.json["error"]
