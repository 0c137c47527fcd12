"""What an iteration was: the figures for the live line, for logs and for `get_stats`."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["IterationSummary", "Meter"]


@dataclass(frozen=True, slots=True)
class IterationSummary:
    """Figures of one iteration; durations in seconds."""

    iteration: int
    ticks: int
    deliveries: int
    errors: int
    events: int
    changes: int
    missed: int
    late_s: float
    """How long after its slot it began; 0 where it was not the clock that woke it."""
    run_s: float
    """Hooks and the loop's own code."""
    commit_s: float
    """The commit; 0 where the iteration was idle and waits for the next one."""
    pending: int
    background: int
    failed: tuple[str, ...] = field(default=())
    """Agents whose hooks failed in it."""


class Meter:
    """Sums and moving averages over a run."""

    def __init__(self) -> None:
        self.iterations = 0
        self.ticks = 0
        self.deliveries = 0
        self.errors = 0
        self.events = 0
        self.missed = 0
        self.commits = 0
        self.run_s = 0.0
        self.commit_s = 0.0
        self.longest_s = 0.0
        self.last: IterationSummary | None = None

    def add(self, summary: IterationSummary) -> None:
        self.iterations += 1
        self.ticks += summary.ticks
        self.deliveries += summary.deliveries
        self.errors += summary.errors
        self.events += summary.events
        self.missed += summary.missed
        self.commits += summary.commit_s > 0
        self.run_s += summary.run_s
        self.commit_s += summary.commit_s
        self.longest_s = max(self.longest_s, summary.run_s + summary.commit_s)
        self.last = summary

    def get_stats(self) -> dict[str, float | int]:
        """Return sums of this run and mean durations in milliseconds."""
        return {
            "iterations": self.iterations,
            "ticks": self.ticks,
            "deliveries": self.deliveries,
            "errors": self.errors,
            "events": self.events,
            "missed_slots": self.missed,
            "commits": self.commits,
            "mean_iteration_ms": 1000 * self.run_s / self.iterations if self.iterations else 0.0,
            "mean_commit_ms": 1000 * self.commit_s / self.commits if self.commits else 0.0,
            "longest_iteration_ms": 1000 * self.longest_s,
        }
