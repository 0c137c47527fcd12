"""Which agents run in an iteration of the clock, under each strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ael_store import AgentBase, Scheduler
from ael_store.errors import InvalidSetting

PERIODS = {10: 1, 9: 2, 8: 2, 7: 2, 6: 3, 5: 3, 4: 5, 3: 5, 2: 10, 1: 10, 0: 10}


def crew(*priorities: int, prefix: str = "agent") -> list[AgentBase]:
    return [AgentBase(f"{prefix} {number}", priority=priority) for number, priority in enumerate(priorities)]


def names(agents: Iterable[AgentBase]) -> list[str]:
    return [agent.name for agent in agents]


def count_turns(
    scheduler: Scheduler,
    agents: Sequence[AgentBase],
    iterations: int,
    max_agents: int | None = None,
    costs: dict[str, float] | None = None,
) -> Counter[str]:
    """Run the clock and return how often each agent was chosen; `costs` are what its ticks take, in seconds."""
    turns: Counter[str] = Counter()
    for iteration in range(1, iterations + 1):
        for agent in scheduler.select_agents(agents, max_agents, iteration=iteration):
            turns[agent.name] += 1
            scheduler.record_execution(agent.name, 0.0 if costs is None else costs[agent.name])
    return turns


def restarted(scheduler: Scheduler) -> Scheduler:
    """Return a scheduler that goes on from what this one would leave in the database."""
    fresh = Scheduler(scheduler.strategy)
    fresh.budget_s = scheduler.budget_s
    scheduler._moved = True
    fresh.restore(scheduler.take_position(), scheduler.get_stats()["average_durations"])
    return fresh


@pytest.mark.parametrize("strategy", ["fastest", "Priority", "", None, 3])
def test_unknown_strategy_is_refused_with_the_names_that_exist(strategy: str) -> None:
    with pytest.raises(InvalidSetting, match="priority, round_robin, load_aware") as error:
        Scheduler(strategy)

    assert repr(strategy) in str(error.value)


# -- priority ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", range(11))
@pytest.mark.parametrize("start", [1, 7, 1000])
def test_agent_of_each_priority_runs_exactly_as_often_as_documented(priority: int, start: int) -> None:
    scheduler, (agent,) = Scheduler(), crew(priority)

    due = [number for number in range(start, start + 300) if scheduler.select_agents([agent], iteration=number)]

    assert len(due) == 300 // PERIODS[priority]
    assert {later - earlier for earlier, later in pairwise(due)} == {PERIODS[priority]}
    assert due == [number for number in range(start, start + 300) if scheduler.should_run_agent(agent, number)]


def test_agents_of_one_priority_are_spread_over_its_phases() -> None:
    scheduler, agents = Scheduler(), crew(*[1] * 100)

    sizes = [len(scheduler.select_agents(agents, iteration=number)) for number in range(1, 11)]

    assert sum(sizes) == 100
    assert all(3 <= size <= 20 for size in sizes)


def test_phase_depends_on_the_name_alone() -> None:
    one, two = (
        [names(Scheduler().select_agents(agents, iteration=number)) for number in range(1, 31)]
        for agents in (crew(3, 3, 3, 3), crew(3, 3, 3, 3))
    )
    alone = [names(Scheduler().select_agents(crew(3, 3, 3)[2:], iteration=number)) for number in range(1, 31)]

    assert one == two
    assert [["agent 2"] if "agent 2" in chosen else [] for chosen in one] == alone


def test_higher_priority_goes_first_and_equal_ones_in_order_of_registration() -> None:
    chosen = Scheduler().select_agents(crew(5, 10, 7, 10, 5, 0))

    assert names(chosen) == ["agent 1", "agent 3", "agent 2", "agent 0", "agent 4", "agent 5"]


def test_disabled_agents_are_never_chosen() -> None:
    agents = [AgentBase("off", enabled=False, priority=10), AgentBase("on", priority=10)]
    for strategy in ("priority", "round_robin", "load_aware"):
        assert names(Scheduler(strategy).select_agents(agents, iteration=1)) == ["on"]
        assert not Scheduler(strategy).should_run_agent(agents[0], 1)


def test_agent_cut_by_max_agents_stays_due_and_ages_ahead() -> None:
    scheduler, agents = Scheduler(), crew(10, 10, 9)

    turns = count_turns(scheduler, agents, 300, max_agents=1)

    assert sum(turns.values()) == 300
    assert min(turns.values()) >= 60


@given(
    priorities=st.lists(st.integers(0, 10), min_size=1, max_size=12),
    max_agents=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_priority_starves_nobody_for_any_max_agents(priorities: list[int], max_agents: int) -> None:
    agents = crew(*priorities)

    turns = count_turns(Scheduler(), agents, 300, max_agents)

    assert set(turns) == set(names(agents))
    assert min(turns.values()) >= 300 / 30


@given(priorities=st.lists(st.integers(0, 10), min_size=1, max_size=8), max_agents=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_priority_chooses_the_same_after_a_restart(priorities: list[int], max_agents: int) -> None:
    agents = crew(*priorities)
    one, other = Scheduler(), Scheduler()

    for number in range(1, 60):
        expected = names(one.select_agents(agents, max_agents, iteration=number))
        other = restarted(other)
        assert names(other.select_agents(agents, max_agents, iteration=number)) == expected


# -- round robin -------------------------------------------------------------------------------------


@given(size=st.integers(1, 9), max_agents=st.one_of(st.none(), st.integers(1, 12)), turns=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_round_robin_is_fair_for_any_max_agents(size: int, max_agents: int | None, turns: int) -> None:
    agents = crew(*range(size))

    counts = count_turns(Scheduler("round_robin"), agents, turns, max_agents)

    served = [counts[name] for name in names(agents)]
    assert max(served) - min(served) <= 1
    assert sum(served) == turns * min(size, max_agents or size)


def test_round_robin_ignores_priority() -> None:
    scheduler, agents = Scheduler("round_robin"), crew(0, 10, 5)

    order = [names(scheduler.select_agents(agents, 1, iteration=number)) for number in range(1, 7)]

    assert [name for chosen in order for name in chosen] == ["agent 0", "agent 1", "agent 2"] * 2


@given(size=st.integers(2, 8), max_agents=st.integers(1, 4), restarts=st.sets(st.integers(0, 29)))
@settings(max_examples=60, deadline=None)
def test_round_robin_position_survives_restarts(size: int, max_agents: int, restarts: set[int]) -> None:
    agents = crew(*[5] * size)
    one, other = Scheduler("round_robin"), Scheduler("round_robin")

    for number in range(30):
        if number in restarts:
            other = restarted(other)
        assert names(one.select_agents(agents, max_agents)) == names(other.select_agents(agents, max_agents))


@given(data=st.data(), max_agents=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_round_robin_serves_everyone_who_stays_through_changes_of_the_set(data: st.DataObject, max_agents: int) -> None:
    """Agents come and go at the end of the list, or are busy for a while; whoever is there all the time has turns."""
    everyone = crew(*[5] * 8)
    steady = everyone[:3]
    scheduler = Scheduler("round_robin")
    waited = dict.fromkeys(names(steady), 0)

    for _ in range(40):
        guests = data.draw(st.sets(st.sampled_from(range(3, 8)), max_size=5))
        present = [*steady, *(everyone[number] for number in sorted(guests))]
        chosen = names(scheduler.select_agents(present, max_agents))
        assert len(chosen) == len(set(chosen)) == min(max_agents, len(present))
        for name in waited:
            waited[name] = 0 if name in chosen else waited[name] + 1

    assert max(waited.values()) <= 2 * 8


def test_round_robin_goes_on_after_the_place_of_one_that_has_left() -> None:
    a, b, c, d = crew(5, 5, 5, 5)
    scheduler = Scheduler("round_robin")
    assert names(scheduler.select_agents([a, b, c, d], 2)) == ["agent 0", "agent 1"]

    assert names(scheduler.select_agents([a, c, d], 1)) == ["agent 2"]
    assert names(scheduler.select_agents([a, d], 1)) == ["agent 3"]
    assert names(scheduler.select_agents([a, b, c, d], 3)) == ["agent 0", "agent 1", "agent 2"]


# -- load aware --------------------------------------------------------------------------------------


def load_aware(budget_s: float) -> Scheduler:
    scheduler = Scheduler("load_aware")
    scheduler.budget_s = budget_s
    return scheduler


def test_load_aware_runs_all_while_all_fit_into_the_budget() -> None:
    agents = crew(0, 5, 10)

    turns = count_turns(load_aware(1.0), agents, 100, costs=dict.fromkeys(names(agents), 0.3))

    assert set(turns.values()) == {100}


def test_load_aware_runs_an_expensive_agent_less_often_and_cheap_ones_first() -> None:
    slow, fast = crew(5, 5)
    scheduler = load_aware(1.0)
    for _ in range(10):
        scheduler.record_execution(slow.name, 5.0)
        scheduler.record_execution(fast.name, 0.001)

    first = names(scheduler.select_agents([slow, fast], iteration=1))
    turns = count_turns(scheduler, [slow, fast], 1000, costs={slow.name: 5.0, fast.name: 0.001})

    assert fast.name in first
    assert turns[fast.name] > 900
    assert 0 < turns[slow.name] < 500


def test_load_aware_gives_time_in_proportion_to_priority() -> None:
    agents = crew(9, 4, 1, 0)
    cost = {"agent 0": 1.0, "agent 1": 2.0, "agent 2": 1.0, "agent 3": 0.5}

    turns = count_turns(load_aware(1.0), agents, 6000, costs=cost)

    time_s = {name: turns[name] * cost[name] for name in cost}
    unit_s = sum(time_s.values()) / (10 + 5 + 2 + 1)
    shares = [time_s[name] / unit_s for name in names(agents)]
    assert shares == pytest.approx([10, 5, 2, 1], rel=0.1)


@given(
    crew_of=st.lists(st.tuples(st.integers(0, 10), st.floats(0.0, 4.0)), min_size=1, max_size=8),
    max_agents=st.one_of(st.none(), st.integers(1, 3)),
)
@settings(max_examples=60, deadline=None)
def test_load_aware_starves_nobody(crew_of: list[tuple[int, float]], max_agents: int | None) -> None:
    agents = crew(*(priority for priority, _ in crew_of))
    costs = {agent.name: cost for agent, (_, cost) in zip(agents, crew_of, strict=True)}

    turns = count_turns(load_aware(0.5), agents, 3000, max_agents, costs)

    assert set(turns) == set(costs)


@given(costs=st.lists(st.floats(0.0, 2.0), min_size=2, max_size=8), budget_s=st.floats(0.01, 2.0))
@settings(max_examples=60, deadline=None)
def test_load_aware_keeps_to_its_budget_as_far_as_one_agent_allows(costs: list[float], budget_s: float) -> None:
    agents = crew(*[5] * len(costs))
    scheduler = load_aware(budget_s)
    for agent, cost in zip(agents, costs, strict=True):
        scheduler.record_execution(agent.name, cost)

    for number in range(50):
        chosen = names(scheduler.select_agents(agents, iteration=number))
        spent = [costs[int(name.split()[1])] for name in chosen]
        assert chosen
        assert len(chosen) == len(set(chosen))
        assert len(spent) == 1 or sum(spent) <= budget_s + 1e-9


def test_load_aware_gives_a_newcomer_no_more_than_its_share() -> None:
    agents = crew(5, 5)
    scheduler = load_aware(1.0)
    costs = dict.fromkeys([*names(agents), "late 0"], 1.0)
    count_turns(scheduler, agents, 500, costs=costs)

    turns = count_turns(scheduler, [*agents, *crew(5, prefix="late")], 300, costs=costs)

    assert max(turns.values()) - min(turns.values()) <= 3


def test_load_aware_goes_on_with_its_shares_after_a_restart() -> None:
    agents = crew(9, 0)
    costs = dict.fromkeys(names(agents), 1.0)
    scheduler = load_aware(1.0)
    turns: Counter[str] = Counter()

    for _ in range(110):
        turns += count_turns(scheduler, agents, 10, costs=costs)
        scheduler = restarted(scheduler)

    assert turns["agent 1"] == pytest.approx(100, abs=10)


# -- measuring ---------------------------------------------------------------------------------------


def test_record_execution_takes_finite_lengths_only() -> None:
    scheduler = Scheduler()
    for seconds in (0.5, float("nan"), float("inf"), -1.0, 0.5):
        scheduler.record_execution("a", seconds)

    stats = scheduler.get_stats()
    assert stats["execution_counts"] == {"a": 2}
    assert stats["total_executions"] == 2
    assert stats["average_durations"] == {"a": 0.5}
    assert stats["strategy"] == "priority"


def test_reset_forgets_everything() -> None:
    agents = crew(5, 5, 5)
    for strategy in ("priority", "round_robin", "load_aware"):
        scheduler = Scheduler(strategy)
        first = [names(scheduler.select_agents(agents, 1, iteration=number)) for number in range(1, 8)]
        scheduler.record_execution("agent 0", 9.0)
        scheduler.reset()

        assert [names(scheduler.select_agents(agents, 1, iteration=number)) for number in range(1, 8)] == first
        assert scheduler.get_stats()["total_executions"] == 0


def test_wrong_position_of_another_strategy_is_ignored() -> None:
    for strategy in ("priority", "round_robin", "load_aware"):
        scheduler = Scheduler(strategy)
        scheduler.restore('{"something": "else"}', {})
        assert scheduler.select_agents(crew(10), iteration=1)
