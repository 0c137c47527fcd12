"""`ael status`: the whole on one screen, problems first."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ael_store.cli.agents import STATUS_COLORS
from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.output import colored, milliseconds, print_json, say, size
from ael_store.telemetry import printable

__all__ = ["FACTS", "add_to", "lines", "read_facts"]

FACTS = (
    "status",
    "running",
    "pid",
    "host",
    "since",
    "paused",
    "takes_commands",
    "answers",
    "waiting_for_room_since",
    "iteration",
    "last_iteration",
    "run",
    "agents",
    "keys",
    "pending",
    "dead_letters",
    "tasks",
    "problems",
    "database",
    "forked",
    "revision",
    "size_bytes",
    "wal_bytes",
)
"""What `--json` prints, in this order."""

PROBLEM_COLORS = {"failing_agent": "yellow", "lagging_subscriber": "yellow", "overrun": "yellow", "question": "cyan"}


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "status")(status)


def status(
    call: Call,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again each second, until Ctrl-C.")] = False,
) -> None:
    """Show whether a loop runs, how it is doing, and what to look at."""
    if watch:
        from ael_store.cli.status_watch import watch_status

        watch_status(call)
        return
    facts, _ = read_facts(call)
    if call.json:
        print_json({name: facts[name] for name in FACTS})
        return
    for line in lines(facts):
        say(line)


def read_facts(call: Call, *, agents: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what there is to show, and with `agents` the row of each agent."""
    from ael_store.runtime.vitals import status_word, vitals

    with call.reader() as reader:
        facts, rows = reader.status(), reader.agents() if agents else []
    facts |= vitals(call.path)
    facts["status"] = status_word(facts)
    return facts, rows


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the whole in lines for people."""
    run = facts["run"]
    for problem in facts["problems"]:
        subject, detail = printable(problem["subject"]), printable(problem["detail"] or "")
        color = PROBLEM_COLORS.get(problem["kind"], "red")
        since = f" (since {_time(problem['since'])})" if problem["since"] else ""
        yield f"{colored(problem['kind'].replace('_', ' '), color)}  {subject}: {detail}{since}"
    if facts["problems"]:
        yield ""
    last = facts["last_iteration"]
    iteration = f"{facts['iteration']}"
    if last is not None:
        iteration += f", {_ago(last['started_at'])}, took {milliseconds(last['duration_ms'])} ms"
    dead = f"{facts['dead_letters']} dead letters"
    database = f"{printable(facts['database'])}, {size(facts['size_bytes'])}"
    if facts["wal_bytes"]:
        database += f" and {size(facts['wal_bytes'])} of log"
    for title, text in (
        ("loop", _loop(facts, run)),
        ("iteration", iteration),
        ("agents", _agents(facts["agents"])),
        ("state", f"{facts['keys']} keys"),
        ("events", f"{facts['pending']} pending, " + (colored(dead, "red") if facts["dead_letters"] else dead)),
        ("tasks", ", ".join(f"{count} {word}" for word, count in sorted(facts["tasks"].items()))),
        ("database", f"{database}, revision {facts['revision']}"),
        ("forked", _parent(facts["forked"])),
    ):
        if text:
            yield f"{title:<11}{text}"


def _loop(facts: dict[str, Any], run: dict[str, Any] | None) -> str:
    word = facts["status"]
    if facts["running"]:
        color = "green" if word == "running" else "yellow"
        more = "" if facts["takes_commands"] else ", takes no commands"
        hint = "; `ael resume` lets it go on" if word == "paused" else ""
        if facts["answers"] is False:
            more, color = ", does not answer: `ael run` takes over with --take-over", "red"
        if word == "waiting":
            word, hint = f"waiting for room since {_time(facts['waiting_for_room_since'])}", "; free some space"
        return f"{colored(word, color)}, pid {facts['pid']} since {_time(facts['since'])}{more}{hint}"
    if run is None:
        return "not running; there was no run yet"
    if word == "crashed":
        moment = run["ended_at"] or (facts["last_iteration"] or {}).get("started_at") or run["started_at"]
        return f"not running; {colored('the last run crashed', 'red')} at about {_time(moment)} (pid {run['pid']})"
    paused = "; it will start paused" if facts["paused"] else ""
    return f"not running; the last run {word} at {_time(run['ended_at'])}{paused}"


def _parent(forked: dict[str, Any] | None) -> str:
    return "" if forked is None else f"from {printable(forked['from'])} at iteration {forked['iteration']}"


def _agents(counts: dict[str, int]) -> str:
    order = [*STATUS_COLORS, *sorted(counts.keys() - STATUS_COLORS.keys())]
    parts = [colored(f"{counts[name]} {name}", STATUS_COLORS.get(name, "")) for name in order if counts.get(name)]
    return ", ".join(parts) or "none yet"


def _time(moment: str | None) -> str:
    """Return a time of the views for people."""
    return "?" if moment is None else f"{moment[:19].replace('T', ' ')} UTC"


def _ago(moment: str) -> str:
    """Return how long ago a time of the views was."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0.0, seconds) / length:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} days ago"
