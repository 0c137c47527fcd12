"""Where a database may lie, and one clear answer for each place where it may not."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ael_store.errors import DatabaseNotUsable, NotADatabase
from ael_store.store import place
from ael_store.store.lock import lock_path
from ael_store.store.place import check_place, mount_of, readable_by_others
from ael_store.store.sqlite import database_path
from ael_store.store.store import Store

ROOT = Path(__file__).parents[2]

MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 21 0:40 / /home rw,relatime shared:20 - nfs4 server:/home rw,vers=4.2
36 35 8:2 / /home/me/local\040disk rw,relatime - xfs /dev/sdb1 rw
40 21 0:50 / /srv/data rw,relatime shared:30 master:4 - fuse.sshfs me@there:/ rw,user_id=0
41 21 8:3 / /srv/data rw,relatime - ext4 /dev/sdc1 rw
""".strip()


async def made(path: Path) -> Path:
    """A database, closed in order."""
    store = Store(path)
    await store.open("test")
    await store.close()
    return path


# -- links ------------------------------------------------------------------------------------------


async def test_link_that_belongs_to_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = await made(tmp_path / "ael.db")
    link = tmp_path / "link.db"
    link.symlink_to(path)
    if os.geteuid() == 0:
        os.lchown(link, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: link.lstat().st_uid + 1)

    with pytest.raises(DatabaseNotUsable, match=rf"link.db is a link that belongs to user .*{path}"):
        database_path(link)


async def test_link_that_leads_nowhere_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "ael.db").symlink_to(tmp_path / "gone.db")

    with pytest.raises(DatabaseNotUsable, match=r"ael.db is a link to .*gone.db, which does not exist"):
        await Store(tmp_path / "ael.db").open("test")

    assert [file.name for file in tmp_path.iterdir()] == ["ael.db"]


def test_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ael.db").symlink_to("ael.db")

    with pytest.raises(DatabaseNotUsable, match="leads to itself"):
        database_path(tmp_path / "ael.db")


async def test_second_name_of_the_same_file_is_refused(tmp_path: Path) -> None:
    path = await made(tmp_path / "ael.db")
    os.link(path, tmp_path / "second.db")

    for name in (path, tmp_path / "second.db"):
        with pytest.raises(DatabaseNotUsable, match=r"has 2 names \(hard links\)"):
            await Store(name).open("test")

    (tmp_path / "second.db").unlink()
    await made(path)


async def test_second_name_that_a_killed_creation_has_left_is_removed(tmp_path: Path) -> None:
    path = await made(tmp_path / "ael.db")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    os.link(path, tmp_path / f".ael.db.new-{ended.pid}-0123abcd")

    await made(path)

    assert path.stat().st_nlink == 1


# -- folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "fine"), [(0o777, False), (0o757, False), (0o1777, True), (0o775, True)])
async def test_folder_that_everybody_may_write_is_refused(tmp_path: Path, mode: int, fine: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)

    if fine:
        await made(folder / "ael.db")
        return
    with pytest.raises(DatabaseNotUsable, match=rf"everybody .*`chmod o-w {folder}`, or set allow_shared_folder"):
        await Store(folder / "ael.db").open("test")
    assert list(folder.iterdir()) == []
    store = Store(folder / "ael.db", allow_shared_folder=True)
    await store.open("test")
    await store.close()


async def test_what_is_not_ours_gets_no_lock_beside_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("only a text, but long enough to be no empty file\n" * 50)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE notes (text)").close()
    (tmp_path / "folder.db").mkdir()
    os.mkfifo(tmp_path / "pipe.db")
    before = sorted(tmp_path.iterdir())

    for name, error in (
        ("notes.txt", NotADatabase),
        ("other.db", NotADatabase),
        ("folder.db", DatabaseNotUsable),
        ("pipe.db", DatabaseNotUsable),
    ):
        with pytest.raises(error, match=name):
            await Store(tmp_path / name).open("test")

    assert sorted(tmp_path.iterdir()) == before


async def test_file_that_everybody_may_read_is_warned_of(tmp_path: Path) -> None:
    path = await made(tmp_path / "ael.db")
    path.chmod(0o644)
    store = Store(path)

    await store.open("test")

    [warning] = store.warnings
    assert warning.startswith(f"everybody on this machine may read {path}") and "`chmod o= " in warning
    await store.close()
    assert readable_by_others(path) == [path]
    path.chmod(0o640)
    assert readable_by_others(path) == []


