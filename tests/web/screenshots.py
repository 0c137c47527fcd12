"""Makes the pictures of the dashboard in docs/images/dashboard.

    ./dev python -m tests.web.screenshots [FOLDER]

A greenhouse is run for half a minute, with what a real one has: an agent that fails, letters nobody could deliver,
tasks under way, questions. Every page is taken wide and narrow, light and dark, as WebP, which is a third of a PNG.
"""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from playwright.async_api import Page, async_playwright, expect

from tests.web.browser import NO_BROWSER, installed
from tests.web.conftest import ROOT, Site, environment, port_in, running, until

FOLDER = ROOT / "docs" / "images" / "dashboard"
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
QUALITY = 70
ITERATIONS = 100

PAGES = {
    "overview": "/",
    "overview-past": "/?at=40",
    "agents": "/agents",
    "agent": "/agents/irrigation",
    "state": "/state?key=greenhouse/north/temperature",
    "state-diff": "/state?from=10&to=60#diff",
    "events": "/events",
    "iterations": "/iterations",
    "iteration": "/iterations/{warned}",
    "tasks": "/tasks",
    "task": "/tasks/{failed}",
    "metrics": "/measurements?channel=climate&name=temperature_north",
}

SETTINGS = """
web = "127.0.0.1:0"
tick_rate = 0.25
delivery_attempts = 2
quarantine_after = 6
backoff_after = 5

[limits.llm]
concurrency = 3
per_day = 200
usd_per_day = 2
"""

AGENTS = """
import asyncio
import math

from ael_store import AgentBase, Fatal, task

HOUSES = {"north": 21, "south": 24}


class Climate(AgentBase):
    name = "climate"
    priority = 10

    async def on_tick(self, context):
        await asyncio.sleep(0.002 + context.random.random() * 0.006)
        for house, mean in HOUSES.items():
            wave = math.sin(context.iteration / 9 + mean)
            degrees = round(mean + 3 * wave + context.random.uniform(-0.3, 0.3), 1)
            was = context.get(f"greenhouse/{house}/temperature", mean)
            context.set(f"greenhouse/{house}/temperature", degrees)
            context.set(f"greenhouse/{house}/humidity", round(62 - 9 * wave))
            context.metrics.gauge(f"temperature_{house}", degrees)
            if was < mean + 2 <= degrees:
                context.emit("too_warm", {"house": house, "degrees": degrees})


class Irrigation(AgentBase):
    name = "irrigation"
    trigger = "every 1s"
    subscriptions = ["too_warm"]

    async def on_tick(self, context):
        await asyncio.sleep(0.004 + context.random.random() * 0.01)
        for house in HOUSES:
            soil = context.get(f"soil/{house}", 48) - context.random.randint(0, 3)
            if soil < 40:
                context.emit("watered", {"house": house, "litres": 12, "soil": soil})
                context.metrics.count("litres", 12)
                soil = 52
            context.set(f"soil/{house}", soil)

    async def on_event(self, event, context):
        context.set(f"greenhouse/{event.data['house']}/window", "open")
        context.emit("window_opened", {"house": event.data["house"]})


class Camera(AgentBase):
    name = "camera"
    trigger = "every 500ms"

    async def on_tick(self, context):
        raise ConnectionRefusedError("camera.garden:554 does not answer")


class FrostGuard(AgentBase):
    name = "frost_guard"
    subscriptions = ["frost"]


class Messenger(AgentBase):
    name = "messenger"
    subscriptions = ["watered"]

    async def on_event(self, event, context):
        if event.data["house"] == "south":
            raise TimeoutError("no answer from mail.example.org within 5 s")
        context.increment("messages_sent")


class Gardener(AgentBase):
    name = "gardener"
    trigger = "every 10s"

    async def on_start(self, context):
        context.ask("Order 40 kg of potting soil for 62 USD?", {"usd": 62}, choices=("yes", "no"), key="soil")
        context.ask("Which row gets the new tomatoes?", {"plants": 12}, timeout="48h", key="row")
        for bed in range(1, 4):
            context.submit(self.survey, bed, key=f"survey/{bed}", limit="llm")
        context.submit(self.pump, "south", key="pump/south")

    async def on_tick(self, context):
        context.submit(self.advise, context.get("greenhouse/north/temperature"), limit="llm")

    @task(attempts=3)
    async def advise(self, task, degrees):
        task.cost(usd=0.004)
        await asyncio.sleep(0.3)
        return f"It is {degrees} degrees: keep the north windows shut until noon."

    @task(timeout=600)
    async def survey(self, task, bed):
        if bed == 1:
            task.cost(usd=0.031)
            return {"bed": bed, "plants": 84, "weeds": 9}
        for photo in range(1, 401):
            task.progress(photo * bed / 1200, f"photo {photo * bed} of 1200")
            await asyncio.sleep(0.5 / bed)

    @task
    async def pump(self, task, house):
        raise Fatal(f"the pump of house {house} is not known to the controller")

    async def on_task(self, task, context):
        if task.result is not None:
            context.set(f"advice/{task.id}" if task.name == "advise" else task.key, task.result)
"""


