"""`ael tasks`: work outside the loop, questions to people, and what to do about them."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from ael_store.cli.arguments import read_json
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.completion import complete
from ael_store.cli.export import export_tasks
from ael_store.cli.output import (
    Column,
    colored,
    decoded,
    json_cell,
    number,
    print_json,
    print_table,
    say,
    when,
)
from ael_store.errors import AelError, TaskNotFound, UsageError
from ael_store.model.task import STATUSES
from ael_store.telemetry import printable, printable_json

__all__ = ["add_to"]

COLORS = {"done": "green", "failed": "red", "held": "yellow", "running": "cyan", "cancelled": "dim"}
OUTCOME_COLORS = {"done": "green", "failed": "red", "timeout": "red", "interrupted": "yellow", "running": "cyan"}
JSON_COLUMNS = ("args", "result")
PATIENCE_S = 2.0

Id = Annotated[int, typer.Argument(metavar="ID", min=1, help="Number of a task.", autocompletion=complete("task"))]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    tasks = group(app, "tasks", "Look at tasks, submit, retry and cancel them, answer questions.")
    command(tasks, "list")(list_tasks)
    command(tasks, "show")(show)
    command(tasks, "submit", values=True)(submit)
    command(tasks, "answer", values=True)(answer)
    command(tasks, "retry")(retry)
    command(tasks, "cancel")(cancel)
    command(tasks, "release")(release)
    command(tasks, "export")(export_tasks)


def list_tasks(
    call: Call,
    status: Annotated[str | None, typer.Option("--status", metavar="STATUS", help="Only with this status.")] = None,
    agent: Annotated[
        str | None,
        typer.Option("--agent", metavar="NAME", help="Only of this agent.", autocompletion=complete("agent")),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Only of this function.")] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Most of them to show.")] = 100,
) -> None:
    """Show the newest tasks, oldest first, and how far they are."""
    if status is not None and status not in STATUSES:
        raise UsageError(f"there is no status {status!r}; there are {', '.join(STATUSES)}")
    with call.reader() as reader:
        rows = reader.tasks(status=status, agent=agent, name=name, limit=limit)
    progress = _progress(call)
    for row in rows:
        row["progress"] = progress.get(str(row["id"])) if row["status"] == "running" else None
    if call.json:
        print_json([decoded(row, *JSON_COLUMNS) for row in rows])
        return
    columns = (
        Column("id", right=True),
        Column("status", colors=COLORS),
        Column("agent"),
        Column("name"),
        Column("tries", right=True),
        Column("usd", right=True),
        Column("created_at"),
        Column("progress"),
        Column("result", shrinks=True),
    )
    cells = (
        (
            number(row["id"]),
            row["status"],
            row["agent"],
            row["name"],
            number(row["attempts"]),
            "" if row["cost_usd"] is None else f"{row['cost_usd']:.4g}",
            when(row["created_at"]),
            _progress_cell(row["progress"]),
            _outcome_cell(row),
        )
        for row in rows
    )
    print_table(columns, cells, empty="no tasks")


def show(call: Call, id: Id) -> None:
    """Show all about one task, with its attempts."""
    with call.reader() as reader:
        row = reader.task(id)
    if row is None:
        raise TaskNotFound(f"there is no task {id}; `ael tasks list` shows those that there are")
    row["progress"] = _progress(call).get(str(id)) if row["status"] == "running" else None
    if call.json:
        print_json(decoded(row, *JSON_COLUMNS))
        return
    status = colored(row["status"], COLORS.get(row["status"], ""))
    for title, text in (
        ("task", f"{row['id']} {printable(row['name'])}"),
        ("status", status + (f": {printable(row['held'])}" if row["held"] else "")),
        ("progress", _progress_cell(row["progress"])),
        ("agent", printable(row["agent"])),
        ("key", printable(row["key"])),
        ("question", printable(row["question"] or "")),
        ("args", printable_json(row["args"])),
        ("result", printable_json(row["result"] or "")),
        ("answered by", printable(row["answered_by"] or "")),
        ("error", colored(printable(row["error"] or ""), "red")),
        ("cost", "" if row["cost_usd"] is None else f"${row['cost_usd']:g}"),
        ("priority", number(row["priority"])),
        ("limit", printable(row["limit_name"] or "")),
        ("created", f"{when(row['created_at'])} in iteration {row['iteration']}"),
        ("not before" if row["question"] is None else "ends", when(row["next_at"])),
        ("ended", when(row["ended_at"])),
        ("taken up", when(row["applied_at"])),
        ("not taken up", colored(printable(row["apply_error"] or ""), "red")),
    ):
        if text:
            say(f"{title:<14}{text}")
    if row["attempts_made"]:
        say("")
        columns = (
            Column("attempt", right=True),
            Column("outcome", colors=OUTCOME_COLORS),
            Column("started_at"),
            Column("ended_at"),
            Column("usd", right=True),
            Column("error", shrinks=True),
        )
        cells = (
            (
                number(attempt["number"]),
                attempt["outcome"],
                when(attempt["started_at"]),
                when(attempt["ended_at"]),
                attempt["cost_usd"] or "",
                attempt["error"] or "",
            )
            for attempt in row["attempts_made"]
        )
        print_table(columns, cells)


def submit(
    call: Call,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="module:function, a registered name, or with --agent a method.")
    ],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="[JSON]...", help="Its arguments, a JSON value each.")
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent", metavar="NAME", help="The agent that gets the result.", autocompletion=complete("agent")
        ),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="KEY", help="A key that is known is no new task.")] = None,
    after: Annotated[str | None, typer.Option("--after", metavar="WHEN", help="Seconds, 30m, or an ISO time.")] = None,
    priority: Annotated[int, typer.Option("--priority", metavar="N", min=0, max=10, help="Higher first.")] = 5,
    limit: Annotated[
        str | None,
        typer.Option("--limit", metavar="NAME", help="The limit it counts against.", autocompletion=complete("limit")),
    ] = None,
) -> None:
    """Submit a task; it runs at least once, with one key."""
    values = [read_json(text, f"argument {place}") for place, text in enumerate(args or (), 1)]
    arguments: dict[str, Any] = {"name": name, "args": values, "agent": agent, "key": key}
    if after is not None:
        is_time = "T" in after or "-" in after
        arguments["at" if is_time else "after"] = after if is_time else _seconds(after)
    done = call.change("tasks.submit", **arguments, priority=priority, limit=limit)
    if call.json:
        print_json(done)
    elif done["new"]:
        say(f"submitted task {done['id']} ({printable(name)}) with key {printable(done['key'])} (committed)")
    else:
        say(f"nothing submitted: the key {printable(done['key'])} is that of task {done['id']}")


def _seconds(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def answer(
    call: Call,
    id: Id,
    choice: Annotated[str, typer.Argument(metavar="CHOICE", help="The answer.")],
    by: Annotated[
        str | None, typer.Option("--by", metavar="NAME", help="Who answers. Default: your user name.")
    ] = None,
) -> None:
    """Answer a question, once."""
    done = call.change("tasks.answer", id=id, choice=choice, by=by or _user())
    if call.json:
        print_json(done)
    else:
        say(f"answered {printable(done['question'])} with {printable(choice)} by {printable(done['by'])} (committed)")


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UsageError("this user has no name here: say --by NAME") from None


def retry(call: Call, id: Id) -> None:
    """Run a task again, or hand its result out again."""
    done = call.change("tasks.retry", id=id)
    if call.json:
        print_json(done)
    else:
        say(f"task {id}: {done['what']} (committed)")


def cancel(call: Call, id: Id) -> None:
    """End a task; its agent gets it as cancelled."""
    done = call.change("tasks.cancel", id=id)
    if call.json:
        print_json(done)
    elif done["changed"]:
        running = done["status"] == "running"
        say(f"task {id} {'is told to end' if running else 'is cancelled'} (committed)")
    else:
        say(f"task {id} is {done['status']} already")


def release(
    call: Call,
    id: Annotated[
        int | None, typer.Argument(metavar="[ID]", min=1, help="Number of a task.", autocompletion=complete("task"))
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="All tasks that are held.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which it would be.")] = False,
) -> None:
    """Let tasks go on that are held, such as those of a copy."""
    if (id is None) == (not all):
        raise UsageError("name a task, or say --all; `ael tasks list --status held` shows them")
    if dry_run:
        with call.reader() as reader:
            rows = reader.held_tasks(id)
        if call.json:
            print_json(rows)
        else:
            columns = (Column("id", right=True), Column("agent"), Column("name"), Column("held", shrinks=True))
            cells = ((number(row["id"]), row["agent"], row["name"], row["held"] or "") for row in rows)
            print_table(columns, cells, empty="no tasks are held")
        return
    done = call.change("tasks.release", id=id, all=all)
    if call.json:
        print_json(done)
    else:
        count = done["released"]
        say(f"released {count} task{'' if count == 1 else 's'} (committed)" if count else "no such task is held")


# -- the small things -------------------------------------------------------------------------------


def _progress(call: Call) -> dict[str, Any]:
    """Return what the running loop says of the attempts that run; nothing where none answers."""
    from ael_store.runtime.control import PROGRESS, ask
    from ael_store.store.lock import current_holder

    holder = current_holder(call.path)
    if holder is None or holder.socket is None:
        return {}
    try:
        return dict(ask(holder.socket, PROGRESS, {}, PATIENCE_S))
    except AelError:
        return {}


def _progress_cell(progress: dict[str, Any] | None) -> str:
    if progress is None:
        return ""
    fraction = "" if progress["fraction"] is None else f"{100 * progress['fraction']:.0f} %"
    return " ".join(part for part in (fraction, printable(progress["note"])) if part)


def _outcome_cell(row: dict[str, Any]) -> str:
    if row["status"] == "done":
        return json_cell(row["result"])
    return str(row["held"] or row["question"] or row["error"] or "")
