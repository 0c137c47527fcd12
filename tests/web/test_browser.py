"""The dashboard in a real browser, on a live loop that stores hostile things. No test lets the console complain."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Iterable
from typing import Any

import psutil
import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    ConsoleMessage,
    Dialog,
    Error,
    Page,
    Playwright,
    Request,
    async_playwright,
    expect,
)

from tests.web.browser import chromium, overflow
from tests.web.conftest import MARKUP, PATIENCE_S, Site, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGES = ["/", "/agents", "/agents/counter", "/state", "/state?prefix=evil", "/events", "/iterations", "/iterations/1"]
PAGES += [
    "/tasks",
    "/tasks/1",
    "/tasks/2",
    "/state?key=count",
    "/state?from=2&to=9",
    "/?at=5",
    "/measurements",
    "/login",
    "/nothing",
]


async def _launch(playwright: Playwright, path: str) -> Browser:
    """Start the browser; on a busy machine it may die while it starts, before any test has begun."""
    for _ in range(2):
        try:
            return await playwright.chromium.launch(executable_path=path)
        except Error:
            await asyncio.sleep(1)
    return await playwright.chromium.launch(executable_path=path)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    path = chromium()
    expect.set_options(timeout=500 * PATIENCE_S)
    async with async_playwright() as playwright:
        browser = await _launch(playwright, path)
        yield browser
        await browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser has to say against a page; empty at the end of each test."""
    return []


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser, site: Site, complaints: list[str]) -> AsyncIterator[Page]:
    context = await browser.new_context(base_url=f"http://{site.host}", reduced_motion="reduce")
    page = await context.new_page()

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.text} ({message.location})")

    def on_request(request: Request) -> None:
        if not request.url.startswith(f"http://{site.host}/"):
            complaints.append(f"it asked {request.url}")

    async def on_dialog(dialog: Dialog) -> None:
        complaints.append(f"a script of an agent ran: {dialog.message}")
        await dialog.dismiss()

    page.on("console", on_console)
    page.on("request", on_request)
    page.on("dialog", on_dialog)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    await context.close()
    assert not complaints


def in_database(site: Site, sql: str, *parameters: Any) -> list[Any]:
    with sqlite3.connect(f"{site.database.as_uri()}?mode=ro", uri=True) as database:
        return [row[0] for row in database.execute(sql, parameters)]


async def test_a_value_changes_without_a_reload(page: Page) -> None:
    loads: list[Page] = []
    page.on("load", lambda loaded: loads.append(loaded))
    await page.goto("/state?key=count")
    await expect(page.locator("#connection")).to_have_text("Live")
    current = page.locator("#current")
    before = int(await current.inner_text())
    await page.locator("#prefix").focus()

    await expect(current).not_to_have_text(str(before))
    assert int(await current.inner_text()) > before
    await expect(page.locator("#history-plot canvas")).to_be_visible()
    await expect(page.locator("#prefix")).to_be_focused()
    assert len(loads) == 1


async def test_events_are_filtered_and_go_on_coming(page: Page) -> None:
    await page.goto("/events")
    await page.locator("#filter-type").fill("be*")
    await page.locator("#filter-source").fill("counter")
    await page.keyboard.press("Enter")
    await page.wait_for_url(re.compile(r"type=be"))
    newest = page.locator("#log > tr").first
    before = await newest.get_attribute("data-event")
    assert before is not None

    await expect(newest).not_to_have_attribute("data-event", before)
    assert set(await page.locator('#log td[data-label="Type"]').all_inner_texts()) == {"beat"}

    await page.locator("#filter-none").click()
    await page.locator("#filter-text").fill("onerror")
    await page.locator("#filter-text").press("Enter")
    await page.wait_for_url(re.compile(r"text=onerror"))
    found = page.locator('#log > tr[data-event] td[data-label="Type"]')
    await expect(found.filter(has_text="hostile " + MARKUP[:40])).to_have_count(1)
    await page.locator("#log details summary").first.click()
    await expect(page.locator("#log pre.value").first).to_contain_text("<script>alert(1)</script>")


