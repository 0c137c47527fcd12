"""Runs the blocks of a page as a reader would, top to bottom, in the current folder: `run_page.py PAGE`.

What a block is, its language says:

- a block of any language below a line like `agents.py`: is written to that file, where the console stands;
- `python`: run, all blocks of a page in one namespace, `await` allowed at the top;
- `console`: each line `$ …` goes to one bash that lives as long as the page. It must succeed, unless the next
  command is `echo $?`. Lines below it are what it prints: `...` stands for anything in a line, alone in a line
  for any lines. A line `^C` presses Ctrl-C, a line `Killed` ends the command with SIGKILL, once the lines above
  it have been seen;
- `sql`: run against `ael.db` there, read-only (`test_blocks.py` fills one for a page that makes none);
- `json`, `toml`: parsed;
- all others, and what stands below a comment that begins with `not run:`, are only shown.

The page runs in one event loop, so a loop that a block has started goes on while the next blocks run. A block
without `await` runs in a thread, so that it may block. Ends with 1 at the first block that does not do what it
says, after telling its line.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import shlex
import sqlite3
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.docs.markdown import Block, blocks

COMMAND_TIMEOUT_S = 30.0
MARK = "--end-of-command--"
SIGNALS = {"^C": "INT", "Killed": "KILL"}
NOT_HERE = ("pip", "./dev", "git")
"""Commands that would change the machine or need the network."""


class Wrong(Exception):
    """A block did not do what the page says."""


async def run_page(page: Path) -> None:
    module = types.ModuleType("page")
    sys.modules["page"] = module
    sys.path.insert(0, str(Path.cwd()))
    shell = Shell()
    try:
        for block in blocks(page):
            try:
                await run_block(block, module, shell)
            except Exception as error:
                reason = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
                raise Wrong(f"{page}:{block.line}: {reason}") from error
    finally:
        await shell.close()


async def run_block(block: Block, module: types.ModuleType, shell: Shell) -> None:
    if block.not_run is not None:
        return
    if block.title is not None:
        check_syntax(block)
        file = await shell.folder() / block.title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text, "utf-8")
    elif block.language == "python":
        await run_python(block, module)
    elif block.language == "console":
        found = commands(block.text)
        for place, (command, expected) in enumerate(found):
            asked = found[place + 1 : place + 2] and found[place + 1][0] == "echo $?"
            await run_command(shell, command, expected, may_fail=bool(asked))
    elif block.language == "sql":
        run_sql(block.text, await shell.folder() / "ael.db")
    else:
        check_syntax(block)


def check_syntax(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)


# -- python and sql ---------------------------------------------------------------------------------


async def run_python(block: Block, module: types.ModuleType) -> None:
    # Padded, so that a traceback names the line of the page.
    source = "\n" * (block.line - 1) + block.text
    code = compile(source, "<page>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    function = types.FunctionType(code, vars(module))
    if inspect.iscoroutinefunction(function):
        await function()
    else:
        await asyncio.to_thread(function)


def run_sql(text: str, database: Path) -> None:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        rest = text.strip()
        while rest:
            end = next(i for i in range(1, len(rest) + 1) if sqlite3.complete_statement(rest[:i]))
            connection.execute(rest[:end]).fetchall()
            rest = rest[end:].strip()
    finally:
        connection.close()


# -- the console ------------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a block with the lines that they print."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in text.splitlines():
        if continued:
            found[-1] = (f"{found[-1][0]}\n{line.removeprefix('> ')}", [])
        elif line.startswith("$ "):
            found.append((line[2:], []))
        elif not found:
            raise Wrong(f"output before the first command: {line!r}")
        else:
            found[-1][1].append(line)
        continued = not found[-1][1] and found[-1][0].endswith("\\")
    return found


class Shell:
    """One bash; what it prints comes line by line."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None

    async def send(self, text: str) -> None:
        if self.process is None:
            self.process = await asyncio.create_subprocess_exec(
                "bash",
                "--noprofile",
                "--norc",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=2**24,
            )
            await self.send("set -m")  # so that Ctrl-C reaches a job of the background
            await self.send("trap 'kill -9 $(jobs -p) 2>/dev/null' EXIT")  # also when this process is killed
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n".encode())
        await self.process.stdin.drain()

    async def line(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise Wrong("the shell has ended")
        return line.decode().rstrip("\n")

    async def folder(self) -> Path:
        """Return where it stands."""
        if self.process is None:
            return Path.cwd()
        await self.send(f"echo '{MARK}' \"$PWD\"")
        while not (line := await self.line()).startswith(MARK):
            pass  # of a job in the background
        return Path(line.removeprefix(f"{MARK} "))

    async def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            await self.process.wait()


async def run_command(shell: Shell, command: str, expected: list[str], *, may_fail: bool) -> None:
    if shlex.split(command)[0] in NOT_HERE:
        return
    seen: list[str] = []
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            signals = [line for line in expected if line in SIGNALS]
            if signals:
                status = await interrupt(shell, command, expected, seen, signals[0])
                may_fail = may_fail or signals[0] == "Killed"
            else:
                # The status stays in $?, for an `echo $?` that may follow.
                await shell.send(f"{{ {command}\n}} </dev/null\n__s=$?; printf '\\n{MARK} %s\\n' $__s; (exit $__s)")
                status = await until_mark(shell, seen)
    except TimeoutError:
        raise Wrong(f"`{command}` took longer than {COMMAND_TIMEOUT_S:g} s; it printed:\n{shown(seen)}") from None
    if status and not may_fail:
        raise Wrong(f"`{command}` ended with {status}; it printed:\n{shown(seen)}")
    wanted = [line for line in expected if line not in SIGNALS]
    if wanted and not matches(seen, wanted if "Killed" not in expected else [*wanted, "..."]):
        raise Wrong(f"`{command}` printed:\n{shown(seen)}\nbut the page says:\n{shown(wanted)}")


async def until_mark(shell: Shell, seen: list[str]) -> int:
    while True:
        line = await shell.line()
        if line.startswith(MARK):
            while seen and not seen[-1]:
                seen.pop()
            return int(line.split()[1])
        seen.append(line)


async def interrupt(shell: Shell, command: str, expected: list[str], seen: list[str], how: str) -> int:
    """Run a command in the background, send it a signal once it has printed what stands before that."""
    before = expected[: expected.index(how)]
    await shell.send(f"{command} </dev/null & __p=$!")
    while not (seen and matches(seen, [*before, "..."])):
        seen.append(await shell.line())
    await shell.send(f"kill -{SIGNALS[how]} $__p; wait $__p; __s=$?; printf '\\n{MARK} %s\\n' $__s; (exit $__s)")
    return await until_mark(shell, seen)


def matches(seen: list[str], wanted: list[str]) -> bool:
    """True where the lines are those wanted, `...` standing for anything."""
    pattern = ""
    for line in wanted:
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*"
        else:
            pattern += r"[^\n]*".join(map(re.escape, line.rstrip().split("..."))) + r"[^\n\S]*\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in seen)) is not None


def shown(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines[-40:]) or "    (nothing)"


def main() -> None:
    try:
        asyncio.run(run_page(Path(sys.argv[1])))
    except Wrong as wrong:
        cause: Any = wrong.__cause__
        if not isinstance(cause, Wrong):
            import traceback

            traceback.print_exception(cause)
        raise SystemExit(f"{wrong}") from None


if __name__ == "__main__":
    main()
