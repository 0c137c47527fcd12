"""The book of metrics: what each stands at, and what the next commit writes of it.

Samples are rows; what a metric stands at, and its hour that is not over, is one record that is written over. When a
sample opens a new hour, the one before becomes a row of its own. So nothing has to be looked up, summed up or swept at
the full hour, and a restart goes on counting where the last commit left off.
"""

from __future__ import annotations

import logging

from ael_store.model.metric import Measurements, MetricKind
from ael_store.model.records import Commit, MetricRecord, SampleRow

__all__ = ["MOST_METRICS", "MetricBook"]

MOST_METRICS = 10_000
"""More metrics come from names that hold something that varies, like the number of an order."""

log = logging.getLogger("ael_store.loop")


class MetricBook:
    """Every metric of a database. Belongs to the loop's task."""

    def __init__(self, records: dict[tuple[str, str], MetricRecord], sample_id: int) -> None:
        self.records = records
        self.sample_id = sample_id
        self._last_id = max((record.id for record in records.values()), default=0)
        self._told: set[tuple[str, str]] = set()
        """Metrics that were left out, and warned of."""

    def take(self, measurements: Measurements, commit: Commit, *, agent_id: int, iteration: int, now_us: int) -> None:
        """Let what a unit has measured take effect."""
        for (channel, name), (kind, values) in measurements.found.items():
            record = self._record(channel, name, kind)
            if record is None:
                continue
            for value in values:
                self.sample_id += 1
                commit.samples.append(SampleRow(self.sample_id, record.id, agent_id, iteration, now_us, value))
                hour = record.add(value, now_us)
                if hour is not None:
                    commit.metric_hours.append(hour)
            commit.metrics[record.id] = record

    def _record(self, channel: str, name: str, kind: MetricKind) -> MetricRecord | None:
        """Return the record of a metric, a new one where it is new; None where it is left out."""
        record = self.records.get((channel, name))
        if record is not None and record.kind == kind:
            return record
        if record is None and len(self.records) < MOST_METRICS:
            self._last_id += 1
            record = self.records[channel, name] = MetricRecord(self._last_id, channel, name, kind)
            return record
        if record is not None:
            why = f"it is a {record.kind}, and was recorded as a {kind}"
        else:
            why = f"there are {MOST_METRICS} metrics already; keep what varies out of their names"
        # Told once for each metric, and once for all those that are too many.
        told = (channel, name) if record is not None else ("", "")
        if told not in self._told:
            self._told.add(told)
            log.warning("metric %r of channel %r is left out: %s", name, channel, why)
        return None

    def rename(self, channel: str, new_channel: str, commit: Commit) -> None:
        """An agent has another name: its metrics go on under it, but for those that it has there already."""
        for record in [record for record in self.records.values() if record.channel == channel]:
            if (new_channel, record.name) not in self.records:
                del self.records[channel, record.name]
                record.channel = new_channel
                self.records[new_channel, record.name] = record
                commit.metrics[record.id] = record
