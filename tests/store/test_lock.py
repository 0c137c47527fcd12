"""Who owns a database: one at a time, by whatever name, until its process ends or is overtaken."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ael_store.errors import OwnedElsewhere, OwnershipLost
from ael_store.store import lock as lock_module
from ael_store.store import store as store_module
from ael_store.store.lock import DatabaseLock, Holder, current_holder
from ael_store.store.sqlite import database_path
from ael_store.store.store import Store

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0


def run_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process; its stdin and stdout are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def nothing_against_it(_holder: Holder) -> None:
    pass


# -- names ------------------------------------------------------------------------------------------


def link_to_the_file(path: Path, folder: Path) -> Path:
    (folder / "other.db").symlink_to(path)
    return folder / "other.db"


def link_to_the_folder(path: Path, folder: Path) -> Path:
    (folder / "there").symlink_to(path.parent, target_is_directory=True)
    return folder / "there" / path.name


def link_to_a_link(path: Path, folder: Path) -> Path:
    link_to_the_folder(path, folder)
    (folder / "last.db").symlink_to(Path("there") / path.name)
    return folder / "last.db"


def relative(path: Path, folder: Path) -> Path:
    return Path(os.path.relpath(path))


@pytest.mark.parametrize("other_name", [link_to_the_file, link_to_the_folder, link_to_a_link, relative])
async def test_every_name_of_a_database_meets_the_same_lock(
    tmp_path: Path, other_name: Callable[[Path, Path], Path]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    path = tmp_path / "real" / "ael.db"
    store = Store(path)
    await store.open("loop")
    name = other_name(path, tmp_path / "links")

    assert database_path(name) == path
    assert current_holder(name) == current_holder(path) is not None
    with pytest.raises(OwnedElsewhere, match=f"pid {os.getpid()}"):
        await Store(name).open("loop")

    await store.close()
    assert [file.name for file in (tmp_path / "links").glob("*.lock")] == []


# -- the lock file ----------------------------------------------------------------------------------


def test_lock_file_that_was_replaced_before_it_was_locked_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = DatabaseLock(tmp_path / "ael.db")
    real = lock_module._is_taken
    replaced: list[int] = []

    def replace_first(descriptor: int, *how: int) -> bool:
        if not replaced:
            replaced.append(os.fstat(descriptor).st_ino)
            (tmp_path / "new").touch()
            os.rename(tmp_path / "new", lock.path)
        return real(descriptor, *how)

    monkeypatch.setattr(lock_module, "_is_taken", replace_first)
    lock.acquire("loop")

    assert lock.path.stat().st_ino != replaced[0]
    with pytest.raises(OwnedElsewhere):
        DatabaseLock(tmp_path / "ael.db").acquire("loop")
    lock.release()


def test_owner_that_was_overtaken_keeps_its_hands_off_the_new_lock(tmp_path: Path) -> None:
    old, new = DatabaseLock(tmp_path / "ael.db"), DatabaseLock(tmp_path / "ael.db")
    old.acquire("loop")

    holder = new.take_over("loop", 0.0, nothing_against_it)

    assert holder is not None and holder.pid == os.getpid()
    with pytest.raises(OwnershipLost, match="taken over"):
        old.confirm()
    new.confirm()
    new.describe("loop", "/the/new/socket")
    old.describe("loop", "/the/old/socket")
    old.release()
    now = current_holder(tmp_path / "ael.db")
    assert now is not None and now.socket == "/the/new/socket"
    with pytest.raises(OwnedElsewhere):
        DatabaseLock(tmp_path / "ael.db").acquire("loop")
    new.release()
    assert current_holder(tmp_path / "ael.db") is None
    assert [file.name for file in tmp_path.iterdir()] == ["ael.db.lock"]


def test_take_over_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    old = DatabaseLock(tmp_path / "ael.db")
    old.acquire("loop")

    def refuse(holder: Holder) -> None:
        raise OwnedElsewhere(f"pid {holder.pid} answers")

    with pytest.raises(OwnedElsewhere, match="answers"):
        DatabaseLock(tmp_path / "ael.db").take_over("loop", 0.0, refuse)

    old.confirm()
    assert old.is_ours()
    old.release()


def test_take_over_of_a_free_database_is_a_usual_start(tmp_path: Path) -> None:
    lock = DatabaseLock(tmp_path / "ael.db")

    assert lock.take_over("loop", 0.0, nothing_against_it) is None

    lock.release()


def test_of_two_take_overs_at_once_one_is_refused(tmp_path: Path) -> None:
    old = DatabaseLock(tmp_path / "ael.db")
    old.acquire("loop")
    asked = threading.Barrier(2)
    ends: list[str] = []

    def take_over() -> None:
        lock = DatabaseLock(tmp_path / "ael.db")
        locks.append(lock)
        try:
            asked.wait(PATIENCE_S)
            lock.take_over("loop", 0.0, nothing_against_it)
            ends.append("taken")
        except OwnedElsewhere:
            ends.append("refused")

    locks: list[DatabaseLock] = []
    threads = [threading.Thread(target=take_over) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    # where the second began only after the first had ended, it met a new owner, who here does not answer either
    assert ends.count("taken") >= 1
    assert sum(lock.is_ours() for lock in locks) == 1
    for lock in [old, *locks]:
        lock.release()


async def test_owner_of_another_machine_may_be_overtaken_and_can_not_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "ael.db")
    await store.open("test")
    await store.close()
    old = DatabaseLock(tmp_path / "ael.db")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        old.acquire("loop")

    await store.open("loop", take_over=nothing_against_it)

    [warning] = store.warnings
    assert f"taken over from pid {os.getpid()} on elsewhere" in warning
    assert "can't be told from this host" in warning
    await store.close()
    old.release()


# -- a second start ---------------------------------------------------------------------------------


async def test_second_loop_is_refused_a_hundred_times_of_a_hundred(tmp_path: Path) -> None:
    store = Store(tmp_path / "ael.db")
    await store.open("loop")

    for _ in range(100):
        with pytest.raises(OwnedElsewhere, match=f"owned by pid {os.getpid()}"):
            await Store(tmp_path / "ael.db").open("loop")

    await store.close()


async def test_open_that_is_cancelled_while_it_waits_for_the_lock_ends_at_once(tmp_path: Path) -> None:
    held = DatabaseLock(tmp_path / "ael.db")
    held.acquire("ael state set")
    opening = asyncio.create_task(Store(tmp_path / "ael.db").open("loop"))
    await asyncio.sleep(0.05)

    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening

    held.release()
    assert current_holder(tmp_path / "ael.db") is None


async def test_open_that_is_cancelled_with_the_lock_in_hand_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    create: Any = getattr(store_module, "create_database")  # noqa: B009

    def create_slowly(path: Path) -> None:
        reached.set()
        assert go_on.wait(PATIENCE_S)
        create(path)

    monkeypatch.setattr(store_module, "create_database", create_slowly)
    opening = asyncio.create_task(Store(tmp_path / "ael.db").open("loop"))
    await asyncio.to_thread(reached.wait, PATIENCE_S)

    opening.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening

    assert current_holder(tmp_path / "ael.db") is None
    store = Store(tmp_path / "ael.db")
    await store.open("loop")
    await store.close()


# -- fork -------------------------------------------------------------------------------------------

FORK_AND_DIE = """
import os, sys
from pathlib import Path
from ael_store.store.lock import DatabaseLock
lock = DatabaseLock(Path(sys.argv[1]))
lock.acquire("loop")
if os.fork() == 0:
    lock.release()                      # of the parent's, which it must not touch
    print("child", os.getpid(), flush=True)
    sys.stdin.read()                    # lives until the test lets it end
    os._exit(0)
