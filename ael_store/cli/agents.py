"""`ael agents`: who works here, how well, and whether they may."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ael_store.cli.arguments import At, nearest
from ael_store.cli.call import Call
from ael_store.cli.command import command, group
from ael_store.cli.completion import complete
from ael_store.cli.output import (
    Column,
    colored,
    decoded,
    milliseconds,
    number,
    print_json,
    print_table,
    say,
    when,
)
from ael_store.errors import AgentNotFound
from ael_store.telemetry import printable, printable_json

__all__ = ["STATUS_COLORS", "add_to", "confirm"]

STATUS_COLORS = {"active": "green", "quarantined": "red", "disabled": "yellow", "absent": "dim"}

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of an agent.", autocompletion=complete("agent"))]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this noun."""
    agents = group(app, "agents", "Look at agents and switch them.")
    command(agents, "list")(list_agents)
    command(agents, "show")(show)
    command(agents, "enable")(enable)
    command(agents, "disable")(disable)
    command(agents, "release")(release)
    command(agents, "run")(run)
    command(agents, "rename")(rename)
    command(agents, "forget")(forget)


def list_agents(call: Call, at: At = None) -> None:
    """Show every agent that the database knows, or knew."""
    with call.reader() as reader:
        rows = reader.agents() if at is None else reader.agents_at(reader.moment(at))
    if call.json:
        print_json([_decoded(row) for row in rows])
        return
    columns = (
        Column("name"),
        Column("status", colors=STATUS_COLORS),
        Column("priority", right=True),
        Column("ticks", right=True),
        Column("errors", right=True),
        Column("events", right=True),
        Column("mean_ms", right=True),
        Column("last_tick_at"),
        Column("last_error", shrinks=True),
    )
    print_table(
        columns,
        (
            (
                row["name"],
                row["status"],
                str(row["priority"]),
                number(row["tick_count"]),
                number(row["error_count"]),
                number(row["event_count"]),
                milliseconds(row["mean_duration_ms"]),
                when(row["last_tick_at"]),
                row["last_error"] or "",
            )
            for row in rows
        ),
        empty="no agents yet: a loop registers them" if at is None else "no agent was known then",
    )


def show(call: Call, name: Name) -> None:
    """Show all about one agent, with its last ticks."""
    with call.reader() as reader:
        try:
            row = reader.agent(name)
        except AgentNotFound:
            raise _unknown(name, [known["name"] for known in reader.agents()]) from None
    if call.json:
        print_json(_decoded(row))
        return
    status = row["status"]
    for title, text in (
        ("name", printable(row["name"])),
        ("status", colored(status, STATUS_COLORS.get(status, ""))),
        ("class", printable(row["class"] or "")),
        ("priority", str(row["priority"])),
        ("trigger", _schedule(row["schedule"])),
        ("subscriptions", ", ".join(printable(one["pattern"]) for one in row["subscriptions"])),
        ("ticks", number(row["tick_count"])),
        ("errors", number(row["error_count"])),
        ("events", number(row["event_count"])),
        ("mean", _with_unit(row["mean_duration_ms"])),
        ("longest", _with_unit(row["max_duration_ms"])),
        ("last tick", when(row["last_tick_at"])),
        ("last error", colored(printable(row["last_error"] or ""), "red")),
        ("metadata", "" if row["metadata"] == "{}" else printable_json(row["metadata"])),
    ):
        if text:
            say(f"{title:<15}{text}")
    if row["last_ticks"]:
        say("")
        columns = (
            Column("started_at"),
            Column("iteration", right=True),
            Column("kind"),
            Column("outcome", colors={"success": "green", "error": "red", "timeout": "red", "conflict": "yellow"}),
            Column("ms", right=True),
            Column("error", shrinks=True),
        )
        print_table(
            columns,
            (
                (
                    when(tick["started_at"]),
                    number(tick["iteration"]),
                    tick["kind"],
                    tick["outcome"],
                    milliseconds(tick["duration_ms"]),
                    tick["error"] or "",
                )
                for tick in row["last_ticks"]
            ),
        )


