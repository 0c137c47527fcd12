"""The pages that come from the code are up to date."""

from __future__ import annotations

import pytest

from tests.docs.generate import COMMAND, error_classes, parts, refreshed


@pytest.mark.parametrize("part", parts())
def test_generated_part_is_up_to_date(part: str) -> None:
    page, text = parts()[part]
    before = page.read_text("utf-8")

    assert before == refreshed(before, part, text), f"{page.name} is behind the code: {COMMAND}"


def test_every_exit_code_of_an_error_is_explained() -> None:
    page, _ = parts()["errors"]

    for code in {cls.exit_code for cls in error_classes()}:
        assert f"| {code} |" in page.read_text("utf-8").split("## Exit codes")[1]
