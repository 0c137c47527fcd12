"""`ael why`: what led to a value, an event or a task, and why an agent did or did not run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, get_args

import orjson
import typer

from ael_store.cli.arguments import At, nearest
from ael_store.cli.call import Call
from ael_store.cli.command import command
from ael_store.cli.completion import complete
from ael_store.cli.output import Column, json_cell, milliseconds, note, number, print_json, print_table, say, when
from ael_store.errors import AelError, AgentNotFound, UsageError
from ael_store.telemetry import printable

if TYPE_CHECKING:
    from ael_store.store.reader import Reader

__all__ = ["add_to"]

FORMS = "state:KEY, event:ID, task:ID, change:ID, tick:ID or agent:NAME"
STEPS, ITERATIONS = 50, 10
PATIENCE_S = 2.0

WHAT_COLORS = {"event": "cyan", "task": "cyan", "command": "yellow", "gone": "dim", "dead letter": "red"}
RAN_COLORS = {"yes": "green", "no": "yellow", "unknown": "dim"}


class SubjectNotFound(AelError, LookupError):
    """The history has no such key, event, task, change or unit."""


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "why")(why)


def why(
    call: Call,
    words: Annotated[list[str], typer.Argument(metavar="SUBJECT", help=f"{FORMS}.", autocompletion=complete("agent"))],
    at: At = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help=f"Most steps ({STEPS}), or iterations ({ITERATIONS})."),
    ] = None,
) -> None:
    """Explain a value, event or task, or whether an agent ran."""
    if len(words) > 1:
        raise _spaced(words)
    [subject] = words
    kind, _, name = subject.partition(":")
    if kind == "agent" and name:
        _explain_agent(call, name, at, limit or ITERATIONS)
    else:
        _explain(call, subject, at, limit or STEPS)


# -- chains of causes -------------------------------------------------------------------------------


def _explain(call: Call, subject: str, at: str | None, limit: int) -> None:
    from ael_store.store.why import chain_of

    kind, name = _read(subject)
    with call.reader() as reader:
        chain = chain_of(reader, kind, name, at=at, limit=limit)
        if chain is None:
            raise _unknown(reader, kind, name, at)
    if call.json:
        print_json(chain.steps)
    else:
        columns = (
            Column("what", colors=WHAT_COLORS),
            Column("id", right=True),
            Column("at"),
            Column("iteration", right=True),
            Column("who"),
            Column("detail"),
        )
        print_table(columns, (row for step in chain.steps for row in _rows(step)))
    if chain.more:
        note(f"there is more: these are the newest {limit} steps, --limit shows others")


def _spaced(words: list[str]) -> UsageError:
    """Say how a subject is written that came as several words: with a colon for the first space, or in quotes."""
    from ael_store.store.why import Kind

    kind, _, name = words[0].partition(":")
    named = " ".join([name, *words[1:]]).lstrip()
    hint = f"; did you mean {shlex.quote(f'{kind}:{named}')}?" if kind in (*get_args(Kind), "agent") else ""
    return UsageError(f"{' '.join(words)!r} is no subject: write {FORMS}{hint}")


def _read(subject: str) -> tuple[Any, str | int]:
    """Return kind and key or number of a subject of a chain; raises UsageError with the forms that there are."""
    from ael_store.store.why import Kind

    kind, colon, name = subject.partition(":")
    kinds = get_args(Kind)
    if not colon or not name or kind not in kinds:
        hint = f"; did you mean state:{subject}?" if not colon and subject else nearest(kind, [*kinds, "agent"])
        raise UsageError(f"{subject!r} is no subject: write {FORMS}{hint}")
    if kind == "state":
        return kind, name
    if not (name.isascii() and name.isdigit() and len(name) <= 18 and int(name) > 0):
        raise UsageError(f"{subject!r} is no subject: {name!r} is no number; write {FORMS}")
    return kind, int(name)


def _unknown(reader: Reader, kind: Any, name: str | int, at: str | None) -> AelError:
    from ael_store.runtime.context import VIRTUAL_KEYS
    from ael_store.store.why import known_keys, newest

    then = "" if at is None else f" at {at}"
    if kind == "state":
        if name in VIRTUAL_KEYS:
            return SubjectNotFound(f"{name!r} is answered by a running loop to its agents only, and has no history")
        keys = known_keys(reader)
        hint = nearest(str(name), [key for key in keys if key != name]) or ("" if keys else "; no key was ever set")
        return SubjectNotFound(f"key {name!r} has no change in the history of {reader.path}{then}{hint}")
    return SubjectNotFound(f"there is no {kind} {name} in {reader.path}{then}; the newest is {newest(reader, kind)}")


def _rows(step: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    """Yield a step as a row, and after an event what became of it."""
    what = step["what"]
    moment = step.get("changed_at" if what == "change" else "started_at") or step.get("emitted_at")
    moment = moment or step.get("created_at") or step.get("at")
    who = step.get("agent") or step.get("source") or step.get("actor") or step.get("host") or ""
    if what == "unit" and step["subscriber"] is not None:
        who = step["subscriber"]
    yield what, number(step["id"]), when(moment), number(step.get("iteration")), who, _DETAILS[what](step)
    for unit in step.get("handled") or ():
        detail = unit["outcome"] + (f": {unit['error']}" if unit["error"] else "")
        at, iteration = when(unit["started_at"]), number(unit["iteration"])
        yield "handled", number(unit["unit_id"]), at, iteration, unit["subscriber"], detail
    for row in step.get("pending") or ():
        detail = f"waits, tried {row['attempts']} times" if row["attempts"] else "waits"
        yield "pending", "", "", "", row["subscriber"], detail
    for row in step.get("dead_letters") or ():
        tail = "" if row["redelivered_at"] is None else f"; delivered after all at {row['redelivered_at']}"
        detail = f"given up after {row['attempts']} attempts: {row['error']}{tail}"
        yield "dead letter", "", when(row["failed_at"]), "", row["subscriber"], detail


def _change(step: dict[str, Any]) -> str:
    old = "a value before the beginning of the history" if step["old_is_gone"] else _value(step["old_value"])
    if step["operation"] == "delete":
        return f"delete {step['key']}, which was {old}"
    was = "was not there" if step["old_value"] is None and not step["old_is_gone"] else f"was {old}"
    return f"{step['key']} = {_value(step['new_value'])}, {was}"


def _unit(step: dict[str, Any]) -> str:
    parts = [f"{step['kind']}, {step['outcome']}"]
    for count, noun in ((step["changes"], "change"), (step["events"], "event")):
        if count:
            parts.append(f"{count} {noun}{'' if count == 1 else 's'}")
    parts.append(f"{milliseconds(step['duration_ms'])} ms")
    error = f" ({step['error']})" if step["error"] else ""
    return f"{', '.join(parts)}{error}: {step['because']}"


def _event(step: dict[str, Any]) -> str:
    to = "" if step["target"] is None else f" to {step['target']}"
    return f"{step['type']}{to}" + ("" if step["data"] is None else f" {_value(step['data'])}")


def _task(step: dict[str, Any]) -> str:
    ended = {"done": f" = {_value(step['result'])}", "failed": f": {step['error']}"}.get(step["status"], "")
    answered = "" if step["answered_by"] is None else f", answered by {step['answered_by']}"
    held = "" if step["held"] is None else f": {step['held']}"
    return f"{step['name']} {_value(step['args'])} (key {step['key']}): {step['status']}{ended}{answered}{held}"


def _value(value: Any) -> str:
    return json_cell(orjson.dumps(value).decode())


_DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "change": _change,
    "unit": _unit,
    "event": _event,
    "task": _task,
    "command": lambda step: f"{step['name']} {_value(step['arguments'])}",
    "run": lambda step: f"a run began: pid {step['pid']}, version {step['version']}; it is {step['status']}",
    "gone": lambda step: str(step["why"]),
}


# -- agents -----------------------------------------------------------------------------------------


def _explain_agent(call: Call, name: str, at: str | None, limit: int) -> None:
    from ael_store.runtime.why import explain
    from ael_store.store.agent_facts import agent_facts

    with call.reader() as reader:
        now = _now(call, name) if at is None else None
        facts = agent_facts(reader, name, at=at, limit=limit)
        if facts is None:
            names = [row["name"] for row in reader.agents()]
            hint = nearest(name, names) or (f"; known are {', '.join(names[:20])}" if names else "; none is known yet")
            raise AgentNotFound(f"there is no agent {name!r}{hint}")
    rows = explain(facts, now, call.loaded.settings)
    if call.json:
        print_json({"agent": name, "now": now, "paused": facts.paused, "iterations": rows})
        return
    if facts.paused is not None:
        say(f"now: {_pause(facts.paused)}")
    if now is not None:
        say(f"now: {_now_in_words(now)}")
    columns = (
        Column("iteration", right=True),
        Column("started_at"),
        Column("ran", colors=RAN_COLORS),
        Column("why"),
    )
    words = {True: "yes", False: "no", None: "unknown"}
    cells = ((number(row["iteration"]), when(row["started_at"]), words[row["ran"]], row["why"]) for row in rows)
    print_table(columns, cells, empty="there was no iteration yet")
    if len(rows) < limit and facts.history_begins:
        note(f"what was up to iteration {facts.history_begins} is before the beginning of the history")


def _now(call: Call, name: str) -> dict[str, Any] | None:
    """Return what the running loop knows of an agent; None where none runs or answers."""
    from ael_store.runtime.control import AGENT_NOW, ask
    from ael_store.store.lock import LOOP, current_holder

    holder = current_holder(call.path)
    if holder is None or holder.socket is None or holder.what != LOOP:
        return None
    try:
        now: dict[str, Any] | None = ask(holder.socket, AGENT_NOW, {"name": name}, PATIENCE_S)
    except AelError:
        return None
    return now


def _pause(paused: dict[str, Any]) -> str:
    since = "" if paused["since"] is None else f" since {paused['since']}"
    by = "" if paused["by"] is None else f" by {printable(paused['by'])}"
    because = "" if paused["because"] is None else f" because {printable(paused['because'])}"
    return f"the loop is paused{since}{by}{because}; `ael resume` lets it go on"


def _now_in_words(now: dict[str, Any]) -> str:
    if not now["registered"]:
        return "absent: the running loop does not have it"
    parts = ["ready" if now["ready"] else "not ready"]
    if not now["enabled"]:
        parts.append("disabled")
    if not now["started"]:
        parts.append("its on_start has not succeeded yet")
    if now["busy"] is not None:
        parts.append(f"its {now['busy']} runs since {now['busy_since']}")
    if now["quarantined_at"] is not None:
        parts.append(f"quarantined since {now['quarantined_at']}")
    if now["retry_at"] is not None:
        parts.append(f"not before {now['retry_at']}")
    if now["trigger"] is not None:
        parts.append(f"its trigger {printable(now['trigger'])} is due at {now['next_at']}")
    parts.append(f"iteration {now['iteration']}")
    return ", ".join(parts)
