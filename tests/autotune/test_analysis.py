"""Numbers behind the plots, against cases done by hand; and the lookup against the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from autotune_fakes import Scale
from synthetic import H100, entry, fill, pairs, record, timing, trial

from tritonconv.autotune import analysis, landscape
from tritonconv.autotune.replay import Curve, Point
from tritonconv.autotune.search import Status, StrategyName
from tritonconv.runtime import tables
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Entry, Tier, tuned_table

A, B, C = {"variant": 0}, {"variant": 1}, {"variant": 2}


def sized(size: int, *times: float, dtype: str = "float32", **changes: Any) -> Entry:
    """An entry of the fake operator: variants 0, 1, ... with these times."""
    trials = [trial("fine", {"variant": i}, us) for i, us in enumerate(times)]
    return entry(trials, problem={"size": size, "dtype": dtype}, **changes)


def test_geometric_mean() -> None:
    assert analysis.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert analysis.geomean([]) is None


def test_labels_say_what_is_special() -> None:
    (operator, problem), *_ = pairs("convnext_tiny", "n64 depthwise 96")
    dw = entry([trial("a", A, 1.0)], operator=operator.name, problem=problem.fields())
    assert analysis.label(dw) == "forward n64 96→96 56² k7 g96 fused"
    (operator, problem), *_ = pairs("resnet50", "n8 3-64")
    stem = entry([trial("a", A, 1.0)], operator=operator.name, problem=problem.fields())
    assert analysis.label(stem) == "forward n8 3→64 224² k7/2"
    assert analysis.label(sized(7, 1.0)) == "size=7 dtype=float32"


def test_sorted_timings_and_the_band_of_ties() -> None:
    one = entry(
        [
            trial("fine", A, 10.1),
            trial("fine", B, 10.0),
            trial("fine", C, None, Status.COMPILE, "no"),
            trial("vector", {"block": 64}, 9.0, Status.TIMED),
            trial("vector", {"block": 128}, 30.0),
        ]
    )
    found = analysis.sorted_timings(one)
    assert [(row.algorithm, row.p50_us, row.role) for row in found.rows] == [
        ("vector", 9.0, ""),
        ("fine", 10.0, "tied"),
        ("fine", 10.1, "best default"),
        ("vector", 30.0, ""),
    ]
    # The first round's 9.0 was not confirmed among the finalists: the band starts at 10.
    assert found.band_us == (10.0, pytest.approx(10.2))
    assert found.failed == {"compile": 1}


def test_marginals_hold_one_parameter_fixed() -> None:
    times = {(16, 2): 8.0, (16, 4): 4.0, (32, 2): 2.0, (32, 4): 6.0}
    one = entry([trial("v", {"b": b, "w": w, "k": 1}, us) for (b, w), us in times.items()])
    blocks, warps = landscape.marginals(one)
    assert (blocks.parameter, blocks.values, blocks.counts) == ("v.b", (16, 32), (2, 2))
    assert blocks.best == (2.0, 1.0) and blocks.typical == (3.0, 2.0)
    assert (warps.parameter, warps.best) == ("v.w", (1.0, 2.0))
    assert landscape.marginals(one, "other") == ()


def search(strategy: StrategyName, size: int, *points: tuple[float, float]) -> Curve:
    steps = tuple(Point(when, index + 1, us) for index, (when, us) in enumerate(points))
    return Curve(strategy, 0, "fake.scale", {"size": size}, steps, 1.0)


def test_best_so_far_is_the_geometric_mean_of_steps() -> None:
    name = StrategyName.RANDOM
    found = analysis.best_so_far(
        [
            search(name, 1, (1.0, 4.0), (3.0, 1.0)),
            search(name, 2, (2.0, 9.0), (4.0, 1.0)),
            search(StrategyName.MODEL, 1, (0.5, 1.0)),
        ]
    )
    random, model = found
    assert random.strategy == "random" and random.problems == 2
    # From 2 s on both have a timing: 4 and 9, then 1 and 9, then 1 and 1.
    assert [(t, pytest.approx(v)) for t, v in random.points] == [(2.0, 6.0), (3.0, 3.0), (4.0, 1.0)]
    assert random.at(1.9) is None and random.at(3.5) == pytest.approx(3.0)
    assert random.reaches(3.001) == 3.0 and random.reaches(0.9) is None
    assert model.points == ((0.5, 1.0),)


def test_speed_ups_over_contenders_and_over_fields() -> None:
    one = entry(
        [
            trial("fine", A, 12.0),
            trial("fine", B, 6.0),
            trial("aten", A, 9.0, Status.TIMED),
            trial("vector", {"block": 64}, None, Status.CRASH),
        ]
    )
    found = landscape.over_contenders([one, sized(128, 5.0)])
    assert found.columns == ("default", "fine", "aten")
    assert found.values == ((2.0, 1.0, 1.5), (1.0, 1.0, None))
    several = [
        sized(64, 8.0, 4.0),
        sized(64, 8.0, 1.0, sources={"fine": "source-2"}),
        sized(256, 3.0, 1.0, dtype="bfloat16"),
    ]
    grid = landscape.over_fields(several, "size", "dtype", "default")
    assert grid.rows == ("size 64", "size 256")
    assert grid.columns == ("dtype bfloat16", "dtype float32")
    assert grid.values == ((None, pytest.approx(4.0)), (pytest.approx(3.0), None))
    assert landscape.over_fields(several, "size", "height", "default").rows == ()


def test_the_roof_is_the_lower_of_bandwidth_and_rate() -> None:
    operator = Scale()
    one = sized(3030, 2e-3, 1e-3)
    found = landscape.roofline([one], H100, lambda e: operator.parse(e.problem))
    default, tuned = found.points
    assert (default.contender, tuned.contender) == ("default", "tuned")
    assert tuned.intensity == pytest.approx(1 / 8)  # one multiplication, eight bytes
    # 24,240 bytes at 3.03 TB/s take 8 ns; it took 1.
    assert tuned.of_roof == pytest.approx(8.0) and default.of_roof == pytest.approx(4.0)
    assert found.measured and list(found.rates) == ["float32"]


def test_lookup_takes_the_bucket_then_the_nearest() -> None:
    same, near, far = sized(100, 1.0), sized(200, 1.0), sized(5000, 1.0)
    entries = [far, near, same]
    assert analysis.look_up(entries, "fake.scale", {"size": 98, "dtype": "float32"}) == (
        Tier.BUCKET,
        same,
    )
    assert analysis.look_up(entries, "fake.scale", {"size": 300, "dtype": "float32"}) == (
        Tier.NEAREST,
        near,
    )
    assert analysis.look_up(entries, "fake.scale", {"size": 98, "dtype": "bfloat16"}) is None
    assert analysis.look_up(entries, "another", {"size": 98, "dtype": "float32"}) is None
    served = analysis.look_up(
        entries, "fake.scale", {"size": 300, "dtype": "float32"}, lambda t, f, o: False
    )
    assert served is None


def test_regret_when_an_entry_is_left_out() -> None:
    entries = [
        sized(100, 9.0, 3.0, 6.0),  # variant 1 wins
        sized(104, 8.0, 6.0, 4.0),  # variant 2 wins
        sized(9000, 5.0, 5.0, 1.0, dtype="bfloat16"),  # alone: the default
    ]
    found = analysis.leave_one_out(entries)
    first, second, third = found.rows
    # 100 and 104 share a bucket, so each would run the other's winner.
    assert (first.tier, first.ratio) == (Tier.BUCKET, pytest.approx(2.0))
    assert (second.tier, second.ratio) == (Tier.BUCKET, pytest.approx(1.5))
    assert (third.tier, third.ratio) == (Tier.DEFAULT, pytest.approx(5.0))
    assert found.counted == 3 and found.worst == pytest.approx(5.0)
    assert found.geomean == pytest.approx((2.0 * 1.5 * 5.0) ** (1 / 3))
    assert found.untuned == pytest.approx((3.0 * 2.0 * 5.0) ** (1 / 3))


def test_regret_counts_only_what_was_timed() -> None:
    found = analysis.leave_one_out([sized(100, 9.0, 3.0), sized(104, 8.0, 6.0, 4.0)])
    assert [row.ratio for row in found.rows] == [None, pytest.approx(1.5)]
    assert found.counted == 1 and found.geomean == pytest.approx(1.5)
    assert analysis.leave_one_out([]).geomean is None


def test_the_lookup_here_is_the_lookup_of_calls(cache: Path) -> None:
    """Leave each entry out of a real table in turn, and ask it."""
    tuned = [
        (operator, problem, record(operator, problem, most=6))
        for operator, problem in list(pairs("resnet50", "n8"))[::3]
    ]

    def serves(winner: Any, fields: Any, name: str) -> bool:
        operator: Operator = next(o for o, _, _ in tuned if o.name == name)
        problem: Problem = operator.parse(fields)
        return operator.algorithm(winner.algorithm).supports(problem) is None

    for index, (operator, problem, _) in enumerate(tuned):
        others = [one for _, _, one in tuned[:index] + tuned[index + 1 :]]
        place = cache / str(index)
        fill(place, others)
        with settings.override(cache_dir=place):
            tables.invalidate()
            real = tuned_table(H100).lookup(operator, problem)
        mine = analysis.look_up(others, operator.name, problem.fields(), serves)
        if real.tier not in (Tier.BUCKET, Tier.NEAREST):
            assert mine is None
            continue
        assert mine is not None
        tier, winner = mine
        assert tier is real.tier
        assert winner.best.algorithm == real.algorithm
        assert dict(winner.best.config) == real.config.as_dict()


def test_agreement_with_and_without_the_tie_break() -> None:
    # Sizes 1 and 2 in three runs; 1 % apart is tied, so the first variant wins whichever is faster.
    runs = [
        [sized(1, 10.0, 10.1), sized(2, 10.0, 5.0), sized(3, 1.0)],
        [sized(1, 10.1, 10.0), sized(2, 10.0, 5.0)],
        [sized(1, 10.0, 9.95), sized(2, 5.0, 10.0)],
    ]
    found = analysis.agreement(runs)
    first, second = found.rows
    assert first.chosen == (0, 0, 0) and first.fastest == (1, 0, 0)
    usual, other = ("fine", (("variant", 1),)), ("fine", (("variant", 0),))
    assert second.chosen == (0, 0, 1) and second.configs == (usual, other)
    assert (found.runs, found.left_out) == (3, 1)
    assert found.unanimous == 0.5 and found.modal == pytest.approx(5 / 6)
    assert found.unanimous_fastest == 0.0 and found.modal_fastest == pytest.approx(4 / 6)
    assert second.spread == pytest.approx(1.0)
    assert analysis.agreement([]).unanimous is None


def test_timings_of_the_first_round_do_not_count_as_fastest() -> None:
    one = entry([trial("fine", A, 10.0), trial("fine", B, 9.0, Status.TIMED)])
    assert analysis.fastest(one) == ("fine", (("variant", 0),))
    assert timing(10.0).p50 == 10.0