sys.stdin.readline()
os._exit(9)
"""


def test_lock_ends_with_its_process_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    parent = run_script(FORK_AND_DIE, path)
    assert parent.stdout is not None and parent.stdin is not None
    assert parent.stdout.readline().startswith("child")
    holder = current_holder(path)
    assert holder is not None and holder.pid == parent.pid, "the child has released the lock of its parent"

    parent.kill()
    parent.wait()

    assert current_holder(path) is None, "the child keeps the lock of its parent"
    parent.stdin.close()
    assert parent.stdout.read() == ""  # the child has ended


COMMIT_IN_A_CHILD = """
import asyncio, os, sys
from pathlib import Path
from ael_store.errors import NotAllowedHere
from ael_store.runtime.journal import Journal
from ael_store.model.state import State
from ael_store.store.store import Store
store = Store(sys.argv[1])
loop = asyncio.new_event_loop()
resumed = loop.run_until_complete(store.open("test"))
journal = Journal(resumed, State(resumed.cells, resumed.change_id), 1)
commit = journal.take("command", 1)
child = os.fork()
if child == 0:
    try:
        asyncio.run(store.commit(commit, take_from=resumed.token))
    except NotAllowedHere as error:
        print("refused:", error, flush=True)
    asyncio.run(store.close())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
loop.run_until_complete(store.commit(commit, take_from=resumed.token))
print("committed", flush=True)
loop.run_until_complete(store.close())
os._exit(0)
"""


def test_forked_child_can_not_commit_and_does_its_parent_no_harm(tmp_path: Path) -> None:
    script = run_script(COMMIT_IN_A_CHILD, tmp_path / "ael.db")

    out, _ = script.communicate(timeout=PATIENCE_S)

    assert script.returncode == 0
    assert out.splitlines()[0].startswith("refused:") and "fork" in out.splitlines()[0]
    assert out.splitlines()[1:] == ["committed"]
