"""A small agent set whose state shows at once if anything was lost, done twice or done by halves.

python agents.py DATABASE [ITERATIONS]: runs it back to back, until it is killed or for so many iterations.
`invariants.py` says what must hold of a database that these agents have written.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ael_store import (
    AELController,
    AgentBase,
    AgentManager,
    Event,
    Settings,
    StateContext,
    get_event_bus,
    get_state_context,
)

__all__ = ["ACCOUNTS", "MONEY", "controller_on", "crash_agents", "crash_settings", "order"]

ACCOUNTS = 8
MONEY = 1000


class Bank(AgentBase):
    """Moves money between accounts: their sum stays the same."""

    name = "bank"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        if not context.has("account/0"):
            context.update({f"account/{number}": MONEY for number in range(ACCOUNTS)})
        giver, taker = context.random.sample(range(ACCOUNTS), 2)
        amount = context.random.randint(1, 50)
        context.increment(f"account/{giver}", -amount)
        await asyncio.sleep(0)
        context.increment(f"account/{taker}", amount)


class Twins(AgentBase):
    """Writes two keys that are always equal, and counts its ticks in the state."""

    name = "twins"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        number = context.increment("twin/ticks")
        context.set("twin/left", number)
        context.set("twin/right", number)
        self.metadata["ticks"] = number


class Payer(AgentBase):
    """Emits numbered events, some of them to happen later."""

    name = "payer"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        for _ in range(context.random.randint(0, 2)):
            context.emit("paid", {"number": context.own.increment("paid")})
        if context.random.random() < 0.2:
            context.emit("due", {"number": context.own.increment("due")}, after=0.05)


class Book(AgentBase):
    """Enters each event: the history of `book/event` is the list of those that it handled."""

    name = "book"
    subscriptions = ("paid", "due")

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.set(f"book/{event.type}", event.data["number"])
        context.set("book/event", event.id)
        if context.random.random() < 0.002:  # what was entered is taken back; the event comes again, a second later
            raise RuntimeError("the ink ran out")


class Auditor(AgentBase):
    """The same by a plain callback of the bus, which runs in a thread."""

    name = "auditor"

    async def on_start(self, context: StateContext) -> None:
        get_event_bus().subscribe("paid", self.name, self.audit)

    def audit(self, event: Event) -> None:
        get_state_context().set("audit/event", event.id)


class Clumsy(AgentBase):
    """Often fails, or is too slow, after it has written and emitted: nothing of that may be seen."""

    name = "clumsy"
    priority = 10
    tick_timeout = 0.004

    async def on_tick(self, context: StateContext) -> None:
        chance = context.random.random()
        context.set("clumsy/tick", self.tick_count)
        if chance < 0.2:
            context.set("clumsy/leak", self.tick_count)
            context.emit("leak")
        if chance < 0.1:
            raise ValueError("dropped it")
        if chance < 0.2:
            await asyncio.sleep(0.05)

    async def on_error(self, error: Exception, context: StateContext) -> None:
        context.increment("clumsy/errors")


class Slow(AgentBase):
    """Runs in the background, over several iterations; now and then another agent was faster."""

    name = "slow"
    priority = 10
    background = True

    async def on_tick(self, context: StateContext) -> None:
        before = context.get("twin/ticks", 0)
        await asyncio.sleep(context.random.random() * 0.02)
        context.increment("slow/ticks")
        if context.random.random() < 0.1:
            context.set("twin/ticks", before)  # a conflict, or it would undo what the twins have done since


class Fickle(AgentBase):
    """Makes keys and deletes them again."""

    name = "fickle"
    priority = 10

    async def on_tick(self, context: StateContext) -> None:
        key = f"fickle/{context.random.randrange(4)}"
        if not context.delete(key):
            context.set(key, {"since": context.iteration, "tags": ["a", None, 0.5]})


class Idle(AgentBase):
    """Does nothing, which is counted."""

    name = "idle"
    priority = 8


def crash_agents() -> list[AgentBase]:
    """Return one of each."""
    return [Bank(), Twins(), Payer(), Book(), Auditor(), Clumsy(), Slow(), Fickle(), Idle()]


def crash_settings() -> dict[str, Any]:
    """Return the settings under which these agents may be killed as often as one likes."""
    known = {item.name for item in fields(Settings)}
    # else a start after many kills is paused, and who was running at three of them is quarantined
    guards: dict[str, Any] = {name: 0 for name in ("unclean_starts", "quarantine_after_deaths") if name in known}
    return {"tick_log": "all", "tick_rate": 0.0, **guards}


def controller_on(path: Path | str, **settings: Any) -> AELController:
    """Return a controller of these agents; one in a process, because they use its bus and its context."""
    manager = AgentManager()
    for agent in crash_agents():
        manager.register(agent)
    return AELController(
        manager,
        get_event_bus(),
        state_context=get_state_context(),
        store=path,
        settings=Settings(**{**crash_settings(), **settings}),
    )


def order(context: StateContext) -> int:
    """What a customer of the loop does by `transact`: the number that it gets is committed when it gets it."""
    number: int = context.increment("orders")
    context.emit("order", {"number": number})
    return number


async def main(path: str, iterations: int | None) -> None:
    controller = controller_on(path)
    if iterations is None:
        await controller.start()
    else:
        await controller.run(iterations)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))
