"""Questions to people: tasks whose worker is a person, answered once, bound to what was shown."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ael_store import AgentBase, Event, StateContext, Task, connect
from ael_store.cli.main import main
from ael_store.errors import TaskNotFound, UsageError
from ael_store.testing import Harness, run_tick
from tests.loops import controller_on, rows, running, until

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ael.db"


class Buyer(AgentBase):
    """Asks for each event, as its data say; keeps what came back."""

    name = "buyer"
    subscriptions = ("offer",)

    async def on_event(self, event: Event, context: StateContext) -> None:
        context.ask(**event.data)

    async def on_task(self, task: Task, context: StateContext) -> None:
        context.increment("answers")
        context.set(
            "answer",
            {
                "status": task.status,
                "result": task.result,
                "by": task.answered_by,
                "data": task.data,
                "question": task.question,
                "choices": list(task.choices or []),
                "error": task.error,
                "is_question": task.is_question,
                "args": task.args,
                "name": task.name,
            },
        )


def offer(h: Harness, **about: Any) -> None:
    h.emit("offer", {"question": "Buy?", "data": {"price": [3, "EUR"]}, "choices": ["yes", "no"], **about})


async def test_answer_comes_to_on_task_once_with_what_was_asked_and_shown_and_who_said_it() -> None:
    async with Harness([Buyer()], tick_rate=3600) as h:
        offer(h, key="k")
        await h.advance("10 days")
        open_ = h.sql("SELECT id, name, status, attempts, agent, key FROM v_tasks")
        problems = h.sql("SELECT subject, detail FROM v_problems WHERE kind = 'question'")
        await h.answer("yes", by="Ana")
        await h.restart()
        await h.crash()
        await h.advance("1 day")

        assert open_ == [{"id": 1, "name": "ask", "status": "waiting", "attempts": 0, "agent": "buyer", "key": "k"}]
        assert problems == [{"subject": "task 1", "detail": "Buy?"}]
        assert h.state["answers"] == 1
        assert h.state["answer"] == {
            "status": "done",
            "result": "yes",
            "by": "Ana",
            "data": {"price": [3, "EUR"]},
            "question": "Buy?",
            "choices": ["yes", "no"],
            "error": None,
            "is_question": True,
            "args": [],
            "name": "ask",
        }
        assert h.sql("SELECT status, result FROM v_tasks") == [{"status": "done", "result": '"yes"'}]
        assert h.sql("SELECT kind FROM v_problems WHERE kind = 'question'") == []


async def test_question_of_which_the_unit_fails_was_never_asked() -> None:
    class Hasty(Buyer):
        async def on_event(self, event: Event, context: StateContext) -> None:
            context.ask("Buy?")
            raise ValueError("not so")

    async with Harness([Hasty()]) as h:
        offer(h)
        await h.advance("1 minute")

        assert h.sql("SELECT * FROM v_tasks") == []


@pytest.mark.parametrize("loop", [True, False], ids=["with a loop", "without"])
async def test_question_is_answered_once_by_one_of_its_choices(path: Path, loop: bool) -> None:
    controller = controller_on(path, Buyer(), tick_rate=3600)

    def answer() -> None:
        with connect(path) as client:
            with pytest.raises(UsageError, match="yes"):
                client.answer(1, "maybe", by="Ana")
            with pytest.raises((UsageError, TypeError, ValueError)):
                client.answer(1, "yes", by="")
            client.answer(1, "no", by="Ana")
            with pytest.raises(UsageError, match="Ana"):
                client.answer(1, "yes", by="Ben")
            with pytest.raises(TaskNotFound, match="77"):
                client.answer(77, "yes", by="Ben")

    async with running(controller):
        controller.event_bus.emit("offer", "t", {"question": "Buy?", "choices": ["yes", "no"]})
        await until(lambda: rows(path, "SELECT id FROM v_tasks"))
        if loop:
            await asyncio.to_thread(answer)
    if not loop:
        answer()
    async with running(controller_on(path, Buyer(), tick_rate=3600)) as again:
        await until(lambda: again.state_context.get("answers"))
        found = again.state_context.get("answer")

    assert (found["result"], found["by"]) == ("no", "Ana")
    assert rows(path, "SELECT value FROM v_state WHERE key = 'answers'") == ["1"]


async def test_question_without_choices_takes_any_text() -> None:
    async with Harness([Buyer()]) as h:
        offer(h, choices=None, data=None)
        await h.advance()
        await h.answer("as you like, čau", by="Ana")

        assert h.state["answer"]["result"] == "as you like, čau"
        assert h.state["answer"]["choices"] == []
        assert h.state["answer"]["data"] is None


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(90, 90), ("24h", 86_400), ((START + timedelta(hours=3)), 3 * 3600)], ids=str
)
@pytest.mark.parametrize("default", ["no", None])
async def test_after_its_timeout_the_default_is_the_answer_and_without_one_it_failed(
    timeout: Any, seconds: float, default: str | None
) -> None:
    class Asker(Buyer):
        async def on_start(self, context: StateContext) -> None:
            context.ask("Buy?", choices=("yes", "no"), timeout=timeout, default=default, key="k")

    async with Harness([Asker()], tick_rate=3600) as h:
        await h.advance(seconds - 1)
        assert "answer" not in h.state
        await h.crash(down=0)
        await h.advance(1)
        await h.advance("10 days")

        found = h.state["answer"]
        assert (found["status"], found["result"], found["by"]) == ("done" if default else "failed", default, None)
        assert (found["error"] is None) == (default is not None)
        assert h.state["answers"] == 1
        (row,) = h.sql("SELECT created_at, ended_at FROM v_tasks")
        ended = datetime.fromisoformat(row["ended_at"])
        assert ended - datetime.fromisoformat(row["created_at"]) == pytest.approx(
            timedelta(seconds=seconds), abs=timedelta(seconds=1)
        )


async def test_question_that_ended_by_itself_takes_no_answer(path: Path) -> None:
    async with Harness([Buyer()], store=path, tick_rate=3600) as h:
        offer(h, timeout=60, default="no")
        await h.advance("1h")
        await h.stop()
        with connect(path) as client, pytest.raises(UsageError):
            client.answer(1, "yes", by="late")
        await h.advance("1h")

        assert (h.state["answers"], h.state["answer"]["result"]) == (1, "no")


async def test_answer_that_came_while_no_loop_ran_goes_before_the_timeout_that_passed_meanwhile(path: Path) -> None:
    async with Harness([Buyer()], store=path, tick_rate=3600, start=datetime.now(UTC) + timedelta(days=1)) as h:
        offer(h, timeout="1h", default="no")
        await h.advance("1m")
        await h.stop()
        with connect(path) as client:
            client.answer(1, "yes", by="Ana")
        await h.restart(down="2 days")
        await h.advance("1m")

        assert h.state["answer"]["result"] == "yes"


async def test_same_key_is_the_same_question_and_the_data_stay_those_that_were_shown() -> None:
    async with Harness([Buyer()]) as h:
        offer(h, key="k", data={"price": 1})
        offer(h, key="k", data={"price": 1000}, question="Sell?")
        await h.advance()
        await h.answer("yes")

        assert len(h.sql("SELECT id FROM v_tasks")) == 1
        assert (h.state["answer"]["data"], h.state["answer"]["question"]) == ({"price": 1}, "Buy?")
        offer(h, key="k")
        await h.advance("1m")
        assert h.state["answers"] == 1


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"question": ""}, "question"),
        ({"default": "maybe"}, "maybe"),
        ({"choices": []}, "choices"),
        ({"choices": ["yes", 1]}, "choice"),
        ({"choices": ["yes", "yes"]}, "yes"),
        ({"choices": "yes"}, "choices"),
        ({"timeout": "some time"}, "some time"),
        ({"data": {1, 2}}, "set"),
    ],
    ids=str,
)
async def test_impossible_question_is_refused_with_the_reason(about: dict[str, Any], words: str) -> None:
    class Asker(Buyer):
        async def on_tick(self, context: StateContext) -> None:
            context.ask(**{"question": "Buy?", "choices": ("yes", "no"), "timeout": 60, **about})

    result = await run_tick(Asker())

    assert isinstance(result.error, (UsageError, ValueError, TypeError))
    assert words in str(result.error)
    assert result.tasks == []


async def test_run_tick_shows_what_was_asked_and_hands_an_answer_in() -> None:
    asked = await run_tick(
        Buyer(), inbox=[Event("offer", "t", {"question": "Buy?", "data": 3, "choices": ["yes"], "timeout": "1h"})]
    )
    (made,) = asked.check().tasks

    assert (made.is_question, made.question, made.data) == (True, "Buy?", 3)
    assert list(made.choices or []) == ["yes"]
    assert made.next_at == START + timedelta(hours=1)


async def test_answer_to_an_agent_that_is_away_waits_for_it(path: Path) -> None:
    async with Harness([Buyer()], store=path, tick_rate=3600) as h:
        offer(h)
        await h.advance("1m")
        await h.restart(agents=[])
        await h.answer("yes", by="Ana")
        await h.advance("1 day")
        assert "answers" not in h.state
        await h.restart(agents=[Buyer()])
        await h.advance("1m")

        assert (h.state["answers"], h.state["answer"]["result"]) == (1, "yes")


async def test_cancelled_question_comes_to_on_task_and_takes_no_answer(path: Path) -> None:
    async with Harness([Buyer()], store=path) as h:
        offer(h)
        await h.advance()
        await h.stop()
        assert main(["tasks", "cancel", "1", "--db", str(path)]) == 0
        assert main(["tasks", "answer", "1", "yes", "--by", "Ana", "--db", str(path)]) != 0
        await h.advance("1m")

        assert (h.state["answers"], h.state["answer"]["status"], h.state["answer"]["result"]) == (1, "cancelled", None)


async def test_question_of_a_restored_copy_is_held_and_takes_an_answer_after_its_release(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the copy nobody should decide by accident what is to be decided in the original, nor may it time out."""
    async with Harness([Buyer()], store=path, tick_rate=3600) as h:
        offer(h, timeout="2h", default="no")
        await h.advance("1m")
        await h.stop()
        backup = path.with_name("backup.db")
        assert main(["db", "backup", str(backup), "--db", str(path)]) == 0
        assert main(["db", "restore", str(backup), "--db", str(path)]) == 0
        await h.advance("1 day")
        assert "answers" not in h.state
        assert rows(path, "SELECT status FROM v_tasks") == ["held"]
        await h.stop()
        assert main(["tasks", "answer", "1", "yes", "--by", "Ana", "--db", str(path)]) != 0
        assert "release" in capsys.readouterr().err
        assert main(["tasks", "release", "1", "--db", str(path)]) == 0
        assert rows(path, "SELECT status FROM v_tasks") == ["waiting"]
        await h.advance("1m")

        assert h.state["answers"] == 1
        assert json.loads(h.sql("SELECT result FROM v_tasks")[0]["result"]) == "no"
