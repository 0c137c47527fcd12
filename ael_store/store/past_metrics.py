"""What metrics stood at at a past moment: told from their hours up to then, and from the samples that are left.

Hours are kept for ever, samples are not. Where those of the hour of the moment are gone, metrics stand where they
stood at the full hour before it.
"""

from __future__ import annotations

from ael_store.model.records import HOUR_US, MetricHour, MetricRecord, within
from ael_store.store.past import Past, Rewind, records_of

__all__ = ["rewind_metrics"]


def rewind_metrics(past: Past, rewind: Rewind) -> None:
    """Metrics that were recorded later are as they were; those that are younger go."""
    if past.is_present:
        return
    last = past.number("SELECT max(id) FROM metric_samples WHERE iteration <= :n", n=past.moment.iteration)
    hour_us = past.ended_us // HOUR_US * HOUR_US
    is_untold = False
    for now in records_of(past, "metrics", MetricRecord):
        samples = past.rows(
            "SELECT at_us, value FROM metric_samples WHERE metric_id = :m AND id <= :last ORDER BY id",
            m=now.id,
            last=last,
        )
        later = past.rows(
            "SELECT 1 FROM metric_samples WHERE metric_id = :m AND id > :last LIMIT 1", m=now.id, last=last
        )
        if not later and not past.is_after(now.updated_us):
            continue
        hours = past.rows(
            "SELECT rowid, metric_id, hour_us, samples, total, least, most, last FROM metric_hours "
            "WHERE metric_id = :m ORDER BY hour_us",
            m=now.id,
        )
        over = [MetricHour(*row[1:]) for row in hours if row[2] < hour_us]
        gone = [row[0] for row in hours if row[2] >= hour_us]
        is_untold = is_untold or (bool(gone) and not samples)
        then = MetricRecord(now.id, now.channel, now.name, now.kind)
        for at_us, value in samples:
            if at_us >= hour_us:
                then.add(value, hour_us)
        if not then.hour_samples and over:  # the newest hour is the one that is not over
            newest = over.pop()
            gone += [row[0] for row in hours if row[2] == newest.hour_us]
            then.hour_us, then.hour_samples, then.hour_total = newest.hour_us, newest.samples, newest.total
            then.hour_least, then.hour_most, then.value = newest.least, newest.most, newest.last
        rewind.remove("metric_hours", *gone)
        if not then.hour_samples:
            rewind.remove("metrics", now.id)
            continue
        then.samples = then.hour_samples + sum(hour.samples for hour in over)
        then.total = within(then.hour_total + sum(hour.total for hour in over))
        then.updated_us, then.value = samples[-1] if samples else (then.hour_us, then.value)
        rewind.commit.metrics[now.id] = then
    if is_untold:
        rewind.untold.append("what metrics stood at within the hour: their samples of it were removed")
