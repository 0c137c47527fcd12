"""`ael status --watch`: the overview in a terminal, drawn again each second, until Ctrl-C.

It looks at the database and asks the loop how it is, as `ael status` does, so it works over ssh and needs no
dashboard. On a terminal the whole screen is used and given back in the end, cut to its width and height; what does not
fit is counted. Elsewhere each second gives a line.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ael_store.cli.agents import STATUS_COLORS
from ael_store.cli.call import Call
from ael_store.cli.output import milliseconds, number, on_terminal, print_json_line, write
from ael_store.cli.status import FACTS, lines, read_facts
from ael_store.errors import AelError
from ael_store.telemetry import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = ["watch_status"]

PERIOD_S = 1.0
LEAST_AGENTS = 3
"""Agents that are shown however many problems there are."""
WIDE = 64
"""Columns from which on there is room for durations and errors of agents."""
WORST_FIRST = ("quarantined", "active", "disabled", "absent")


def watch_status(call: Call) -> None:
    """Show the overview until Ctrl-C, or until whoever reads the output has gone."""
    read_facts(call)  # what is wrong from the start is an error as everywhere else
    try:
        if on_terminal() and not call.json and os.environ.get("TERM", "dumb") != "dumb":
            _on_screen(call)
        else:
            _line_by_line(call)
    except KeyboardInterrupt:
        return


def _line_by_line(call: Call) -> None:
    while True:
        began = time.monotonic()
        try:
            facts, _ = read_facts(call)
        except AelError as error:
            print(f"ael: {printable(str(error))}", file=sys.stderr, flush=True)
        else:
            if call.json:
                print_json_line({name: facts[name] for name in FACTS})
            else:
                write(f"{_in_short(facts)}\n")
                sys.stdout.flush()
        _wait(began)


def _in_short(facts: dict[str, Any]) -> str:
    agents = ", ".join(f"{count} {word}" for word, count in sorted(facts["agents"].items())) or "no agents"
    return (
        f"{time.strftime('%H:%M:%S')} {facts['status']}, iteration {facts['iteration']}, {agents}, "
        f"{facts['pending']} pending, {len(facts['problems'])} problems"
    )


def _on_screen(call: Call) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, highlight=False, emoji=False)
    last: dict[str, Any] | None = None
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            began = time.monotonic()
            try:
                facts, agents = read_facts(call, agents=True)
            except AelError as error:  # restored, upgraded or removed just now; it may come back
                live.update(_cut(printable(str(error)), "red"), refresh=True)
            else:
                live.update(_screen(facts, agents, last, *console.size), refresh=True)
                last = facts
            _wait(began)


def _screen(
    facts: dict[str, Any], agents: list[dict[str, Any]], last: dict[str, Any] | None, width: int, height: int
) -> RenderableType:
    """Return what is drawn: time and rate, problems, the overview, and as many agents as there is room for."""
    from rich.console import Group
    from rich.text import Text

    overview = list(lines(facts))
    most = max(LEAST_AGENTS, height - len(overview) - 5)
    if len(overview) + LEAST_AGENTS + 5 > height:  # problems come first, and must not push all else out
        shown = max(1, height - len(overview) + len(facts["problems"]) - LEAST_AGENTS - 5)
        if shown < len(facts["problems"]):
            hidden = len(facts["problems"]) - shown
            overview = [*overview[:shown], f"and {hidden} problems more: `ael status`", *overview[shown + hidden :]]
    head = Text(f"{time.strftime('%Y-%m-%d %H:%M:%S')}{_rate(facts, last)}   Ctrl-C ends", style="dim", no_wrap=True)
    parts: list[Text] = [head, Text(""), *(_ansi(line) for line in overview), Text("")]
    troubled = {problem["subject"] for problem in facts["problems"]}
    rows = sorted(agents, key=lambda row: (row["name"] not in troubled, _rank(row["status"]), -row["priority"]))
    return Group(*parts, *_table(rows[:most], len(rows) - most, wide=width >= WIDE))


def _rate(facts: dict[str, Any], last: dict[str, Any] | None) -> str:
    """Return how fast iterations come, as far as two looks can tell."""
    now = facts.get("live_iteration") or facts["iteration"]
    if last is None or not facts["running"]:
        return ""
    before = last.get("live_iteration") or last["iteration"]
    return f"   {max(0, now - before) / PERIOD_S:.0f} iterations/s"


def _rank(status: str) -> int:
    return WORST_FIRST.index(status) if status in WORST_FIRST else len(WORST_FIRST)


def _table(rows: list[dict[str, Any]], hidden: int, *, wide: bool) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2 if wide else 1, 0, 0))
    for title, options in {
        "agent": {"overflow": "ellipsis", "no_wrap": True, "min_width": 6},
        "status": {"no_wrap": True},
        "ticks": {"justify": "right", "no_wrap": True},
        "errors": {"justify": "right", "no_wrap": True},
        "mean_ms": {"justify": "right", "no_wrap": True},
        "last_error": {"overflow": "ellipsis", "no_wrap": True},
    }.items():
        if not wide and title in ("mean_ms", "last_error"):
            continue
        table.add_column(title, **options)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            Text(printable(row["name"])),
            Text(row["status"], style=STATUS_COLORS.get(row["status"], "")),
            Text(number(row["tick_count"])),
            Text(number(row["error_count"]), style="red" if row["error_count"] and row["last_error"] else ""),
            *([Text(milliseconds(row["mean_duration_ms"])), Text(printable(row["last_error"] or ""))] if wide else []),
        )
    return [table, Text(f"and {hidden} agents more: `ael agents list`", style="dim")] if hidden > 0 else [table]


def _ansi(line: str) -> Text:
    """Return a line with its colours, cut where the terminal ends."""
    from rich.text import Text

    text = Text.from_ansi(line)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _cut(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(text, style=style)


def _wait(began: float) -> None:
    time.sleep(max(0.1, began + PERIOD_S - time.monotonic()))
