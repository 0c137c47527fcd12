"""A reply goes to the source of an event and to nobody else, durably like every event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Event, StateContext, get_event_bus
from ael_store.cli.main import main
from ael_store.errors import AelError, NotAllowedHere
from ael_store.testing import Harness, run_tick
from tests.loops import agent, controller_on, iterations_of, rows, running, until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Asker(AgentBase):
    """Asks once in `on_start` and subscribes to nothing."""

    name = "asker"

    async def on_start(self, context: StateContext) -> None:
        if not context.get("asked"):
            context.set("asked", True)
            context.emit("question", {"n": 20})

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.increment("replies")
        context.set("reply", {"type": event.type, "source": event.source, "data": event.data, **event.metadata})


class Answerer(AgentBase):
    """Replies to each question, doubled."""

    name = "answerer"
    subscriptions = ("question",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.increment("handled")
        event.reply(event.data["n"] * 2)


class Spy(AgentBase):
    """Hears everything."""

    subscriptions = ("*",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.own.set("heard", [*context.own.get("heard", []), event.type])


async def test_reply_reaches_the_source_without_a_subscription_and_nobody_else() -> None:
    overheard: list[str] = []
    bus_agent = agent("setup", start=lambda context: get_event_bus().subscribe("*", "spy callback", hear))

    async def hear(event: Event) -> None:
        overheard.append(event.type)

    spies = [Spy("spy"), Spy("precise", subscriptions=("question", "question.reply"))]
    async with Harness([bus_agent, Asker(), Answerer(), *spies]) as h:
        await h.advance(5)

        (question,) = h.events("question")
        assert h.state["replies"] == 1
        assert h.state["reply"] == {
            "type": "question.reply",
            "source": "answerer",
            "data": 40,
            "in_reply_to": question.id,
            "to": "asker",
        }
        for name in ("spy", "precise"):
            assert "question" in h.state[f"agent/{name}/heard"]
            assert "question.reply" not in h.state[f"agent/{name}/heard"]
        assert "question" in overheard
        assert "question.reply" not in overheard
        (reply,) = h.events("question.reply")
        assert (reply.source, reply.metadata) == ("answerer", {"in_reply_to": question.id, "to": "asker"})


async def test_reply_to_an_agent_that_subscribes_to_its_type_comes_once() -> None:
    class Listening(Asker):
        subscriptions = ("question.*", "*")

        async def on_event(self, event: Event, context: StateContext) -> None:
            context.set("got", [*context.get("got", []), {"type": event.type, "data": event.data}])

    async with Harness([Listening(), Answerer()]) as h:
        await h.advance(5)

        types = [event["type"] for event in h.state["got"]]
        assert types.count("question.reply") == 1
        assert types == [event.type for event in h.events()], "in the order of the log"


async def test_reply_of_a_failed_unit_never_was() -> None:
    class Clumsy(Answerer):
        async def on_event(self, event: Event, context: StateContext) -> None:
            event.reply("never")
            if context.get("careful"):
                return
            raise ValueError("clumsy")

    async with Harness([Asker(), Clumsy()]) as h:
        await h.advance()
        assert h.events("question.reply") == []
        h.set("careful", True)
        await h.advance("1m")

        assert [event.data for event in h.events("question.reply")] == ["never"]
        assert h.state["replies"] == 1


@pytest.mark.parametrize("end", ["restart", "crash"])
async def test_reply_waits_for_its_agent_over_a_restart_and_is_seen_as_pending(end: str) -> None:
    async with Harness([Asker(), Answerer()]) as h:
        h.emit("nothing")
        await h.advance(2)
        assert h.state["replies"] == 1
        await getattr(h, end)(agents=[Answerer(), Spy("spy")])
        h.emit("question", {"n": 1}, source="asker")
        await h.advance(5)
        pending = h.sql("SELECT subscriber, type, attempts FROM v_pending")
        await getattr(h, end)(agents=[Asker(), Answerer()])
        await h.advance(5)

        assert pending == [{"subscriber": "asker", "type": "question.reply", "attempts": 0}]
        assert h.state["replies"] == 2
        assert h.state["reply"]["data"] == 2
        assert h.sql("SELECT * FROM v_pending WHERE subscriber <> 'spy'") == []
        assert h.sql("SELECT * FROM v_pending WHERE type = 'question.reply'") == []


async def test_callback_gets_a_reply_where_it_subscribed_under_the_name_of_the_source(path: Path) -> None:
    heard: dict[str, list[Any]] = {"outsider": [], "other": []}
    controller = controller_on(path, Answerer())
    controller.event_bus.subscribe("question.reply", "outsider", lambda event: heard["outsider"].append(event.data))
    controller.event_bus.subscribe("question.reply", "other", lambda event: heard["other"].append(event.data))
    async with running(controller):
        controller.event_bus.emit("question", "outsider", {"n": 4})
        await until(lambda: heard["outsider"])
        await iterations_of(controller, 3)

    assert heard == {"outsider": [8], "other": []}
    assert rows(path, "SELECT * FROM v_pending") == []


async def test_callback_itself_can_reply(path: Path) -> None:
    async def callback(event: Event) -> None:
        event.reply({"got": event.data}, type="thanks")

    controller = controller_on(path, Asker())
    controller.event_bus.subscribe("question", "helper", callback)
    async with running(controller):
        await until(lambda: controller.state_context.get("replies"))
        reply = controller.state_context.get("reply")

    assert (reply["type"], reply["source"], reply["data"]) == ("thanks", "helper", {"got": {"n": 20}})


async def test_reply_to_a_source_outside_is_in_the_log_only() -> None:
    async with Harness([Answerer(), Spy("spy")]) as h:
        h.emit("question", {"n": 1}, source="somewhere else")
        await h.advance(5)

        (reply,) = h.events("question.reply")
        assert reply.metadata["to"] == "somewhere else"
        assert "question.reply" not in h.state["agent/spy/heard"]
        assert h.sql("SELECT * FROM v_pending") == []


async def test_reply_that_its_agent_can_not_handle_becomes_a_dead_letter_and_can_be_delivered_again(path: Path) -> None:
    class Broken(Asker):
        async def on_event(self, event: Event, context: StateContext) -> None:
            raise ValueError("not this way")

    async with Harness([Broken(), Answerer()], store=path) as h:
        await h.advance("10m")
        dead = h.sql("SELECT subscriber, type, attempts FROM v_dead_letters")
        await h.stop()
        assert main(["events", "redeliver", "--all", "--db", str(path)]) == 0
        await h.restart(agents=[Asker(), Answerer()])
        await h.advance("1m")

        assert dead == [{"subscriber": "asker", "type": "question.reply", "attempts": 5}]
        assert h.state["replies"] == 1
        assert h.state["reply"]["redelivered"]
        assert h.sql("SELECT * FROM v_dead_letters") == []


async def test_disabled_agent_gets_replies_when_it_is_enabled(path: Path) -> None:
    async with Harness([Asker(), Answerer()], store=path) as h:
        await h.advance(2)
        await h.stop()
        assert main(["agents", "disable", "asker", "--db", str(path)]) == 0
        h.emit("question", {"n": 3}, source="asker")
        await h.advance(5)
        assert h.state["replies"] == 1
        await h.stop()
        assert main(["agents", "enable", "asker", "--db", str(path)]) == 0
        await h.advance(5)

        assert (h.state["replies"], h.state["reply"]["data"]) == (2, 6)


async def test_replies_to_replies_end_at_the_hop_limit() -> None:
    class Polite(Asker):
        async def on_event(self, event: Event, context: StateContext) -> None:
            context.increment(f"replies of {self.name}")
            event.reply("thank you", type="thanks")

    agents = [Polite(), Polite("other", subscriptions=("question",))]
    async with Harness(agents, tick_rate=3600) as h:
        await h.advance("1h")

        assert h.state["replies of other"] + h.state["replies of asker"] <= 70
        assert len(h.sql("SELECT * FROM v_dead_letters WHERE error LIKE 'hop limit%'")) >= 1


async def test_reply_outside_of_the_handler_is_refused(path: Path) -> None:
    kept: list[Event] = []

    async def keep(event: Event, context: StateContext) -> None:
        kept.append(event)

    async def tick(context: StateContext) -> None:
        if kept and not refused:
            try:
                kept[0].reply("late")
            except AelError as error:
                refused.append(error)

    refused: list[AelError] = []
    controller = controller_on(path, agent("a", tick=tick, event=keep, subscriptions=["x"]))
    async with running(controller):
        controller.event_bus.emit("x", "test")
        await until(lambda: refused)
        with pytest.raises(AelError):
            kept[0].reply("later")

    with pytest.raises(AelError):
        kept[0].reply("even later")
    with pytest.raises(NotAllowedHere, match="on_event"):
        Event("x", "test").reply(1)
    assert rows(path, "SELECT id FROM v_events WHERE type LIKE '%.reply'") == []


async def test_run_tick_shows_replies_with_what_they_answer() -> None:
    result = await run_tick(Answerer(), inbox=[Event("question", "asker", {"n": 1})])

    (reply,) = result.check().events
    assert (reply.type, reply.data, reply.metadata["to"]) == ("question.reply", 2, "asker")


async def test_reply_follows_the_rules_of_values() -> None:
    class Wrong(Answerer):
        async def on_event(self, event: Event, context: StateContext) -> None:
            event.reply({"deep": {1, 2}})

    result = await run_tick(Wrong(), inbox=[Event("question", "asker", {"n": 1})])

    assert isinstance(result.error, TypeError)
    assert "deep" in str(result.error)


async def test_agent_that_asks_itself_gets_its_own_reply() -> None:
    class Both(AgentBase):
        name = "both"
        subscriptions = ("question",)

        async def on_event(self, event: Event, context: StateContext) -> None:
            if event.type == "question":
                event.reply(1)
            else:
                context.increment("got")

    async with Harness([Both()]) as h:
        h.emit("question", source="both")
        await h.advance(3)

        assert h.state["got"] == 1