async def take(page: Page, path: Path) -> None:
    """Take what is in sight, as WebP: Playwright itself has only PNG and JPEG."""
    session = await page.context.new_cdp_session(page)
    wanted: dict[str, Any] = {"format": "webp", "quality": QUALITY}
    path.write_bytes(base64.b64decode((await session.send("Page.captureScreenshot", wanted))["data"]))
    await session.detach()


async def take_all(site: Site, folder: Path, executable: str) -> None:
    errors = site.get("/api/v1/events?type=watered").json["items"]
    failed = site.get("/api/v1/tasks?status=failed").json["items"]
    numbers = {"warned": errors[0]["iteration"], "failed": failed[0]["id"]}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable)
        for size, (width, height) in SIZES.items():
            for scheme in SCHEMES:
                context = await browser.new_context(
                    base_url=f"http://{site.host}",
                    viewport={"width": width, "height": height},
                    color_scheme=scheme,
                    reduced_motion="reduce",
                    has_touch=size == "narrow",
                    is_mobile=size == "narrow",
                )
                page = await context.new_page()
                await page.goto("/login")
                await take(page, folder / f"login-{size}-{scheme}.webp")
                await page.goto(f"/login#{site.token}")
                await page.wait_for_url(f"http://{site.host}/")
                for name, address in PAGES.items():
                    await page.goto(address.format(**numbers))
                    await expect(page.locator("#connection")).to_have_text("Past" if "at=" in address else "Live")
                    await take(page, folder / f"{name}-{size}-{scheme}.webp")
                await context.close()
        await browser.close()


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    executable = installed()
    if executable is None:
        sys.exit(NO_BROWSER)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "greenhouse"
        home.mkdir()
        (home / "agents.py").write_text(AGENTS)
        (home / "ael.toml").write_text(SETTINGS)
        with running(home, "run", "agents.py", "--quiet") as process:
            site = Site(home / "ael.db", port_in(home, process))
            until(lambda: site.get("/api/v1/status").json.get("iteration", 0) > 3, process)
            disable = [sys.executable, "-m", "ael_store", "agents", "disable", "frost_guard"]
            subprocess.run(disable, cwd=home, env=environment(), check=True, stdout=subprocess.DEVNULL)
            until(lambda: site.get("/api/v1/status").json.get("iteration", 0) > ITERATIONS, process)
            asyncio.run(take_all(site, folder, executable))
    taken = sorted(folder.glob("*.webp"))
    print(f"{len(taken)} pictures, {sum(one.stat().st_size for one in taken) / 1e6:.2f} MB, in {folder}")


if __name__ == "__main__":
    main()
