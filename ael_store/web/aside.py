"""A process beside the server for what needs the whole store: past moments, and changes where no loop runs.

It answers as the command line does, with `Reader` and `client.change`, a line of JSON for a line of JSON, and ends
when nobody has asked for a while: its memory, twice the server's, is not kept.

    python -m ael_store.web.aside    (the first line says which database)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ael_store import errors
from ael_store.errors import AelError
from ael_store.model.values import Limits

if TYPE_CHECKING:
    from ael_store.store.reader import Reader

__all__ = ["QUESTIONS", "Aside"]

IDLE_S = 30.0
PATIENCE_S = 60.0
LONGEST = 600_000_000


class Aside:
    """The server's end. Questions are answered one after another."""

    def __init__(self, path: Path, limits: Limits, *, allow_shared_folder: bool) -> None:
        self._first = {"path": str(path), "limits": asdict(limits), "allow_shared_folder": allow_shared_folder}
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._ending: asyncio.TimerHandle | None = None

    async def ask(self, question: str, arguments: dict[str, Any]) -> Any:
        """Return the answer; raises what it was refused with."""
        async with self._lock:
            if self._ending is not None:
                self._ending.cancel()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answer = await self._asked({"question": question, "arguments": arguments})
            except BaseException as error:
                await self._end()  # what it would answer later belongs to nobody
                if isinstance(error, TimeoutError):
                    raise AelError(f"{question} took longer than {PATIENCE_S:g} s and was given up") from None
                raise
            self._ending = asyncio.get_running_loop().call_later(IDLE_S, self._let_go)
        if "error" not in answer:
            return answer["result"]
        kind = getattr(errors, str(answer["type"]), AelError)
        raise (kind if isinstance(kind, type) and issubclass(kind, AelError) else AelError)(answer["error"])

    async def close(self) -> None:
        async with self._lock:
            if self._ending is not None:
                self._ending.cancel()
            await self._end()

    async def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ael_store.web.aside",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the server's
                limit=LONGEST,
            )
            question = {**question, "first": self._first}
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise AelError("the process for past moments and changes has ended; the server's log says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _let_go(self) -> None:
        """Nobody has asked for a while: the end of its input ends it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process = None

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


# -- the other end ----------------------------------------------------------------------------------


def _moment(reader: Reader, at: str) -> dict[str, Any]:
    """The whole in a few figures, as it was."""
    moment = reader.moment(at)
    iteration = reader.rows("SELECT * FROM v_iterations WHERE iteration = :n", n=moment.iteration)
    run = None
    if iteration:
        found = reader.rows("SELECT * FROM v_runs WHERE run_id = :run_id", run_id=iteration[0]["run_id"])
        run = found[0] if found else None
    agents: dict[str, int] = {}
    for row in reader.agents_at(moment):
        agents[row["status"]] = agents.get(row["status"], 0) + 1
    return {
        "iteration": moment.iteration,
        "at": moment.at,
        "last_iteration": iteration[0] if iteration else None,
        "run": run,
        "agents": agents,
        "keys": len(reader.state_at(moment)),
        "events": moment.event_id,
        "changes": moment.change_id,
        "commit": moment.commit_id,
    }


def _agents(reader: Reader, at: str) -> list[dict[str, Any]]:
    return reader.agents_at(reader.moment(at))


def _keys(reader: Reader, at: str, prefix: str = "", after: str = "", limit: int = 500) -> list[dict[str, Any]]:
    rows = [row for row in reader.state_at(reader.moment(at), prefix) if row["key"] > after]
    return rows[:limit]


def _history(reader: Reader, at: str, key: str, limit: int) -> list[dict[str, Any]]:
    return reader.history(key, limit, reader.moment(at))


def _differences(reader: Reader, one: str, other: str | None, prefix: str = "") -> list[dict[str, Any]]:
    return reader.differences(reader.moment(one), reader.moment(other), prefix)


QUESTIONS: dict[str, Callable[..., Any]] = {
    "moment": _moment,
    "agents": _agents,
    "keys": _keys,
    "history": _history,
    "differences": _differences,
}


def main() -> None:
    """Answer until the input ends."""
    from ael_store.client import change
    from ael_store.store.reader import Reader

    reader: Reader | None = None
    first: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        first = asked.get("first", first)
        path = Path(first["path"])
        try:
            if asked["question"] == "change":
                result = change(
                    path,
                    asked["arguments"]["command"],
                    asked["arguments"]["arguments"],
                    Limits(**first["limits"]),
                    allow_shared_folder=first["allow_shared_folder"],
                )
            else:
                reader = reader or Reader(path)
                result = QUESTIONS[asked["question"]](reader, **asked["arguments"])
            answer = {"result": result}
        except AelError as error:
            answer = {"error": str(error), "type": type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
