"""What the hardware model drops, predicts, and how near its estimates are to compiled kernels."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import pytest
from landscapes import BESTS, Landscape, space_of

from tests.aot import start
from tritonconv.autotune.hardware import (
    SPILL_ALLOWANCE,
    Model,
    compiled_limits,
    limits,
)
from tritonconv.autotune.roofline import floor_us
from tritonconv.autotune.space import space
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import Direction
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.space import Footprint

H100 = nominal_device("sm_90")
LAYER: dict[str, Any] = {"N": 64, "C": 256, "M": 256, "H": 14, "K": 3, "P": 1, "dtype": "bfloat16"}
FITTING = Footprint(
    programs=1000,
    threads=128,
    shared_bytes=96 << 10,
    accumulators=64,
    bytes_loaded=1 << 30,
    bytes_stored=1 << 24,
    flops=1 << 36,
)


@pytest.mark.parametrize(
    ("change", "constraint", "words"),
    [
        ({"threads": 2048}, "threads", "2048 threads"),
        ({"shared_bytes": 256 << 10}, "shared memory", "about 256 KiB"),
        ({"accumulators": 512}, "registers", "512 registers"),
        ({"copied_rows": (64, 24)}, "copy engine", "rows of 24 bytes"),
    ],
)
def test_hard_limits_name_what_is_broken(
    change: dict[str, Any], constraint: str, words: str
) -> None:
    assert limits(FITTING, H100) == ()
    (violation,) = limits(dataclasses.replace(FITTING, **change), H100)
    assert violation.constraint == constraint and words in violation.reason


def test_amd_compilers_are_not_second_guessed() -> None:
    assert limits(FITTING, nominal_device("gfx942")) == ()


@dataclass(frozen=True)
class Resources:
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None


def test_compiled_kernels_are_judged_by_their_real_resources() -> None:
    assert compiled_limits(Resources(), H100, 256) == ()
    assert compiled_limits(Resources(200, SPILL_ALLOWANCE, 200 << 10), H100, 256) == ()
    broken = compiled_limits(Resources(255, 4000, 1 << 20), H100, 512)
    assert [violation.constraint for violation in broken] == [
        "spills",
        "shared memory",
        "registers",
    ]
    assert "4000 bytes" in broken[0].reason


def predicted(device: DeviceFacts = H100, **change: Any) -> float:
    model = Model.of(device, {"dtype": "bfloat16"}, 1 << 25)
    return model.predicted_us(dataclasses.replace(FITTING, **change))


def test_predictions_move_the_right_way() -> None:
    base = predicted()
    assert predicted(flops=1 << 38) > 2 * base
    assert predicted(bytes_loaded=1 << 36) > 2 * base
    assert predicted(launches=2) > base
    assert predicted(steps=500, in_flight=1) > predicted(steps=500, in_flight=3)
    assert predicted(nominal_device("sm_80")) > base
    # One block more than a full round of the multiprocessors costs as much as a whole round.
    heavy = {"flops": 1 << 40, "bytes_loaded": 0}
    full, more = predicted(programs=1320, **heavy), predicted(programs=1321, **heavy)
    assert 1.05 < more / full < 1.2
    assert predicted(programs=0) > 0


@pytest.mark.parametrize("direction", Direction)
def test_predictions_of_a_layer_stay_above_the_roofline(direction: Direction) -> None:
    operator = OPERATORS[direction, 2]
    problem = operator.parse(LAYER)
    found = space(operator, problem, H100)
    floor = floor_us(problem, H100)
    assert floor is not None
    times = [found.predicted[c.as_key()] for c in found.candidates if c.algorithm == "dense"]
    assert len(times) > 100 and floor < min(times) < 10 * floor
    assert max(times) > 2 * min(times)


def test_what_cannot_fit_is_dropped_but_never_the_default() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    problem = operator.parse(LAYER)
    small = dataclasses.replace(nominal_device("sm_86"), shared_bytes=1 << 10)
    found = space(operator, problem, small)
    assert found.default.algorithm == "dense" and len(found.candidates) == 2
    reasons = found.reasons()
    assert sum(reasons.values()) == len(found.dropped)
    # Without a copy engine there is only one config of products over boxes.
    assert reasons.pop(("boxed", "shared memory")) == 1
    assert set(reasons) == {("dense", "shared memory")}
    assert "a block may use 1" in found.dropped[0].reason
    whole = space(operator, problem, H100)
    assert 0 < len(whole.dropped) < len(whole.candidates)
    assert whole.hash != found.hash == space(operator, problem, small).hash
    dropped = {row.candidate for row in whole.dropped}
    for candidate in whole.candidates[:50]:
        around = whole.neighbours(candidate)
        assert set(around) <= set(whole.candidates) and not dropped & set(around)


def test_a_restricted_space_keeps_order_and_neighbours_inside() -> None:
    whole = space_of(Landscape(BESTS[0]))
    kept = whole.candidates[:100]
    part = whole.restricted({candidate.as_key() for candidate in kept})
    assert part.candidates == kept and part.default == whole.default
    assert set(part.neighbours(part.default)) <= set(kept)


def test_spaces_of_resnet_layers_are_built_quickly() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    problem = operator.parse(LAYER)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        space(operator, problem, H100)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.15  # 6 ms where nothing else runs


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Estimates and compiled figures of configs of many problems, for two targets."""
    found = {
        "sm_90": start("tests.autotune.aot_footprints", "sm_90", "6", "14"),
        "sm_86": start("tests.autotune.aot_footprints", "sm_86", "6", "3"),
    }
    return {target: future.result() for target, future in found.items()}


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_90", "sm_86"])
def test_estimated_shared_memory_is_what_is_compiled(compiled: Any, target: str) -> None:
    """Exactly for most, and never far above where it is near the limit and decides."""
    limit = compiled[target]["limit"]
    rows = compiled[target]["rows"]
    assert len(rows) >= 9 and all(row["threads"] for row in rows)
    above = [
        row
        for row in rows
        if row["estimated"] > 0.7 * limit and row["estimated"] > 1.1 * row["real"]
    ]
    assert above == []
    near = [row for row in rows if abs(row["estimated"] - row["real"]) <= 0.1 * row["real"]]
    assert len(near) >= 0.75 * len(rows)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_90", "sm_86"])
def test_a_hard_limit_never_drops_what_compiles_within_limits(compiled: Any, target: str) -> None:
    dropped = [row for row in compiled[target]["rows"] if row["dropped"]]
    assert len(dropped) >= 5
    limit = compiled[target]["limit"]
    wrong = [
        row
        for row in dropped
        if row["real"] <= limit and not ("registers" in row["dropped"] and row["spills"])
    ]
    assert wrong == []
