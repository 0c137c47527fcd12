"""The rows of metrics in a commit; loaded and compiled when the first one is written."""

from __future__ import annotations

from typing import Any

from ael_store.model.records import Commit, MetricHour, MetricRecord, SampleRow
from ael_store.store.digest import row_digest
from ael_store.store.writer import _columns, _insert, _rows_with_digest, _upsert

__all__ = ["write_metrics"]

METRIC = _upsert("metrics", (*_columns(MetricRecord), "digest"))
SAMPLE = _insert("metric_samples", (*SampleRow._fields, "digest"))
HOUR = _upsert("metric_hours", (*MetricHour._fields, "digest"))
SAME_HOUR = "SELECT samples, total, least, most, last FROM metric_hours WHERE metric_id = ? AND hour_us = ?"


def write_metrics(cursor: Any, commit: Commit) -> None:
    """Write samples, what their metrics stand at, and hours that are over; remove old samples.

    In the driver's thread, inside the transaction.
    """
    if commit.metrics:
        cursor.executemany(METRIC, _rows_with_digest(MetricRecord, commit.metrics.values()))
    if commit.samples:
        cursor.executemany(SAMPLE, [(*row, row_digest(tuple(row))) for row in commit.samples])
    for hour in commit.metric_hours:
        known = cursor.execute(SAME_HOUR, (hour.metric_id, hour.hour_us)).fetchone()
        if known is not None:  # the clock was set back over the full hour
            hour = hour.joined_to(MetricHour(hour.metric_id, hour.hour_us, *known))
        cursor.execute(HOUR, (*hour, row_digest(tuple(hour))))
    if commit.pruned_samples:
        cursor.execute("DELETE FROM metric_samples WHERE id <= ?", (commit.pruned_samples,))
