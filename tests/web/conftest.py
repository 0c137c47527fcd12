"""A real loop with its dashboard on a real port, shared by the tests of this folder."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover='alert(1)"
CONTROL = "\x1b[31m\u202e\u2028\x07"

AGENTS = f"""
from ael_store import AgentBase, push_metrics, task

MARKUP = {MARKUP!r}
CONTROL = {CONTROL!r}

class Counter(AgentBase):
    name = "counter"
    priority = 10

    def on_tick(self, context):
        context.increment("count")
        context.set("house/kitchen/temperature", 20 + context.iteration % 3)
        context.metrics.gauge("load", context.iteration % 3)
        context.metrics.count("rounds")
        context.metrics.timing("work", 0.002)
        push_metrics("room " + MARKUP, {{'a"b\\\\n': 0.5}})
        if context.iteration == 1:
            context.set("evil/" + MARKUP, MARKUP)
            context.set("evil/control", CONTROL)
            context.set("evil/long", "<b>" + 300_000 * "x")
            deep = 1
            for _ in range(98):
                deep = [deep]
            context.set("evil/deep", deep)
            context.emit("hostile " + MARKUP, {{"text": MARKUP, "control": CONTROL}})
            context.ask("Go on " + MARKUP + "?", choices=["yes", "no"])
            context.submit(fails, key=MARKUP)
        if context.iteration % 5 == 0:
            context.emit("beat", {{"n": context.iteration}})

class Deaf(AgentBase):
    name = "deaf " + MARKUP.replace("/", "|")
    subscriptions = ["hostile*"]

    def on_event(self, event, context):
        raise ValueError("will not: " + MARKUP)

@task(attempts=1)
def fails():
    raise ValueError(MARKUP)
"""


@dataclass(frozen=True)
class Answer:
    """What a server has answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """A dashboard, asked as a browser or a script asks it."""

    def __init__(self, database: Path, port: int) -> None:
        self.database = database
        self.port = port
        self.host = f"127.0.0.1:{port}"

    @property
    def token(self) -> str:
        return self.database.with_name(self.database.name + ".token").read_text().strip()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request; `Host` and `Content_Type` and so on are headers, an empty one is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.putrequest(method, path, skip_host=True)
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            for name, value in {"Host": self.host, **given}.items():
                if value:
                    connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, **headers)

    def page(self, path: str) -> str:
        """Return a page as somebody who may change things sees it."""
        answer = self.get(path, Accept="text/html", Authorization=f"Bearer {self.token}")
        assert answer.status == 200, answer.text
        return answer.text

    def post(self, path: str, fields: dict[str, Any] | None = None, **headers: str) -> Answer:
        """Change something as a script does."""
        body = json.dumps(fields or {}).encode()
        given = {"Content_Type": "application/json", "Authorization": f"Bearer {self.token}", **headers}
        return self.ask("POST", path, body, **given)

    @contextmanager
    def stream(self, path: str, **headers: str) -> Iterator[Iterator[tuple[str, str, Any]]]:
        """Yield the messages of a stream: name, id, data."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        try:
            yield _messages(answer)
        finally:
            answer.close()
            connection.close()


def _messages(lines: Any) -> Iterator[tuple[str, str, Any]]:
    found: dict[str, str] = {}
    for raw in lines:
        name, _, value = raw.decode().rstrip("\r\n").partition(": ")
        if not name and "data" in found:
            yield found["event"], found["id"], json.loads(found["data"])
            found = {}
        elif value:
            found[name] = value


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AEL_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real `ael` for the length of a block; what it says is in `log`."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ael_store", *arguments],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Return the first true result of a condition that another process brings about."""
    give_up = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process is None or process.poll() is None, f"the process has ended with {process.returncode}"
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.02)
    return found


def port_in(folder: Path, process: subprocess.Popen[bytes] | None = None, nth: int = 0) -> int:
    """Return the port that a server has said."""

    def said() -> str | None:
        found = re.findall(r"dashboard at http://[\w.\[\]:]+:(\d+)/", (folder / "log").read_text())
        return found[nth] if len(found) > nth else None

    return int(until(said, process))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A loop with its dashboard; tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "agents.py").write_text(AGENTS)
    (folder / "ael.toml").write_text('web = "127.0.0.1:0"\ndelivery_attempts = 1\ntick_rate = 0.05\n')
    with running(folder, "run", "agents.py", "--quiet") as process:
        found = Site(folder / "ael.db", port_in(folder, process))
        until(lambda: found.get("/api/v1/status").json.get("iteration", 0) > 12, process)
        until(lambda: found.get("/api/v1/events/dead").json["items"], process)
        until(lambda: found.get("/api/v1/tasks?status=failed").json["items"], process)
        yield found
        assert process.poll() is None
