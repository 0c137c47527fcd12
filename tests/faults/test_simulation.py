"""The simulation finds nothing in the loop, and does find what is broken on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ael_store.model.records import AgentStats
from ael_store.model.unit import Unit
from ael_store.runtime.delivery import Deliveries
from ael_store.runtime.journal import Journal
from ael_store.runtime.lifecycle import Lifecycle
from ael_store.runtime.roster import Roster
from ael_store.store.writer import Writer
from tests.faults.simulation import Outcome, history_of, quick, run, shrink, simulate
from tests.faults.workers import memory

FIRST = 20_000
SEEDS = 30
FOUND_WITHIN = 60
"""Seeds in which each of the faults below must be found."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: nothing here is about power."""
    place = memory() or tmp_path
    with patch("tempfile.tempdir", str(place)), quick(tmp_path):
        yield place


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, 15))
def test_no_seed_finds_a_difference_between_the_loop_and_the_contract(first: int, folder: Path) -> None:
    outcomes = [(seed, simulate(history_of(seed), folder)) for seed in range(first, first + 15)]

    assert [(seed, outcome.violations) for seed, outcome in outcomes if outcome.violations] == []
    assert sum(outcome.crashes for _, outcome in outcomes) > 5
    assert sum(outcome.units for _, outcome in outcomes) > 150


def test_a_seed_gives_the_same_rows_again(folder: Path) -> None:
    for seed in random.Random(1).sample(range(FIRST), 5):
        assert simulate(history_of(seed), folder).digest == simulate(history_of(seed), folder).digest


def test_a_series_of_seeds_is_reported_with_its_figures(tmp_path: Path) -> None:
    said: list[str] = []

    report = run(count=4, seed=7, workers=1, tell=said.append, folder=tmp_path)

    assert (report.trials, report.silent, report.failures) == (4, 0, ())
    assert "seeds from 7" in report.note


def test_shrinking_leaves_the_steps_that_matter() -> None:
    history = replace(history_of(1), steps=tuple(("advance", n) for n in range(30)))

    shorter = shrink(history, lambda candidate: ("advance", 17) in candidate.steps)

    assert shorter.steps == (("advance", 0), ("advance", 17))


# -- the loop broken on purpose ----------------------------------------------------------------------


def _cursor_does_not_move() -> Any:
    """A delivery's effect is committed, its cursor is not."""
    settle = Deliveries.settle

    def broken(self: Deliveries, subscription: Any, *arguments: Any) -> Any:
        record = settle(self, subscription, *arguments)
        self.journal.commit.subscriptions.pop(subscription.record.id, None)
        return record

    return patch.object(Deliveries, "settle", broken)


def _failed_unit_keeps_its_writes() -> Any:
    fail = Unit.fail

    def broken(self: Unit, *arguments: Any) -> None:
        writes = dict(self.writes)
        fail(self, *arguments)
        self.writes = writes

    return patch.object(Unit, "fail", broken)


def _failed_unit_keeps_its_events() -> Any:
    fail = Unit.fail

    def broken(self: Unit, *arguments: Any) -> None:
        emissions = list(self.emissions)
        fail(self, *arguments)
        self.emissions = emissions

    return patch.object(Unit, "fail", broken)


def _delayed_events_are_lost_at_restart() -> Any:
    prepare = Journal.__init__

    def broken(self: Journal, *arguments: Any) -> None:
        prepare(self, *arguments)
        self.delayed.clear()

    return patch.object(Journal, "__init__", broken)


def _counts_are_not_restored() -> Any:
    prepare = Roster.__init__

    def broken(self: Roster, *arguments: Any) -> None:
        prepare(self, *arguments)
        self.stats = {number: AgentStats(number) for number in self.stats}

    return patch.object(Roster, "__init__", broken)


def _operators_word_is_forgotten() -> Any:
    add = Roster.add

    def broken(self: Roster, agent: Any, now_us: int) -> Any:
        record = self.records.get(agent.name)
        if record is not None:
            record.operator_enabled = None
        return add(self, agent, now_us)

    return patch.object(Roster, "add", broken)


def _commit_comes_in_two_halves() -> Any:
    write = Writer._write_changes

    def broken(self: Writer, cursor: Any, *arguments: Any) -> None:
        write(self, cursor, *arguments)
        cursor.execute("COMMIT")
        cursor.execute("BEGIN IMMEDIATE")

    return patch.object(Writer, "_write_changes", broken)


def _increments_are_not_merged() -> Any:
    return patch.object(Journal, "_merge_increments", lambda self, unit: None)


def _conflicts_are_overlooked() -> Any:
    return patch.object(Unit, "conflict", lambda self: None)


def _background_sees_what_came_later() -> Any:
    items = Unit.items

    def broken(self: Unit, *arguments: Any) -> Any:
        shadow, self.shadow = self.shadow, None
        try:
            return list(items(self, *arguments))
        finally:
            self.shadow = shadow

    return patch.object(Unit, "items", broken)


def _missed_iterations_are_not_counted() -> Any:
    slot = Lifecycle._slot

    def broken(self: Lifecycle, mono: float) -> Any:
        found = slot(self, mono)
        return None if found is None else replace(found, missed=0)

    return patch.object(Lifecycle, "_slot", broken)


def _back_off_is_forgotten_at_restart() -> Any:
    prepare = Roster.__init__

    def broken(self: Roster, *arguments: Any) -> None:
        prepare(self, *arguments)
        for record in self.records.values():
            record.retry_us = None

    return patch.object(Roster, "__init__", broken)


FAULTS: dict[Callable[[], Any], int] = {
    _cursor_does_not_move: 0,
    _failed_unit_keeps_its_writes: 0,
    _failed_unit_keeps_its_events: 0,
    _delayed_events_are_lost_at_restart: 4,
    _counts_are_not_restored: 4,
    _operators_word_is_forgotten: 32,
    _commit_comes_in_two_halves: 20,
    _increments_are_not_merged: 4,
    _conflicts_are_overlooked: 4,
    _background_sees_what_came_later: 1,
    _missed_iterations_are_not_counted: 4,
    _back_off_is_forgotten_at_restart: 14,
}
"""Each fault, and a seed near one that finds it, so that the test is quick; from seed 0 on it takes 33 at most."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_broken_loop_is_found(fault: Callable[[], Any], folder: Path) -> None:
    with fault():
        found = next((outcome for outcome in _played(FAULTS[fault], folder) if outcome.violations), None)

    assert found is not None, f"not found in {FOUND_WITHIN} seeds"


def _played(first: int, folder: Path) -> Iterator[Outcome]:
    for seed in range(first, first + FOUND_WITHIN):
        yield simulate(history_of(seed), folder)
