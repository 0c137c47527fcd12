"""Reads the project's Markdown: its pages, blocks of code, headings and links."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"^(`{3,})(\w*)\s*$")
TITLE = re.compile(r"^`([\w./-]+)`:$")
NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
LINK = re.compile(r"(?<!!)\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\]\(([^()\s]+)\)")


def pages() -> list[Path]:
    """Return every page that users read."""
    return sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, where its text begins, and what the lines before it say.

    `title` is the file that it is, from a line like `agents.py`: directly above. `not_run` is the reason why it
    is only shown, from a comment there.
    """

    language: str
    text: str
    line: int
    title: str | None = None
    not_run: str | None = None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text("utf-8").split("\n")
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        number += 1
        if not fence:
            continue
        begin = number
        while lines[number] != fence[1]:
            number += 1
        before = [line for line in lines[: begin - 1] if line][-2:]
        titles = [title[1] for line in before[-1:] if (title := TITLE.match(line))]
        reasons = [reason[1] for line in before[-1:] if (reason := NOT_RUN.match(line))]
        found.append(
            Block(
                fence[2],
                "\n".join(lines[begin:number]) + "\n",
                begin + 1,
                titles[0] if titles else None,
                reasons[0] if reasons else None,
            )
        )
        number += 1
    return found


def prose(page: Path) -> list[tuple[int, str]]:
    """Return the numbered lines outside of fenced blocks and comments."""
    text = page.read_text("utf-8")
    text = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    inside: str | None = None
    found: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            inside = fence[1]
        elif inside is not None and line == inside:
            inside = None
        elif inside is None:
            found.append((number, line))
    return found


def headings(page: Path) -> list[str]:
    """Return the headings of a page, without their marks."""
    return [found[1].strip() for _, line in prose(page) if (found := re.match(r"#{1,6} (.+)", line))]


def anchors(page: Path) -> set[str]:
    """Return what can stand after the `#` of a link to a page, as GitHub makes it from the headings."""
    found: set[str] = set()
    for heading in headings(page):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = "".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        anchor = kept.replace(" ", "-")
        number, name = 0, anchor
        while name in found:
            number += 1
            name = f"{anchor}-{number}"
        found.add(name)
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """Return the targets of the links of a page with their lines."""
    return [(number, target) for number, line in prose(page) for target in LINK.findall(re.sub(r"`[^`]*`", "", line))]
