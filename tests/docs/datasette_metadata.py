"""Writes `docs/datasette/metadata.json` from the pages: `./dev python -m tests.docs.datasette_metadata`.

What the views and their columns mean comes from the page of the views, the canned queries are the recipes of the
page on SQL. `test_datasette.py` fails where the file is behind them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ael_store.schema.tables import metadata as tables
from tests.docs.markdown import ROOT

FILE = ROOT / "docs/datasette/metadata.json"
VIEWS = ROOT / "docs/reference/views.md"
RECIPES = ROOT / "docs/how-to/inspect-with-sql.md"
COMMAND = "./dev python -m tests.docs.datasette_metadata"

PARAMETERS = {"writers-of-a-key": {"key": "'temperature'"}}
"""What a recipe has as an example and a canned query as a field to fill in."""

NEWEST_FIRST = ("id", "iteration", "run_id", "hour")
"""Columns by which a view is shown, where it begins with one of them or has it second."""


def made() -> dict[str, Any]:
    """Return what the file should hold."""
    hidden = {name: {"hidden": True} for name in [*tables.tables, "alembic_version"]}
    return {
        "title": "ael_store",
        "description": "A durable agent loop: its state, and everything that led to it.",
        "databases": {
            "ael": {
                "description": (
                    "Read-only, as of the last commit. Times are UTC, values are JSON text, durations are milliseconds."
                ),
                "tables": {**views(), **dict(sorted(hidden.items()))},
                "queries": recipes(),
            }
        },
    }


def views() -> dict[str, dict[str, Any]]:
    """Return what each view means, with its columns."""
    found = {}
    for view, section in _sections(VIEWS.read_text("utf-8"), "##"):
        if not view.startswith("v_"):
            continue
        prose, _, rest = section.partition("| Column | Type | Meaning |")
        about, *more = _plain(prose).splitlines()
        rows = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.+) \|$", rest.split("\n\n")[0], re.MULTILINE)
        described: dict[str, Any] = {"title": f"{view}: {about[0].lower()}{about[1:].rstrip('.')}"}
        if more:
            described["description"] = " ".join(more)
        described["columns"] = {name: _described(kind, _plain(meaning)) for name, kind, meaning in rows}
        units = {name: "ms" for name, kind, _ in rows if kind == "ms"}
        if units:
            described["units"] = units
        order = next((name for name, _, _ in rows[:2] if name in NEWEST_FIRST), None)
        if order is not None:
            described["sort_desc"] = order
        found[view] = described
    return found


def recipes() -> dict[str, dict[str, Any]]:
    """Return the canned queries."""
    part = dict(_sections(RECIPES.read_text("utf-8"), "##"))["Recipes"]
    found = {}
    for title, text in _sections(part, "###"):
        name = title.lower().replace(" ", "-")
        prose, sql = re.fullmatch(r"(.*?)```sql\n(.*?);\n```\s*", text, re.DOTALL).groups()  # type: ignore[union-attr]
        parameters = PARAMETERS.get(name, {})
        for parameter, example in parameters.items():
            assert sql.count(example) == 1
            sql = sql.replace(example, f":{parameter}")
        found[name] = {"title": title, "description": " ".join(_plain(prose).splitlines()), "sql": sql}
        if parameters:
            found[name]["params"] = list(parameters)
    return found


def _sections(text: str, marks: str) -> list[tuple[str, str]]:
    """Return the headings of one level with the text below each."""
    level = len(marks)
    return re.findall(rf"^#{{{level}}} ([^\n]+)\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.MULTILINE | re.DOTALL)


def _plain(markdown: str) -> str:
    """Return prose without its marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "").strip()


def _described(kind: str, meaning: str) -> str:
    units = {"JSON": " JSON.", "time": " UTC.", "ms": " In milliseconds.", "USD": " In USD."}
    return meaning + units.get(kind, "")


def text() -> str:
    """Return the file as it should be."""
    return json.dumps(made(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(), "utf-8")
    print(f"{FILE.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
