from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from autotune_fakes import Aten, Fine, PlaybackTimer, Scale, ScaleProblem, VariantConfig
from landscapes import BESTS, Landscape, space_of, times_of, timing

from tritonconv.autotune.choose import choose, half_width, is_tied
from tritonconv.autotune.measure import first_round, summarize, take_turns
from tritonconv.autotune.search import (
    Budget,
    Effort,
    Failure,
    Outcome,
    Searched,
    Status,
    StrategyName,
    make_strategy,
    model_order,
    search,
    settled,
)
from tritonconv.autotune.space import Candidate, Space, space
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.tables import Timing

DEVICE = nominal_device("sm_90")
PROBLEM = ScaleProblem(100)


def _space(*algorithms: object) -> Space:
    return space(Scale(*algorithms), PROBLEM, DEVICE)  # type: ignore[arg-type]


def test_space_lists_the_default_first_and_says_why_an_algorithm_is_left_out() -> None:
    found = space(Scale(), PROBLEM, DEVICE)
    assert [c.algorithm for c in found.candidates] == ["vector"] * 3 + ["fine"] * 4 + ["aten"]
    assert found.default.config.as_dict() == {"block": 256, "num_warps": 4}
    assert [c.algorithm for c in found.heads] == ["vector", "fine", "aten"]
    assert found.unsupported == {"picky": "size is not a multiple of 1000003"}


LARGE = tuple(name for name in StrategyName if name is not StrategyName.EXHAUSTIVE)


