"""`ael metrics`: list, show, export."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ael_store import AgentBase, connect
from tests.cli.conftest import Ael
from tests.loops import controller_on


class Sensor(AgentBase):
    name = "kitchen"
    priority = 10

    def on_tick(self, context):
        context.metrics.gauge("temperature", 20 + context.iteration / 8)
        context.metrics.count("reads", 2)
        context.metrics.timing("fetch", 0.25)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "ael.db"
    asyncio.run(controller_on(path, Sensor()).run(iterations=4))
    with connect(path) as client:
        client.push_metrics("a <b>", {"x {}": 1e300})
    return path


def test_list_says_what_each_metric_stands_at(ael: Ael, measured: Path) -> None:
    found = ael("metrics", "list", "--db", measured, "--json").json

    assert [(row["channel"], row["name"], row["kind"], row["value"], row["samples"]) for row in found] == [
        ("a <b>", "x {}", "gauge", 1e300, 1),
        ("kitchen", "fetch", "timing", 0.25, 4),
        ("kitchen", "reads", "counter", 8, 4),
        ("kitchen", "temperature", "gauge", 20.5, 4),
    ]
    lines = ael("metrics", "list", "kitchen", "--db", measured).out.splitlines()
    assert [line.split()[1:4] for line in lines[1:]] == [
        ["fetch", "timing", "0.25"],
        ["reads", "counter", "8"],
        ["temperature", "gauge", "20.5"],
    ]


def test_show_prints_samples_and_hours_oldest_first(ael: Ael, measured: Path) -> None:
    samples = ael("metrics", "show", "kitchen", "temperature", "--db", measured, "--limit", 3, "--json").json
    assert [(row["iteration"], row["value"], row["agent"]) for row in samples] == [
        (2, 20.25, "kitchen"),
        (3, 20.375, "kitchen"),
        (4, 20.5, "kitchen"),
    ]
    (hour,) = ael("metrics", "show", "kitchen", "reads", "--hours", "--db", measured, "--json").json[-1:]
    assert hour["total"] <= 8
    assert "0.25 s" in ael("metrics", "show", "kitchen", "fetch", "--db", measured).out
    assert "20.125" in ael("metrics", "show", "kitchen", "temperature", "--hours", "--db", measured).out


def test_what_is_not_there_is_refused_with_the_nearest_name(ael: Ael, measured: Path) -> None:
    channel = ael("metrics", "list", "kitchn", "--db", measured)
    metric = ael("metrics", "show", "kitchen", "temprature", "--db", measured)

    assert (channel.code, metric.code) == (2, 2)
    assert "no metric was recorded in channel 'kitchn'; did you mean kitchen?" in channel.err
    assert "there is no metric 'temprature' in channel 'kitchen'; did you mean kitchen temperature" in metric.err


def test_export_writes_every_sample(ael: Ael, measured: Path) -> None:
    lines = ael("metrics", "export", "--channel", "kitchen", "--name", "reads", "--db", measured).out.splitlines()

    assert len(lines) == 4
    assert '"value":2' in lines[0]


def test_size_counts_them(ael: Ael, measured: Path) -> None:
    tables = {row["name"]: row["rows"] for row in ael("db", "size", "--db", measured, "--json").json["tables"]}

    assert (tables["metrics"], tables["metric_samples"]) == (4, 13)
