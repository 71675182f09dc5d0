from __future__ import annotations

import random

import pytest
from autotune_fakes import Aten, Fine, PlaybackTimer, Scale, ScaleProblem, VariantConfig

from tritonconv.autotune.choose import choose, half_width, is_tied
from tritonconv.autotune.measure import first_round, summarize, take_turns
from tritonconv.autotune.search import Budget, Effort, Failure, Status, schedule, search
from tritonconv.autotune.space import Space, space
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Timing

DEVICE = nominal_device("sm_90")
PROBLEM = ScaleProblem(100)


class Many(Fine):
    name = "many"
    variants = 200


def _space(*algorithms: object) -> Space:
    return space(Scale(*algorithms), PROBLEM, DEVICE)  # type: ignore[arg-type]


def test_space_lists_the_default_first_and_says_why_an_algorithm_is_left_out() -> None:
    found = space(Scale(), PROBLEM, DEVICE)
    assert [c.algorithm for c in found.candidates] == ["vector"] * 3 + ["fine"] * 4 + ["aten"]
    assert found.default.config.as_dict() == {"block": 256, "num_warps": 4}
    assert [c.algorithm for c in found.heads] == ["vector", "fine", "aten"]
    assert found.unsupported == {"picky": "size is not a multiple of 1000003"}


def test_small_spaces_are_tried_whole_in_order_and_heads_come_first() -> None:
    found = _space(Fine(), Aten())
    planned = schedule(found, Effort.QUICK)
    assert set(planned) == set(found.candidates)
    assert [str(c) for c in planned[:2]] == ["fine(variant=0)", "aten(variant=0)"]
    assert [c.algorithm for c in schedule(found, Effort.NONE)] == ["fine", "aten"]


def test_large_spaces_start_with_the_nearest_winner_and_go_on_in_a_seeded_order() -> None:
    found = _space(Many(), Aten())
    nearest = [("many", (("variant", 77),)), ("gone", (("variant", 1),))]
    planned = schedule(found, Effort.QUICK, nearest=nearest, seed=3)
    assert len(planned) == 64
    assert [str(c) for c in planned[:3]] == [
        "many(variant=0)",
        "aten(variant=0)",
        "many(variant=77)",
    ]
    assert planned == schedule(found, Effort.QUICK, nearest=nearest, seed=3)
    assert planned != schedule(found, Effort.QUICK, nearest=nearest, seed=4)
    assert len(schedule(found, Effort.FULL)) == 201
    assert len(schedule(found, Effort.FULL, max_configs=7)) == 7


def test_a_search_runs_on_a_recorded_table_within_its_budget() -> None:
    found = _space(Many())
    recorded = {c: Timing(float(i), i, i, 3) for i, c in enumerate(found.candidates)}
    ticks = iter(range(1000))
    result = search(found.candidates, recorded.__getitem__, Budget(10), clock=lambda: next(ticks))
    assert not result.complete and 1 < len(result.outcomes) <= 10
    assert search(found.candidates, recorded.__getitem__).complete
    few = search(found.candidates, recorded.__getitem__, Budget(configs=5))
    assert len(few.outcomes) == 5
    none = search(found.candidates, recorded.__getitem__, Budget(seconds=0.0))
    assert len(none.outcomes) == 1


def test_failures_are_outcomes() -> None:
    failure = Failure(Status.COMPILE, "no")
    found = _space(Fine())
    assert [o for _, o in search(found.candidates, lambda _: failure).outcomes] == [failure] * 4


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
