"""The container example, as far as it goes without a container engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.acceptance.processes import PATIENCE_S, ael, running_ael, wait_for

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "container"
CONTAINERFILE = (EXAMPLE / "Containerfile").read_text()
COMPOSE = (EXAMPLE / "compose.yaml").read_text()


def test_health_check_of_the_image_tells_a_loop_that_answers(tmp_path: Path) -> None:
    [check] = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", CONTAINERFILE, re.MULTILINE)
    [command] = re.findall(r'^CMD \["ael", "run", "(.*)"\]$', CONTAINERFILE, re.MULTILINE)
    (tmp_path / command).write_text((EXAMPLE / command).read_text())

    def healthy() -> bool:
        words = check.replace("ael ", f"{sys.executable} -m ael_store ", 1)
        return (
            subprocess.run(
                ["sh", "-c", words], cwd=tmp_path, check=False, env={"PYTHONPATH": str(ROOT), "PATH": "/bin:/usr/bin"}
            ).returncode
            == 0
        )

    with running_ael(tmp_path, "run", command) as loop:
        wait_for(lambda: (tmp_path / "ael.db").exists(), loop)
        wait_for(healthy, loop)
        loop.terminate()
        assert loop.wait(PATIENCE_S) == 0
    assert not healthy()
    assert int(ael(tmp_path, "state", "get", "beats").stdout) > 0


def test_what_the_files_name_is_there_and_safe() -> None:
    copied = re.findall(r"^COPY (examples\S+)", CONTAINERFILE, re.MULTILINE)
    assert copied
    assert all((ROOT / source).exists() for source in copied)
    last = CONTAINERFILE[CONTAINERFILE.rindex("FROM ") :]
    assert re.search(r"^USER ael$", last, re.MULTILINE)
    assert last.index("USER ael") < last.index("\nCMD ")
    assert "://" not in CONTAINERFILE + COMPOSE
    for line in ("read_only: true", "no-new-privileges:true", "- ALL", "stop_grace_period: 40s", "- data:/data"):
        assert line in COMPOSE
    [context, file] = re.findall(r"^ +(?:context|dockerfile): (\S+)$", COMPOSE, re.MULTILINE)
    assert (EXAMPLE / context / file).samefile(EXAMPLE / "Containerfile")