async def test_slider_shows_the_past(page: Page, site: Site) -> None:
    connection = page.locator("#connection")
    await page.goto("/state?key=count")
    await expect(connection).to_have_text("Live")
    await page.locator("#slider").fill("7")

    then = in_database(
        site,
        "SELECT new_value FROM v_state_history WHERE key = 'count' AND iteration <= 7 ORDER BY id DESC LIMIT 1",
    )
    await expect(page.locator("#current")).to_have_text(then[0])
    await expect(connection).to_have_text("Past")
    await page.locator("nav[aria-label=Pages] >> text=Overview").click()
    await expect(connection).to_have_text("Live")
    await page.locator("#slider").fill("9")
    await expect(page.locator("#verdict-word")).to_have_text("As of iteration 9")
    assert "at=9" in page.url

    await page.locator("#to-now").click()
    await expect(connection).to_have_text("Live")
    await expect(page.locator("#verdict-word")).not_to_contain_text("As of")


async def test_agent_is_switched_off_and_on(page: Page, site: Site) -> None:
    def statuses() -> list[Any]:
        return in_database(site, "SELECT status FROM v_agents WHERE name LIKE 'deaf %'")

    row = page.locator('[data-agent^="deaf "]')
    await page.goto("/agents")
    await expect(row).to_be_visible()
    await expect(row.get_by_role("button")).to_have_count(0)  # who is not logged in only looks
    await page.goto("/login")
    await page.goto(f"/login#{site.token}")
    await page.wait_for_url(f"http://{site.host}/")
    await page.goto("/agents")
    await row.get_by_role("button", name="Disable").click()

    await expect(row.locator(".chip")).to_have_text("disabled")
    await expect(page.locator("#notice")).to_have_text("Done, and committed.")
    assert statuses() == ["disabled"]

    await row.get_by_role("button", name="Enable").click()
    await expect(row.locator(".chip")).to_have_text("active")
    assert statuses() == ["active"]


async def test_log_misses_nothing_while_the_server_is_restarted(page: Page, site: Site, complaints: list[str]) -> None:
    await page.goto("/events?type=beat")
    newest = page.locator("#log > tr").first
    connection = page.locator("#connection")
    await expect(connection).to_have_text("Live")
    at_start = await newest.get_attribute("data-event")
    assert at_start is not None
    await expect(newest).not_to_have_attribute("data-event", at_start)

    (server,) = psutil.Process(site.get("/api/v1/status").json["pid"]).children()
    server.kill()
    await expect(connection).to_have_text("Connection lost")
    await expect(connection).to_have_text("Live")

    def shown(ids: Iterable[str]) -> list[int]:
        return sorted(int(id_) for id_ in ids if int(id_) > int(at_start))

    last = in_database(site, "SELECT max(id) FROM v_events WHERE type = 'beat'")[0]
    await expect(page.locator(f'[data-event="{last}"]')).to_be_attached()
    # all at one moment: rows come while one reads
    found = shown(await page.locator("#log > tr").evaluate_all("rows => rows.map((row) => row.dataset.event)"))
    wanted = in_database(
        site, "SELECT id FROM v_events WHERE type = 'beat' AND id BETWEEN ? AND ?", int(at_start) + 1, found[-1]
    )
    assert found == wanted
    # That the connection broke off is what the browser had to complain about.
    complaints[:] = [one for one in complaints if "net::ERR_" not in one]
    until(lambda: site.get("/api/v1/status").status == 200)


@pytest.mark.parametrize("width", [360, 1280])
async def test_every_page_fits(page: Page, site: Site, width: int, complaints: list[str]) -> None:
    """With keys and names that nobody made to fit."""
    await page.set_viewport_size({"width": width, "height": 740})
    await page.goto(f"/login#{site.token}")
    await page.wait_for_url(f"http://{site.host}/")
    for path in PAGES:
        await page.goto(path)
        await expect(page.locator("h1, .word").first).to_be_visible()
        assert await overflow(page) == [], path
    complaints[:] = [one for one in complaints if "404" not in one]  # of /nothing, which is there to be missing
