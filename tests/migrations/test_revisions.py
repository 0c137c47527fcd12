"""Each revision goes up, down and up again on a database that is in use, and keeps its rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ael_store.store.upgrade import HEAD, check, current_revision, downgrade, upgrade
from tests.migrations.conftest import REVISIONS
from tests.migrations.fill import ask, common, digests, execute, layout, view_rows

STEPS = list(pairwise(REVISIONS))

VIEWS_OF = {"0001": 8, "0002": 9, "0003": 11, "0004": 11, "0005": 12, "0006": 14, "0007": 17, "0008": 17}


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_revision_up_down_and_up_keeps_all_rows(filled: Callable[[str], Path], before: str, after: str) -> None:
    path = filled(before)
    columns = layout(path)
    kept = {table: names for table, names in columns.items() if table != "meta"}  # where a revision may note a fact
    rows, facts = digests(path, kept), digests(path, {"meta": columns["meta"]})

    upgrade(path, revision=after, backup=False)
    assert digests(path, kept) == rows
    downgrade(path, before, backup=False)
    assert digests(path, {"meta": columns["meta"]}) == facts
    assert layout(path) == columns
    assert digests(path, kept) == rows
    upgrade(path, revision=after, backup=False)
    assert digests(path, kept) == rows
    assert check(path).problems == []


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_downgrade_loses_only_what_the_older_schema_cannot_hold(
    filled: Callable[[str], Path], before: str, after: str
) -> None:
    path = filled(after)
    newer = layout(path)
    upgraded = path.with_name("older.db")
    upgraded.touch()
    upgrade(upgraded, revision=before, backup=False)
    shared = common(newer, layout(upgraded))
    del shared["meta"]  # where it keeps what has no other place
    rows = digests(path, shared)

    downgrade(path, "-1", backup=False)

    assert current_revision(path) == before
    assert layout(path).keys() == rows.keys() | {"meta"}
    assert digests(path, {table: layout(path)[table] for table in shared}) == rows


@pytest.mark.parametrize("revision", REVISIONS)
def test_views_answer_at_each_revision_on_the_way_down_and_up(filled: Callable[[str], Path], revision: str) -> None:
    path = filled(HEAD)
    shown = view_rows(path)
    assert len(shown) == VIEWS_OF[HEAD]
    assert 0 not in shown.values()

    downgrade(path, revision, backup=False)

    older = view_rows(path)
    assert len(older) == VIEWS_OF[revision]
    assert 0 < older.pop("v_problems", 1) <= shown["v_problems"]  # each revision knows more kinds
    assert older == {view: shown[view] for view in older}
    assert check(path).problems == []
    upgrade(path, backup=False)
    assert len(view_rows(path)) == VIEWS_OF[HEAD]


def test_every_table_stays_strict_and_its_foreign_keys_hold(filled: Callable[[str], Path]) -> None:
    path = filled("0001")

    upgrade(path, backup=False)
    downgrade(path, "0001", backup=False)
    upgrade(path, backup=False)

    tables = ask(path, "SELECT name FROM pragma_table_list WHERE type = 'table' AND schema = 'main' AND NOT strict")
    assert {name for (name,) in tables} == {"alembic_version", "sqlite_schema"}
    with pytest.raises(sqlite3.IntegrityError):
        ask(path, "INSERT INTO schedules (agent_id, trigger) VALUES (99, 'every 1s')")
    with pytest.raises(sqlite3.IntegrityError):
        ask(path, "DELETE FROM subscriptions")


def test_views_and_tables_of_the_user_stop_no_upgrade(filled: Callable[[str], Path]) -> None:
    path = filled("0001")
    execute(
        path,
        """
        CREATE VIEW mine AS SELECT subscriber FROM v_pending;
        CREATE TRIGGER through_mine INSTEAD OF DELETE ON mine BEGIN SELECT 1; END;
        CREATE VIEW "all ""of"" mine" AS SELECT * FROM mine;
        CREATE TABLE notes (text TEXT, agent INTEGER REFERENCES agents (id));
        INSERT INTO notes VALUES ('hello', 1);
        CREATE TRIGGER watch AFTER UPDATE ON subscriptions BEGIN SELECT 1; END;
        """,
    )

    upgrade(path, backup=False)
    downgrade(path, "0001", backup=False)
    upgrade(path, backup=False)

    assert ask(path, 'SELECT count(*) FROM "all ""of"" mine"')[0][0] > 0
    assert ask(path, "SELECT text FROM notes") == [("hello",)]
    assert check(path).problems == [
        "table notes is not ours",
        "trigger through_mine is not ours",
        "trigger watch is not ours",
        'view all "of" mine is not ours',
        "view mine is not ours",
    ]
