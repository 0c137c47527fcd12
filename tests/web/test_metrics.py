"""`/metrics` as Prometheus reads it, by its own parsers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from ael_store import AgentBase
from ael_store.store.figures import Counted, Reached, news
from ael_store.store.plain_reader import PlainReader
from tests.loops import controller_on, rows
from tests.web.conftest import MARKUP, Site

ODD = 'a"b\\n'
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def families(text: str) -> dict[str, Any]:
    """Return the families of an answer; one that is told twice, or holds a series twice, would be refused."""
    found = list(parser.text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found)
    for family in found:
        told = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(set(told)) == len(told)
    return {family.name: family for family in found}


def value(family: Any, suffix: str = "", **labels: str) -> float:
    return float(next(s.value for s in family.samples if s.name == family.name + suffix and s.labels == labels))


def test_everything_is_told_with_hostile_names_as_labels_only(site: Site) -> None:
    answer = site.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    told = families(answer.text)

    deaf = "deaf " + MARKUP.replace("/", "|")
    assert value(told["ael_up"]) == 1
    assert value(told["ael_agent_errors"], "_total", agent=deaf) >= 1
    assert value(told["ael_agent_ticks"], "_total", agent="counter") > 0
    assert value(told["ael_pending_deliveries"], subscriber=deaf) == 0
    assert value(told["ael_dead_letters"], subscriber=deaf) == 1
    assert value(told["ael_metric"], channel="room " + MARKUP, name=ODD) == 0.5
    assert value(told["ael_metric_counter"], "_total", channel="counter", name="rounds") > 0
    timing = {"channel": "counter", "name": "work"}
    count = value(told["ael_metric_timing_seconds"], "_count", **timing)
    assert abs(value(told["ael_metric_timing_seconds"], "_sum", **timing) - 0.002 * count) < 1e-9
    assert value(told["ael_agents"], status="active") == 2
    assert value(told["ael_tasks"], status="failed") >= 0
    assert value(told["ael_database_size_bytes"]) > 10_000
    assert value(told["ael_tick_rate_seconds"]) == 0.05
    assert not [name for name in told if not name.replace("_", "").isalnum()]


def test_histograms_count_what_came_since_the_question_before(site: Site) -> None:
    def told() -> tuple[float, float, float, float]:
        found = families(site.get("/metrics").text)
        histogram = found["ael_iteration_duration_seconds"]
        below = [s.value for s in histogram.samples if s.name.endswith("_bucket")]
        assert below == sorted(below)
        assert below[-1] == value(histogram, "_count")
        return (
            value(found["ael_iterations"], "_total"),
            value(histogram, "_count"),
            value(found["ael_tick_duration_seconds"], "_count"),
            value(found["ael_loop_lag_seconds"], "_count"),
        )

    before = told()
    while (after := told())[0] < before[0] + 3:
        pass

    assert abs((after[1] - before[1]) - (after[0] - before[0])) <= 50  # the one figure is half a second old at most
    assert after[1] > before[1]
    assert after[2] > before[2]
    assert after[3] > before[3]


def test_answer_in_openmetrics_is_sound_too(site: Site) -> None:
    answer = site.get("/metrics", Accept=OPENMETRICS)

    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = [family.name for family in openmetrics.text_string_to_metric_families(answer.text)]
    assert "ael_iteration_duration_seconds" in names


def test_pages_and_json_show_what_agents_measure_as_text(site: Site) -> None:
    items = {(row["channel"], row["name"]): row for row in site.get("/api/v1/metrics").json["items"]}
    assert items["counter", "rounds"]["kind"] == "counter"
    samples = site.get("/api/v1/metrics/samples?channel=counter&name=load&limit=3").json["items"]
    assert [row["value"] for row in samples] == [row["iteration"] % 3 for row in samples]
    assert site.get("/api/v1/metrics/hours?channel=counter&name=load").json["items"][-1]["max"] == 2
    assert site.get("/api/v1/metrics/samples?channel=counter").status == 400

    page = site.page(f"/measurements?channel={quote('room ' + MARKUP)}&name={quote(ODD)}")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert 'data-chart="' in page
    assert 'id="measured"' in site.page("/agents/counter")
    assert site.get("/measurements?channel=a&name=b").status == 404


def test_answer_needs_a_token_where_it_is_not_asked_on_this_machine(site: Site) -> None:
    for path in ("/metrics", "/livez", "/readyz"):
        assert site.get(path, Host="evil.example").status == 421


class Busy(AgentBase):
    name = "busy"
    priority = 10

    async def on_tick(self, context: Any) -> None:
        context.increment("n")


async def test_news_are_each_row_once_and_begin_anew_with_another_database(tmp_path: Path) -> None:
    path = tmp_path / "ael.db"
    await controller_on(path, Busy()).run(iterations=30)
    reader = PlainReader(path)
    (last,) = rows(path, "SELECT max(id) FROM iterations")
    (total,) = rows(path, "SELECT sum(duration_us) / 1e6 FROM iterations")
    (ticks,) = rows(path, "SELECT count(*) FROM v_ticks WHERE kind = 'tick'")

    assert news(reader, None).iterations == Counted.none(news(reader, None).iterations.bounds)
    whole = news(reader, Reached(0, 0))
    first = news(reader, Reached(0, 0))
    assert (whole.iterations.count, whole.ticks.count) == (last, ticks)
    assert abs(whole.iterations.total - total) < 1e-6
    assert whole.lags.count >= last - 2
    assert news(reader, first.reached).iterations.count == 0
    assert news(reader, Reached(10**6, 10**6)).iterations.count == 0
    reader.close()


def test_long_names_are_cut_and_stay_different() -> None:
    from ael_store.web.metrics import _label

    one, other = _label("x" * 150 + "a"), _label("x" * 150 + "b")

    assert one != other
    assert len(one) < 140
    assert _label("kitchen") == "kitchen"
    assert "\u202e" not in _label("a\u202eb")
