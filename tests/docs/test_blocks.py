"""Every block of the pages does what the page says: see `run_page.py` for what a block is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ael_store.store.upgrade import HEAD, create_database
from tests.docs.markdown import ROOT, blocks, page_id, pages
from tests.migrations.fill import fill

RUNNABLE = ("python", "console", "sql", "json", "toml")

SQLITE3 = """#!{python}
import sqlite3, sys
words = [word for word in sys.argv[1:] if word[0] != "-"]
connection = sqlite3.connect(f"file:{{words[0]}}?mode=ro", uri=True)
cursor = connection.execute(words[1])
if "-header" in sys.argv:
    print(*(column[0] for column in cursor.description), sep="|")
for row in cursor:
    print(*("" if value is None else value for value in row), sep="|")
"""
"""For machines without the `sqlite3` program: what the pages use of it."""

CURL = """#!{python}
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[-1], timeout=20).read().decode())
"""
"""The same for `curl`."""


def has_something_to_run(page: Path) -> bool:
    return any(block.language in RUNNABLE and block.not_run is None for block in blocks(page))


def asks_without_making(page: Path) -> bool:
    """True for a page with SQL that makes no database itself: it gets a filled one."""
    languages = {block.language for block in blocks(page)}
    return "sql" in languages and "console" not in languages


def environment(folder: Path) -> dict[str, str]:
    """Return a plain environment in which `ael` and `sqlite3` are found."""
    tools = folder / "tools"
    tools.mkdir()
    for name, program in (("sqlite3", SQLITE3), ("curl", CURL)):
        if shutil.which(name) is None:
            (tools / name).write_text(program.format(python=sys.executable))
            (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AEL_", "PYTEST_", "COV_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), str(tools), os.environ["PATH"]])
    return {
        **kept,
        "PATH": path,
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
        "COLUMNS": "200",
        "AEL_LOG_FORMAT": "console",
    }


@pytest.mark.timeout(330)  # a hang is noticed command by command; on a busy machine forty of them may take minutes
@pytest.mark.parametrize("page", [page for page in pages() if has_something_to_run(page)], ids=page_id)
def test_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    if "docs/datasette/" in page.read_text("utf-8"):  # a page for somebody in a checkout
        (here / "docs").symlink_to(ROOT / "docs")
    if asks_without_making(page):
        create_database(here / "ael.db")
        fill(here / "ael.db", HEAD)

    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_page.py")), str(page)],
        cwd=here,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout
