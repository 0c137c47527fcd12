"""`/metrics`: the loop in the form that Prometheus reads, made from what stands in the database.

So it works beside any loop, and where none runs, and counters go on over restarts of the server: they are totals of the
database. Only histograms begin with the server, whose first answer says where.

Whatever comes from users (names of agents, subscribers and metrics) is the value of a label and never part of a name.
It is cut where it is long, and of very many only the first are told, so that nobody's names break the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any
from zlib import crc32

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from ael_store.model.task import STATUSES
from ael_store.store.figures import LAG_S, SECONDS, Counted, Figures, Reached, figures, news
from ael_store.telemetry import printable
from ael_store.web.database import Database
from ael_store.web.service import service_of

__all__ = ["Exporter", "scrape"]

LABEL = 120
"""Characters of a label's value."""
MOST_SERIES = 2000
"""Series of one family; agents and metrics beyond are left out, and counted in `ael_left_out`."""

AGENT_STATUSES = ("active", "disabled", "quarantined", "absent")


class Exporter:
    """What has been counted since the server began."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = asyncio.Lock()
        self._reached: Reached | None = None
        self._iterations = Counted.none(SECONDS)
        self._ticks = Counted.none(SECONDS)
        self._lags = Counted.none(LAG_S)
        self._missed = 0

    async def collect(self, facts: dict[str, Any]) -> Collector:
        """Return what there is to tell now; `facts` are those of the overview."""
        async with self._lock:
            found = await self._database.read(lambda reader: news(reader, self._reached))
            self._reached = found.reached
            self._iterations.add(found.iterations)
            self._ticks.add(found.ticks)
            self._lags.add(found.lags)
            self._missed += found.missed
            stand = await self._database.read(figures)
            return _Told([*_of_loop(facts, stand), *self._histograms(), *_of_agents(stand), *_of_metrics(stand)])

    def _histograms(self) -> Iterator[Metric]:
        for name, about, counted in (
            ("ael_iteration_duration_seconds", "How long iterations took, without their commit.", self._iterations),
            ("ael_tick_duration_seconds", "How long ticks took that left a row in v_ticks.", self._ticks),
            ("ael_loop_lag_seconds", "How much later than their slot iterations of the clock began.", self._lags),
        ):
            buckets = [(f"{bound:g}", below) for bound, below in zip(counted.bounds, counted.below, strict=True)]
            yield HistogramMetricFamily(
                name, about, buckets=[*buckets, ("+Inf", counted.count)], sum_value=counted.total
            )
        yield CounterMetricFamily(
            "ael_missed_slots", "Slots of the clock that were lost, since the server began.", value=self._missed
        )


class _Told(Collector):
    """Families that were made already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_loop(facts: dict[str, Any], stand: Figures) -> Iterator[Metric]:
    """Yield what is told of the loop as a whole."""
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    yield gauge("ael_up", "1 where a loop holds the database.", value=facts["running"])
    yield gauge("ael_paused", "1 where the loop is paused.", value=facts["paused"])
    yield gauge(
        "ael_waiting_for_room", "1 where a commit waits for room.", value=facts["waiting_for_room_since"] is not None
    )
    if facts["tick_rate"] is not None:
        yield gauge("ael_tick_rate_seconds", "Period of the clock.", value=facts["tick_rate"])
    if stand.started_us is not None:
        yield gauge(
            "ael_last_iteration_timestamp_seconds",
            "When the last committed iteration began.",
            value=stand.started_us / 1e6,
        )
    yield counter("ael_iterations", "Committed iterations, over the life of the database.", value=facts["iteration"])
    yield counter("ael_events", "Events that were emitted.", value=stand.events)
    yield counter("ael_tasks_submitted", "Tasks and questions that were submitted.", value=stand.tasks_submitted)
    yield counter("ael_task_attempts", "Attempts at tasks that were begun.", value=stand.task_attempts)
    yield gauge("ael_state_keys", "Keys of the state.", value=facts["keys"])
    yield gauge("ael_database_size_bytes", "Size of the database file.", value=facts["size_bytes"])
    yield gauge("ael_wal_size_bytes", "Size of the write-ahead log.", value=facts["wal_bytes"])
    yield _by("ael_tasks", "Tasks that are not over or not taken up.", "status", facts["tasks"], STATUSES)
    yield _by("ael_agents", "Agents.", "status", facts["agents"], AGENT_STATUSES)
    kinds: dict[str, int] = {}
    for problem in facts["problems"]:
        kinds[problem["kind"]] = kinds.get(problem["kind"], 0) + 1
    yield _by("ael_problems", "What a person should look at: v_problems.", "kind", kinds)
    yield _by("ael_pending_deliveries", "Events that wait for a subscriber.", "subscriber", stand.pending)
    yield _by("ael_dead_letters", "Deliveries that were given up.", "subscriber", stand.dead_letters)


def _by(name: str, about: str, label: str, values: dict[str, int], always: Iterable[str] = ()) -> Metric:
    family = GaugeMetricFamily(name, about, labels=[label])
    for key, value in list({**dict.fromkeys(always, 0), **values}.items())[:MOST_SERIES]:
        family.add_metric([_label(key)], value)
    return family


def _of_agents(stand: Figures) -> Iterator[Metric]:
    """Yield the totals of each agent."""
    agents = stand.agents[:MOST_SERIES]
    for name, about, column in (
        ("ael_agent_ticks", "Successful ticks.", "ticks"),
        ("ael_agent_errors", "Units that ended in error or timeout.", "errors"),
        ("ael_agent_events_handled", "Events handled.", "events"),
        ("ael_agent_tick_seconds", "Seconds that ticks took, whatever their outcome.", "seconds"),
    ):
        family = CounterMetricFamily(name, about, labels=["agent"])
        for agent in agents:
            family.add_metric([_label(agent["name"])], agent[column])
        yield family
    left_out = GaugeMetricFamily("ael_left_out", "Agents and metrics that are too many to be told.", labels=["what"])
    left_out.add_metric(["agents"], len(stand.agents) - len(agents))
    left_out.add_metric(["metrics"], max(0, len(stand.metrics) - MOST_SERIES))
    yield left_out


def _of_metrics(stand: Figures) -> Iterator[Metric]:
    """Yield what agents measure, by kind."""
    labels = ["channel", "name"]
    gauges = GaugeMetricFamily("ael_metric", "Gauges that agents record.", labels=labels)
    counters = CounterMetricFamily("ael_metric_counter", "Counters that agents record.", labels=labels)
    timings = SummaryMetricFamily("ael_metric_timing_seconds", "Timings that agents record.", labels=labels)
    for row in stand.metrics[:MOST_SERIES]:
        told = [_label(row["channel"]), _label(row["name"])]
        if row["kind"] == "gauge":
            gauges.add_metric(told, row["value"])
        elif row["kind"] == "counter":
            counters.add_metric(told, row["value"])
        else:
            timings.add_metric(told, count_value=row["samples"], sum_value=row["total"])
    yield from (gauges, counters, timings)


def _label(text: str) -> str:
    """Return a text as the value of a label: two that differ stay different."""
    shown = printable(text)
    if shown == text and len(text) <= LABEL:
        return text
    return f"{shown[:LABEL]}…{crc32(text.encode()):08x}"


async def scrape(request: Request, values: dict[str, Any]) -> Response:
    """Answer in the format that is asked for: the text of Prometheus, or OpenMetrics."""
    service = service_of(request)
    state = request.app.state
    if not hasattr(state, "exporter"):
        state.exporter = Exporter(service.database)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(await state.exporter.collect(await service.facts.now()))
    encode, media_type = exposition.choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"content-type": media_type})
