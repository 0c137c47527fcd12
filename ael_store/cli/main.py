"""Where `ael` begins: the two ways that must be light, then everything else.

`ael --version` answers before anything is imported. `ael run` lives for months, so the arguments that people
write are read here without typer, which would bring pydantic into every running loop; what is unusual
(`--help`, a mistake) takes the way of all other commands, through typer, which says what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ael_store._version import __version__

__all__ = ["main"]

SUPPORTED = ("linux", "darwin")


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit code; messages are on stderr then."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"ael {__version__}")
        return 0
    if sys.platform not in SUPPORTED:
        print(f"ael: {sys.platform} is not supported: ael runs on Linux and macOS", file=sys.stderr)
        return 1
    from ael_store.cli.failure import finish

    code = finish(lambda: _carry_out(arguments), debug="--debug" in arguments)
    return code if argv is not None else _leave(code)


def _leave(code: int) -> int:
    """Return the exit code where nothing keeps the process from ending, else end it; agents may have left threads."""
    if "ael_store.cli.process" in sys.modules:
        from ael_store.cli.process import leave

        return leave(code)
    return code


def _carry_out(arguments: list[str]) -> int:
    from ael_store.cli.run import read_plain_arguments, run, with_address

    arguments = with_address(arguments)
    plain = read_plain_arguments(arguments)
    if plain is not None:
        call, target, options = plain
        run(call, target, **options)
        return 0
    from ael_store.cli.app import carry_out

    return carry_out(arguments)