def enable(call: Call, name: Name) -> None:
    """Let an agent run again, also over restarts."""
    _switch(call, "enable", name, "enabled", "enabled already")


def disable(call: Call, name: Name) -> None:
    """Keep an agent from running, also over restarts; its events wait."""
    _switch(call, "disable", name, "disabled", "disabled already")


def release(call: Call, name: Name) -> None:
    """End an agent's quarantine or back-off."""
    _switch(call, "release", name, "released", "neither quarantined nor backing off")


def run(call: Call, name: Name) -> None:
    """Have an agent tick once, now, whatever its schedule."""
    iteration = _change(call, "run", name)
    if call.json:
        print_json({"name": name, "iteration": iteration})
    else:
        say(f"agent {printable(name)} ticks in iteration {iteration} (committed)")


def rename(
    call: Call,
    name: Name,
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
) -> None:
    """Give an agent a new name; it keeps state, statistics and cursors."""
    _change(call, "rename", name, new_name=new_name)
    if call.json:
        print_json({"name": new_name, "old_name": name, "changed": True})
    else:
        say(f"renamed agent {printable(name)} to {printable(new_name)} (committed)")


def forget(
    call: Call,
    name: Name,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove an agent with statistics, cursors and own state."""
    with call.reader() as reader:
        known = {row["name"]: row for row in reader.agents()}
        if name not in known:
            raise _unknown(name, known)
        row = known[name]
        prefix = f"agent/{name}/"
        keys = [found["key"] for found in reader.state(prefix)]
        cursors = [found["pattern"] for found in reader.agent(name)["subscriptions"]]
    loss = {"name": name, "status": row["status"], "ticks": row["tick_count"], "keys": keys, "subscriptions": cursors}
    if dry_run:
        if call.json:
            print_json({**loss, "changed": False})
        else:
            say(f"would forget agent {printable(name)} ({row['status']}):")
            say(f"  statistics of {row['tick_count']} ticks")
            for pattern in cursors:
                say(f"  its place in the events {printable(pattern)}")
            for key in keys:
                say(f"  state key {printable(key)}")
        return
    confirm(f"Forget agent {printable(name)} with {row['tick_count']} ticks and {len(keys)} state keys?", yes)
    _change(call, "forget", name)
    if call.json:
        print_json({**loss, "changed": True})
    else:
        say(f"forgot agent {printable(name)} and {len(keys)} state keys (committed)")


def confirm(question: str, yes: bool) -> None:
    """Ask before something is lost, where a person can answer; anything but yes gives up."""
    if not yes and is_interactive():
        typer.confirm(question, abort=True, err=True)


def is_interactive() -> bool:
    """True where a person sees a question and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


# -- the small things -------------------------------------------------------------------------------


def _switch(call: Call, verb: str, name: str, done: str, already: str) -> None:
    changed = bool(_change(call, verb, name))
    if call.json:
        print_json({"name": name, "changed": changed})
    else:
        say(f"{done} agent {printable(name)} (committed)" if changed else f"agent {printable(name)} is {already}")


def _change(call: Call, verb: str, name: str, **more: Any) -> Any:
    try:
        return call.change(f"agents.{verb}", name=name, **more)
    except AgentNotFound:
        with call.reader() as reader:
            raise _unknown(name, [row["name"] for row in reader.agents()]) from None


def _unknown(name: str, known: Any) -> AgentNotFound:
    names = sorted(known)
    hint = nearest(name, names) or (f"; known are {', '.join(names[:20])}" if names else "; none is known yet")
    return AgentNotFound(f"there is no agent {name!r}{hint}")


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {**decoded(row, "metadata"), "enabled": bool(row["enabled"])}


def _schedule(schedule: dict[str, Any] | None) -> str:
    if schedule is None:
        return ""
    text = printable(schedule["trigger"])
    return f"{text}, next {schedule['next_at']}" if schedule["next_at"] else text


def _with_unit(duration: float | None) -> str:
    return "" if duration is None else f"{milliseconds(duration)} ms"
