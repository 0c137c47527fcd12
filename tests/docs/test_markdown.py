"""The pages hold together: links lead somewhere, sentences stand on lines of their own, names are right."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, anchors, blocks, headings, links, page_id, pages, prose

ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "vs.", "…")
SECOND_SENTENCE = re.compile(r"(?P<before>\S+[.!?])\s+[A-Z`(]")


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        if not found.exists():
            broken.append(f"{page_id(page)}:{line}: there is no {target}")
        elif anchor and (found.suffix != ".md" or anchor not in anchors(found)):
            broken.append(f"{page_id(page)}:{line}: {file or 'the page'} has no heading for #{anchor}")

    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_a_line_holds_one_sentence(page: Path) -> None:
    """In plain paragraphs; lists, tables and headings may be denser."""
    found = [
        f"{page_id(page)}:{number}: {line}"
        for number, line in prose(page)
        if re.match(r"[A-Za-z`*_(]", line)
        and any(
            not hit["before"].endswith(ABBREVIATIONS)
            for hit in SECOND_SENTENCE.finditer(re.sub(r"`[^`]*`", "`x`", line))
        )
    ]

    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_page_begins_with_its_only_title(page: Path) -> None:
    first = next(line for _, line in prose(page) if line)
    titles = [line for _, line in prose(page) if line.startswith("# ")]

    assert first.startswith("# ")
    assert titles == [first]


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_every_block_names_its_language(page: Path) -> None:
    nameless = [block.line for block in blocks(page) if not block.language]

    assert not nameless


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=page_id)
def test_page_is_reached_from_the_index(page: Path) -> None:
    index = ROOT / "docs/index.md"
    if page == index:
        reached = {target.partition("#")[0] for _, target in links(ROOT / "README.md")}
        assert "docs/index.md" in reached
        return
    reached_from_index = {(index.parent / target.partition("#")[0]).resolve() for _, target in links(index)}

    assert page in reached_from_index, f"docs/index.md has no link to {page_id(page)}"


def test_every_routine_that_a_page_names_exists() -> None:
    described = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"^  (\w+) ", described, re.MULTILINE))

    named = {name for page in pages() for name in re.findall(r"\./dev ([a-z]+)", page.read_text("utf-8"))}

    assert named - {"calls"} <= known


def test_decisions_are_numbered_without_gaps() -> None:
    names = sorted(path.name for path in (ROOT / "docs/decisions").glob("*.md"))

    assert [name[:4] for name in names] == [f"{number:04}" for number in range(1, len(names) + 1)]


def test_every_decision_says_context_options_choice_and_what_stays_free() -> None:
    for path in sorted((ROOT / "docs/decisions").glob("*.md"))[1:]:
        said = headings(path)

        assert {"Context", "Options", "Choice", "What stays free"} <= set(said), path.name