async def test_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    lock_path(tmp_path / "ael.db").symlink_to(tmp_path / "victim")

    with pytest.raises(DatabaseNotUsable, match=r"ael\.db\.lock is a link"):
        await Store(tmp_path / "ael.db").open("test")

    assert not (tmp_path / "victim").exists()


# -- file systems -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "kind", "mount"),
    [
        ("/var/lib", "ext4", "/"),
        ("/home", "nfs4", "/home"),
        ("/home/me", "nfs4", "/home"),
        ("/homes/me", "ext4", "/"),
        ("/home/me/local disk/x", "xfs", "/home/me/local disk"),
        ("/srv/data/x", "ext4", "/srv/data"),  # mounted over the other one
    ],
)
def test_mount_of_a_folder_is_found(folder: str, kind: str, mount: str) -> None:
    assert mount_of(Path(folder), MOUNTS) == (kind, mount)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "fuse.glusterfs", "fuse.sshfs"])
async def test_network_file_system_is_refused_for_writing_and_may_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = await made(tmp_path / "ael.db")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n35 21 0:40 / {tmp_path} rw - {kind} server:/x rw\n")
    monkeypatch.setattr(place, "MOUNTS", mounts)

    with pytest.raises(DatabaseNotUsable, match=rf"network file system \({kind}, mounted at {tmp_path}\)"):
        await Store(path).open("test")

    assert Store(path).reader.state() == []


def test_system_without_a_list_of_mounts_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "MOUNTS", tmp_path / "missing")

    check_place(tmp_path / "ael.db")


def in_a_mount_namespace(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what it likes; nobody else sees it."""
    if shutil.which("unshare") is None:
        pytest.skip("NOT TESTED: read-only file systems (there is no `unshare`)")
    if subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: read-only file systems (this machine allows no user namespaces)")
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "AEL": f"{sys.executable} -m ael_store"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


AGENT = "from ael_store import AgentBase\n\nclass Idle(AgentBase):\n    name = 'idle'\n"


async def test_read_only_file_system_can_be_read_and_not_run_on(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    path = await made(tmp_path / "ro" / "ael.db")
    (tmp_path / "agents.py").write_text(AGENT)

    done = in_a_mount_namespace(
        'mount --bind "$1/ro" "$1/ro" && mount -o remount,ro,bind "$1/ro" && cd "$1" && '
        "$AEL --db ro/ael.db status --json && $AEL --db ro/ael.db state list --json; echo read $?; "
        "$AEL --db ro/ael.db run agents.py --iterations 1; echo run $?; "
        "$AEL --db ro/ael.db state set a 1; echo set $?",
        tmp_path,
    )

    assert "read 0" in done.stdout and '"status":' in done.stdout, done
    assert "run 74" in done.stdout and "set 74" in done.stdout, done
    assert done.stderr.count("its file system is mounted read-only") == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in path.parent.iterdir() if "lock" not in file.name] == ["ael.db"]


async def test_read_only_file_is_refused(tmp_path: Path) -> None:
    await made(tmp_path / "ael.db")
    (tmp_path / "agents.py").write_text(AGENT)

    done = in_a_mount_namespace(
        'cd "$1" && mount --bind ael.db ael.db && mount -o remount,ro,bind ael.db && '
        "$AEL run agents.py --iterations 1; echo run $?",
        tmp_path,
    )

    assert "run 74" in done.stdout, done
    assert f"{tmp_path / 'ael.db'} can't be written" in done.stderr


async def test_log_that_can_not_be_read_in_a_read_only_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    path = tmp_path / "ro" / "ael.db"
    store = Store(tmp_path / "ael.db")
    await store.open("test")
    for suffix in ("", "-wal"):
        shutil.copy(f"{store.path}{suffix}", f"{path}{suffix}")
    await store.close()

    done = in_a_mount_namespace(
        'mount --bind "$1/ro" "$1/ro" && mount -o remount,ro,bind "$1/ro" && $AEL --db "$1/ro/ael.db" status; echo $?',
        tmp_path,
    )

    assert done.stdout.endswith("74\n"), done
    assert "has a log (ael.db-wal), which can't be read" in done.stderr
