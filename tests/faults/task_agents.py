"""Agents that submit tasks under load, from ticks, events and `transact`, and count in the state what came of each.

Tasks are numbered: `bank/submitted` is 12 where the keys `bank:1` to `bank:12` must exist. `bank/effect/7` says how
often the result of `bank:7` was taken up, `bank/applied` how many were, `bank/micros` what they cost in all. What the
server of `tasks.py` answers to a number is known before (`ends_well`); its port is in TASK_TRIAL_PORT.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
from pathlib import Path
from typing import Any

from ael_store import (
    AELController,
    AgentBase,
    AgentManager,
    Event,
    EventBus,
    Fatal,
    RetryAfter,
    Settings,
    StateContext,
    task,
)
from tests.faults.agents import crash_settings

__all__ = ["BACKLOG", "KINDS", "PORT", "controller_on", "ends_well", "order_mail", "rest", "task_agents"]

PORT = "TASK_TRIAL_PORT"
KINDS = ("bank", "desk", "minute", "day", "budget", "mail")
"""What is submitted; those but `mail` have a limit of their name."""
BACKLOG = {"bank": 12, "desk": 10, "minute": 8, "day": 8, "budget": 8, "mail": 6}
"""Most tasks of a kind that are open at once, so that the end does not take as long as the load."""
ATTEMPTS = 5
TIMEOUT_S = 1.0
MAX_USD = "0.01"

_resting = False


def rest() -> None:
    """Have the agents of this process submit nothing more but what an event tells them to."""
    global _resting
    _resting = True


def ends_well(kind: str, number: int) -> bool:
    """False for the numbers that the server refuses each time."""
    return bool(number % 29 and (number % 31 or kind not in ("bank", "desk")))


# -- calling the server -----------------------------------------------------------------------------


def _taken(attempt: Any, status: int, answer: dict[str, Any]) -> Any:
    """Make of an answer what the function of a task makes of it."""
    if "usd" in answer:
        attempt.cost(answer["usd"])
    if status == 200:
        return {"number": answer["number"]}
    if status == 429:
        raise RetryAfter(float(answer["after"]), "slow down")
    if status == 400:
        raise Fatal("the server does not want it")
    raise RuntimeError(f"the server said {status}")


def _request(attempt: Any, kind: str, number: int) -> str:
    return (
        f"POST /{kind} HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: {attempt.key}\r\n"
        f"X-Attempt: {attempt.attempt}\r\nX-Number: {number}\r\nContent-Length: 0\r\n\r\n"
    )


async def call(attempt: Any, kind: str, number: int) -> Any:
    """Ask the server beside the loop."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ[PORT]))
    try:
        writer.write(_request(attempt, kind, number).encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.read()
    finally:
        writer.close()
    return _taken(attempt, int(head.split()[1]), json.loads(body))


def call_plainly(attempt: Any, kind: str, number: int) -> Any:
    """Ask the server in a thread."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ[PORT]), timeout=1.5 * TIMEOUT_S)
    try:
        headers = {"Idempotency-Key": attempt.key, "X-Attempt": str(attempt.attempt), "X-Number": str(number)}
        connection.request("POST", f"/{kind}", headers=headers)
        response = connection.getresponse()
        return _taken(attempt, response.status, json.loads(response.read()))
    finally:
        connection.close()


def was_sent(key: str) -> Any:
    """Ask the server whether a mail has gone out."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ[PORT]), timeout=1.5 * TIMEOUT_S)
    try:
        connection.request("GET", "/sent", headers={"Idempotency-Key": key})
        response = connection.getresponse()
        answer = json.loads(response.read())
        return answer if response.status == 200 else None
    finally:
        connection.close()


@task(name="mail", attempts=ATTEMPTS, timeout=TIMEOUT_S, backoff=0.02, reconcile=was_sent)
async def send_mail(attempt: Any, number: int) -> Any:
    return await call(attempt, "mail", number)


def order_mail(context: StateContext) -> int:
    """What a customer does by `transact`: submit a task of no agent. Returns how many there are."""
    number: int = context.get("mail/submitted", 0)
    if _resting or number - context.get("mail/applied", 0) >= BACKLOG["mail"]:
        return number
    context.submit(send_mail, number + 1, key=f"mail:{number + 1}")
    context.set("mail/submitted", number + 1)
    return number + 1


# -- agents -----------------------------------------------------------------------------------------


def count(context: StateContext, kind: str, key: str, status: str, result: Any, usd: float | None) -> None:
    """Enter a result in the state."""
    number = int(key.partition(":")[2])
    context.increment(f"{kind}/effect/{number}")
    context.increment(f"{kind}/applied")
    context.increment(f"{kind}/micros", round((usd or 0) * 1_000_000))
    if status != "done":
        context.increment(f"{kind}/{status}")
    elif result != {"number": number}:
        context.increment(f"{kind}/wrong")


class Submitter(AgentBase):
    """Submits one numbered task after the other, some of them again."""

    priority = 10
    kind = ""

    async def on_tick(self, context: StateContext) -> None:
        if _resting:
            return
        kind = self.kind
        number: int = context.get(f"{kind}/submitted", 0)
        room = BACKLOG[kind] - (number - context.get(f"{kind}/applied", 0))
        for _ in range(min(room, context.random.randint(0, 3))):
            number += 1
            self.submit_one(context, number)
            context.set(f"{kind}/submitted", number)
        if number and context.random.random() < 0.1:
            self.submit_one(context, context.random.randint(max(1, number - 30), number))
        if context.random.random() < 0.02:  # what was submitted here never was
            self.submit_one(context, 1_000_000 + context.iteration)
            raise RuntimeError("the pen broke")

    def submit_one(self, context: StateContext, number: int) -> None:
        context.submit(
            self.work,  # type: ignore[attr-defined]
            number,
            key=f"{self.kind}:{number}",
            limit=self.kind,
            priority=context.random.randint(0, 10),
        )

    async def on_task(self, task: Any, context: StateContext) -> None:
        total = context.get("total", 0)
        count(context, self.kind, task.key, task.status, task.result, task.cost_usd)
        await asyncio.sleep(context.random.choice((0, 0, 0.002)))
        context.set("total", total + 1)  # all agents write it: in the background, others were often faster
        if context.random.random() < 0.003:
            raise RuntimeError("the ink ran out")


class Bank(Submitter):
    name = kind = "bank"

    @task(attempts=ATTEMPTS, timeout=TIMEOUT_S, backoff=0.02)
    async def work(self, attempt: Any, number: int) -> Any:
        return await call(attempt, "bank", number)

    def submit_one(self, context: StateContext, number: int) -> None:
        super().submit_one(context, number)
        if number % 3 == 0:  # the same key twice in a unit is the same task
            super().submit_one(context, number)


class Minute(Submitter):
    name = kind = "minute"

    @task(attempts=ATTEMPTS, timeout=TIMEOUT_S, backoff=0.02)
    async def work(self, attempt: Any, number: int) -> Any:
        return await call(attempt, "minute", number)


class Day(Submitter):
    name = kind = "day"

    @task(attempts=ATTEMPTS, timeout=TIMEOUT_S, backoff=0.02)
    def work(self, attempt: Any, number: int) -> Any:
        return call_plainly(attempt, "day", number)


class Budget(Submitter):
    name = kind = "budget"

    @task(attempts=ATTEMPTS, timeout=TIMEOUT_S, backoff=0.02, max_usd=MAX_USD)
    async def work(self, attempt: Any, number: int) -> Any:
        return await call(attempt, "budget", number)


class Customer(AgentBase):
    """Emits the events to which the desk submits."""

    name = "customer"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        number: int = context.get("ordered", 0)
        if not _resting and number - context.get("desk/applied", 0) < BACKLOG["desk"]:
            context.set("ordered", number + 1)
            context.emit("ordered", {"number": number + 1})


class DeskClerk(Submitter):
    """Submits plain functions, one for each event; its hooks go on while others change what they have read."""

    name = kind = "desk"
    priority = 1
    background = True
    subscriptions = ("ordered",)

    async def on_tick(self, context: StateContext) -> None:
        pass

    async def on_event(self, event: Event, context: StateContext) -> None:
        self.submit_one(context, event.data["number"])
        context.increment("desk/submitted")
        if context.random.random() < 0.01:
            raise RuntimeError("the paper tore")  # the event comes again, and with it the task

    @task(attempts=ATTEMPTS, timeout=TIMEOUT_S, backoff=0.02)
    def work(self, attempt: Any, number: int) -> Any:
        return call_plainly(attempt, "desk", number)


class Postman(AgentBase):
    """Counts the tasks of nobody, of which the loop tells by an event."""

    name = "postman"
    priority = 1
    subscriptions = ("task_finished",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        told = event.data
        count(context, "mail", told["key"], told["status"], told["result"], told["cost_usd"])


def task_agents() -> list[AgentBase]:
    """Return one of each."""
    return [Bank(), Minute(), Day(), Budget(), Customer(), DeskClerk(), Postman()]


def controller_on(path: Path, limits: dict[str, dict[str, Any]], **settings: Any) -> AELController:
    """Return a controller of these agents."""
    manager = AgentManager()
    for agent in task_agents():
        manager.register(agent)
    return AELController(
        manager,
        EventBus(),
        state_context=StateContext(),
        store=path,
        settings=Settings(**{**crash_settings(), "limits": limits, "quarantine_after": 10_000, **settings}),
    )