def evaluating(
    outcome: Callable[[Candidate], Outcome],
) -> Callable[[Sequence[Candidate]], Iterator[tuple[Candidate, Outcome]]]:
    def evaluate(batch: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        for candidate in batch:
            yield candidate, outcome(candidate)

    return evaluate


def run(
    name: StrategyName,
    found: Space,
    outcome: Callable[[Candidate], Outcome],
    effort: Effort = Effort.QUICK,
    budget: Budget | None = None,
    **options: Any,
) -> Searched:
    strategy = make_strategy(name, found, effort, **options)
    return search(strategy, evaluating(outcome), budget)


def fastest(result: Searched) -> float:
    return min(found.p50 for _, found in result.outcomes if isinstance(found, Timing))


def test_small_spaces_are_tried_whole_in_order_and_heads_come_first() -> None:
    found = _space(Fine(), Aten())
    result = run(StrategyName.AUTO, found, lambda _: timing(1.0))
    tried = [candidate for candidate, _ in result.outcomes]
    assert set(tried) == set(found.candidates) and len(tried) == len(found.candidates)
    assert [str(c) for c in tried[:2]] == ["fine(variant=0)", "aten(variant=0)"]
    assert result.complete
    none = run(StrategyName.AUTO, found, lambda _: timing(1.0), Effort.NONE)
    assert [c.algorithm for c, _ in none.outcomes] == ["fine", "aten"]
    near = [found.candidates[-1].as_key()]
    alone = make_strategy(StrategyName.AUTO, found, Effort.NONE, nearest=near).ask()
    assert [c.algorithm for c in alone] == ["fine", "aten"]


@pytest.mark.parametrize("name", StrategyName)
def test_the_first_batch_needs_no_outcomes_and_holds_default_heads_and_nearest(
    name: StrategyName,
) -> None:
    found = space_of(Landscape(BESTS[0]))
    near = found.candidates[123].as_key()
    strategy = make_strategy(name, found, Effort.QUICK, nearest=[near, ("gone", ())], seed=3)
    first = strategy.ask()
    assert first == strategy.ask() and len(first) >= 8
    assert first[0] == found.default
    assert [c.algorithm for c in first[:2]] == ["landscape", "aten"]
    assert first[2].as_key() == near


@pytest.mark.parametrize("name", StrategyName)
@pytest.mark.parametrize("effort", Effort)
def test_strategies_keep_their_limits_and_ask_for_nothing_twice(
    name: StrategyName, effort: Effort
) -> None:
    found = space_of(Landscape(BESTS[1]))
    outcome = times_of(Landscape(BESTS[1]), broken=0.2)
    for most in (None, 1, 7):
        result = run(name, found, outcome, effort, max_configs=most)
        tried = [candidate for candidate, _ in result.outcomes]
        assert result.complete and len(set(tried)) == len(tried) and tried[0] == found.default
        if most is not None:
            assert len(tried) <= most
        elif effort is Effort.NONE:
            assert tried == list(found.heads)
        elif effort is Effort.QUICK and name is not StrategyName.EXHAUSTIVE:
            assert 16 <= len(tried) <= 64
        else:
            assert set(tried) == set(found.candidates)
        assert len(tried) <= make_strategy(name, found, effort, max_configs=most).planned
    with pytest.raises(TritonConvError, match="max_configs"):
        make_strategy(name, found, effort, max_configs=0)


@pytest.mark.parametrize("name", StrategyName)
def test_the_seed_alone_decides(name: StrategyName) -> None:
    found = space_of(Landscape(BESTS[2]))
    outcome = times_of(Landscape(BESTS[2]))
    runs = [run(name, found, outcome, seed=seed).outcomes for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert (runs[0] == runs[2]) == (name is StrategyName.EXHAUSTIVE)


@pytest.mark.parametrize("best", BESTS, ids=str)
@pytest.mark.parametrize("footprints", [True, False], ids=["model", "no model"])
def test_descent_comes_near_the_best_in_a_tenth_of_the_space(best: Any, footprints: bool) -> None:
    landscape = Landscape(best, footprints=footprints)
    found = space_of(landscape)
    outcome = times_of(landscape, broken=0.05)
    assert len(found.candidates) > 300
    optimum = fastest(run(StrategyName.EXHAUSTIVE, found, outcome))
    regrets = []
    for seed in range(5):
        result = run(StrategyName.DESCENT, found, outcome, Effort.FULL, seed=seed, max_configs=64)
        assert len(result.outcomes) <= 64
        regrets.append(fastest(result) / optimum)
    assert max(regrets) <= (1.08 if footprints else 1.12) and sorted(regrets)[2] <= 1.05


def test_descent_beats_random_and_the_model_orders_what_it_knows() -> None:
    regrets: dict[StrategyName, list[float]] = {}
    for best in BESTS:
        landscape = Landscape(best)
        found, outcome = space_of(landscape), times_of(landscape)
        optimum = fastest(run(StrategyName.EXHAUSTIVE, found, outcome))
        for name in (StrategyName.RANDOM, StrategyName.DESCENT):
            for seed in range(5):
                value = fastest(run(name, found, outcome, seed=seed)) / optimum
                regrets.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in regrets.items()}
    assert means[StrategyName.DESCENT] < means[StrategyName.RANDOM]
    ordered = [found.predicted.get(c.as_key()) for c in model_order(found)]
    known = [value for value in ordered if value is not None]
    assert known == sorted(known) and len(known) == len(found.candidates) - 1


def test_descent_looks_around_a_winner_of_a_near_problem_first() -> None:
    landscape = Landscape(BESTS[1], footprints=False)
    found, outcome = space_of(landscape), times_of(landscape)
    near = next(c for c in found.candidates if c.config == BESTS[1])
    strategy = make_strategy(StrategyName.DESCENT, found, Effort.QUICK, nearest=[near.as_key()])
    strategy.tell([(candidate, outcome(candidate)) for candidate in strategy.ask()])
    assert set(found.neighbours(near)) - {found.default} <= {*strategy.ask(), *found.heads}


@pytest.mark.parametrize("name", LARGE)
def test_failures_everywhere_end_a_search(name: StrategyName) -> None:
    found = space_of(Landscape(BESTS[0]))
    result = run(name, found, lambda _: Failure(Status.COMPILE, "no"))
    assert result.complete and 16 <= len(result.outcomes) <= 64


@pytest.mark.parametrize("name", StrategyName)
def test_a_search_stops_between_outcomes_when_its_budget_is_used_up(name: StrategyName) -> None:
    found = space_of(Landscape(BESTS[0]))
    outcome = times_of(Landscape(BESTS[0]))
    now, closed = 0.0, 0

    def evaluate(batch: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        nonlocal now, closed
        try:
            for candidate in batch:
                now += 1.0
                yield candidate, outcome(candidate)
        finally:
            closed += 1

    for seconds, count in ((0.0, 1), (10.0, 10), (20.0, 20)):
        strategy, closed = make_strategy(name, found, Effort.QUICK), 0
        result = search(strategy, evaluate, Budget(seconds), clock=lambda: now)
        assert not result.complete and len(result.outcomes) == count and closed
    few = run(name, found, outcome, budget=Budget(configs=5))
    assert len(few.outcomes) == 5 and not few.complete
    assert len(run(name, found, outcome, budget=Budget(configs=17)).outcomes) == 17
    everything = run(name, _space(Fine()), lambda _: timing(1.0), budget=Budget(configs=4))
    assert everything.complete and len(everything.outcomes) == 4


@pytest.mark.parametrize("name", StrategyName)
def test_a_strategy_is_settled_by_the_outcomes_of_an_earlier_run(name: StrategyName) -> None:
    found = space_of(Landscape(BESTS[3]))
    outcome = times_of(Landscape(BESTS[3]))
    known = {c.as_key(): o for c, o in run(name, found, outcome, seed=1).outcomes}
    assert settled(make_strategy(name, found, Effort.QUICK, seed=1), known)
    assert settled(make_strategy(name, found, Effort.NONE), known)
    known.popitem()
    assert not settled(make_strategy(name, found, Effort.QUICK, seed=1), known)


def test_failures_are_outcomes() -> None:
    failure = Failure(Status.COMPILE, "no")
    result = run(StrategyName.AUTO, _space(Fine()), lambda _: failure)
    assert [outcome for _, outcome in result.outcomes] == [failure] * 4


def test_a_tie_goes_to_the_first_and_a_clear_win_to_the_fastest() -> None:
    def at(time: float) -> Timing:
        return Timing(time, time * 0.999, time * 1.001, 100)

    assert choose([at(10.15), at(10.0)]).winner == 0  # type: ignore[union-attr]
    assert choose([at(10.3), at(10.0)]).winner == 1  # type: ignore[union-attr]
    assert choose([None, at(20.0)]).winner == 1  # type: ignore[union-attr]
    assert choose([None, None]) is None


def test_noisy_timings_widen_the_tie() -> None:
    loose, tight = Timing(11.0, 9.0, 13.0, 10), Timing(11.0, 10.99, 11.01, 10)
    best = Timing(10.0, 9.99, 10.01, 10)
    assert is_tied(loose, best) and not is_tied(tight, best)
    assert half_width(Timing(11.0, 9.0, 13.0, 1000)) < half_width(loose)


@pytest.mark.parametrize("noise", [0.001, 0.005, 0.02])
def test_repeated_measurements_choose_the_same_config(noise: float) -> None:
    """Configs within 1 %: by their medians alone the winner would change from run to run."""
    times = [10.05, 10.0, 10.02, 10.03, 14.0]
    handles = [VariantConfig(i) for i in range(len(times))]
    winners, fastest = set(), set()
    for seed in range(40):
        timer = PlaybackTimer(lambda c: times[c.variant], noise, random.Random(seed), [])  # type: ignore[attr-defined]
        timings = take_turns(timer, handles)
        winners.add(choose(timings).winner)  # type: ignore[union-attr]
        fastest.add(min(range(5), key=lambda i: timings[i].p50))
    assert winners == {0}
    assert noise < 0.01 or len(fastest) > 1  # what a plain minimum would have picked


def test_summaries_are_percentiles() -> None:
    timing = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing == Timing(p50=3.0, p20=1.8, p80=4.2, count=5)
    assert summarize([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_turns_rotate_the_order() -> None:
    order: list[int] = []

    class Recorder:
        def sample(self, handle: int, seconds: float) -> list[float]:
            order.append(handle)
            return [1.0, 1.0, 1.0]

    timings = take_turns(Recorder(), [0, 1, 2], turns=3)  # type: ignore[arg-type]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [timing.count for timing in timings] == [9, 9, 9]
    assert first_round(Recorder(), 0).count == 3  # type: ignore[arg-type]
