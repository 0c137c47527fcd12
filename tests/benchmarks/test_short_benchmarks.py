"""The benchmarks in a short form: they run, their rows are right, and ratios are far from bad. No times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.resume import measure_resume, report_resume
from benchmarks.scale import Figure, measure_memory, measure_selection
from benchmarks.spread import Spread
from benchmarks.trigger import Clock, TriggerOptions, measure_trigger, report_trigger

FAR = 4.0
"""Ratios may be so many times their goal: tests run beside each other on machines that others use."""


def test_resume_of_many_keys_is_not_far_from_a_plain_select(tmp_path: Path) -> None:
    found = measure_resume(tmp_path, 1, 40_000, lambda message: None)

    # Beside so few keys the start of a loop counts: its imports, its first commits
    assert found.resume_ms.min - found.start_ms.min < FAR * 2 * found.select_ms.max
    assert "40,000 keys: resumed" in report_resume(found)


def test_clock_counts_every_slot_and_a_stop_is_heard_at_every_rate(tmp_path: Path) -> None:
    options = TriggerOptions(tmp_path, seconds=1.5, stops=1, events=5, event_rates=(60.0,), others=0)

    found = measure_trigger(options, lambda message: None)

    assert [clock.hertz for clock in found.clocks] == [20, 100]
    assert all(clock.is_complete for clock in found.clocks), found.clocks
    assert set(found.begun_after_stop_ms) == {"0", "0.001", "0.01", "0.05", "1"}
    assert "an event from another process reaches its handler" in report_trigger(found)


@pytest.mark.parametrize(("missed", "complete"), [(3, True), (5, False)])
def test_clock_that_loses_slots_uncounted_is_told_from_one_that_counts(missed: int, complete: bool) -> None:
    assert Clock(20, slots=100, iterations=97, missed=missed, plain_slots=100, plain_missed=0).is_complete is complete


def test_selection_grows_with_the_agents_and_not_faster(tmp_path: Path) -> None:
    few, many = measure_selection(tmp_path, 500), measure_selection(tmp_path, 5000)

    assert all(slow < FAR * 10 * quick for quick, slow in zip(few, many, strict=True)), (few, many)


def test_verdict_needs_all_rounds_on_one_side() -> None:
    verdicts = [Figure("it", "ms", Spread.of(found), at_most=10).verdict for found in ([8, 9], [8, 11], [11, 12])]

    assert verdicts == ["at most 10: met", "at most 10: not shown, rounds differ", "at most 10: NOT met"]


def test_memory_is_measured_with_every_key_set(tmp_path: Path) -> None:
    (resident_mb,) = measure_memory(tmp_path / "memory", 3, 4, 5)

    assert resident_mb > 10
