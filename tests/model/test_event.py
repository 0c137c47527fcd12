"""Patterns of event types mean the same in Python and in SQL."""

from __future__ import annotations

import sqlite3

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ael_store.model.event import compile_patterns, glob_of

DATABASE = sqlite3.connect(":memory:")


@given(pattern=st.text("ab*?[]^-.č", min_size=1, max_size=6), type=st.text("ab?[]^-.č", min_size=1, max_size=6))
@example(pattern="a[b]*", type="a[b]c")
@example(pattern="*", type="]")
@settings(max_examples=500, deadline=None)
def test_pattern_matches_in_python_what_it_matches_in_sql(pattern: str, type: str) -> None:
    ((found,),) = DATABASE.execute("SELECT ? GLOB ?", (type, glob_of(pattern)))

    assert compile_patterns([pattern])(type) is bool(found)


@given(patterns=st.lists(st.text("ab*", min_size=1, max_size=4), max_size=4), type=st.text("ab", max_size=4))
@settings(max_examples=200, deadline=None)
def test_several_patterns_match_what_one_of_them_matches(patterns: list[str], type: str) -> None:
    assert compile_patterns(patterns)(type) is any(compile_patterns([pattern])(type) for pattern in patterns)
