from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.operators import Algorithm, Config
from tritonconv.runtime.space import (
    Bool,
    Choice,
    ConfigSpace,
    Constraint,
    Derived,
    Int,
    PowerOfTwo,
    Violation,
)


@dataclass(frozen=True)
class Example(Config):
    block: int
    stages: int
    order: int
    flag: int
    split: int


def splits(block: int) -> tuple[int, ...]:
    return (block // 16, 2 * block // 16, 7)


@st.composite
def spaces(draw: st.DrawFn) -> ConfigSpace[Example]:
    """Spaces of all kinds of parameters, with arbitrary limits and any valid default."""
    low = draw(st.integers(4, 5))
    block = PowerOfTwo("block", 2**low, 2 ** (low + draw(st.integers(0, 3))))
    stages = Int("stages", 1, draw(st.integers(1, 5)), draw(st.integers(1, 2)))
    order = Choice("order", tuple(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))))
    parameters = (block, stages, order, Bool("flag"), Derived("split", splits))
    most, odd = draw(st.integers(16, 600)), draw(st.booleans())
    constraints = (
        Constraint("size", "too large", lambda block, stages: block * stages <= most),
        Constraint("odd", "odd stages want a flag", lambda stages, flag: not odd or stages != flag),
    )
    rows = [
        Example(b, s, o, f, p)
        for b in block.values
        for s in stages.values
        for o in order.values
        for f in (0, 1)
        for p in splits(b)
    ]
    valid = [r for r in rows if r.block * r.stages <= most and (not odd or r.stages != r.flag)]
    default = draw(st.sampled_from(valid or rows[:1]))
    return ConfigSpace(Example, parameters, constraints, default)


@settings(deadline=None)
@given(spaces())
def test_the_default_comes_first_and_every_other_config_is_valid(
    space: ConfigSpace[Example],
) -> None:
    configs = list(space)
    assert configs[0] == space[0] == space.default
    assert len(set(configs)) == len(configs) == len(space)
    assert all(space.explain(config) == () for config in configs[1:])
    assert all(config in space for config in configs)


@settings(deadline=None)
@given(spaces(), st.data())
def test_what_is_not_listed_is_explained(space: ConfigSpace[Example], data: st.DataObject) -> None:
    numbers = st.integers(0, 40)
    config = data.draw(st.builds(Example, st.sampled_from((16, 32, 64, 128, 5)), *[numbers] * 4))
    listed = config in list(space)
    assert (config in space) == listed
    if not listed:
        violations = space.explain(config)
        assert violations and all(v.constraint and v.reason for v in violations)


@settings(max_examples=30, deadline=None)
@given(spaces())
def test_steps_stay_inside_change_one_parameter_and_lead_back(space: ConfigSpace[Example]) -> None:
    listed = set(space)
    for config in list(space)[::3]:
        for other in space.neighbours(config):
            assert other in listed and other != config
            mine, theirs = config.as_dict(), other.as_dict()
            changed = {name for name in mine if mine[name] != theirs[name]}
            # The derived split follows the block.
            assert len(changed) == 1 or changed == {"block", "split"}
            assert config in space.neighbours(other)


@settings(deadline=None)
@given(spaces(), spaces())
def test_the_hash_is_that_of_the_configs(
    one: ConfigSpace[Example], two: ConfigSpace[Example]
) -> None:
    assert (one.hash == two.hash) == (list(one) == list(two))


def test_steps_skip_what_a_constraint_forbids() -> None:
    space = ConfigSpace(
        One,
        (Int("value", 0, 5),),
        (Constraint("gap", "no", lambda value: value not in (2, 3)),),
        One(0),
    )
    assert space.neighbours(One(1)) == (One(0), One(4))
    assert space.neighbours(One(2)) == (One(1), One(4))
    assert space.neighbours(One(77)) == ()


@dataclass(frozen=True)
class One(Config):
    value: int


def test_a_default_outside_the_constraints_is_still_first() -> None:
    never = Constraint("never", "nothing is allowed", lambda value: False)
    space = ConfigSpace(One, (Int("value", 0, 5),), (never,), One(3))
    assert list(space) == [One(3)] and One(3) in space
    assert space.explain(One(3)) == (Violation("never", "nothing is allowed"),)


def test_a_space_is_not_listed_for_its_default() -> None:
    def explode(value: int) -> bool:
        raise AssertionError("the space was listed")

    space = ConfigSpace(One, (Int("value", 0, 5),), (Constraint("x", "x", explode),), One(0))
    assert space[0] == One(0)


def test_configs_of_other_fields_are_refused() -> None:
    space = ConfigSpace(One, (Int("value", 0, 5),), (), One(0))
    (violation,) = space.explain(Example(1, 1, 1, 1, 1))
    assert violation.constraint == "fields" and Example(1, 1, 1, 1, 1) not in space
    (violation,) = space.explain(One(9))
    assert violation.reason == "value=9 is not one of 0, 1, 2, 3, 4, 5"
    with pytest.raises(TritonConvError, match="parameters"):
        ConfigSpace(One, (Int("other", 0, 5),), (), One(0))
    with pytest.raises(TritonConvError, match="powers of two"):
        PowerOfTwo("block", 3, 8)
    with pytest.raises(TritonConvError, match="distinct"):
        Choice("block", (1, 1))


class Listing(Algorithm):
    """As a family writes one that knows no typed space."""

    name: ClassVar[str] = "listing"
    config_type = One

    def supports(self, problem: Any) -> str | None:
        return None

    def configs(self, problem: Any, device: DeviceFacts) -> list[One]:
        return [One(value) for value in (8, 2, 32)]

    def plan(self, problem: Any, config: Any) -> None:
        return None


class Typed(Listing):
    name: ClassVar[str] = "typed"

    def space(self, problem: Any, device: DeviceFacts) -> ConfigSpace[One]:
        return ConfigSpace(One, (Choice("value", (1, 2)),), (), One(2))

    configs = Algorithm.configs  # type: ignore[assignment]


class Neither(Typed):
    space = Algorithm.space  # type: ignore[assignment]


def test_a_list_makes_a_space_and_a_space_a_list() -> None:
    device = nominal_device("sm_90")
    space = Listing().space(None, device)
    assert list(space) == [One(8), One(2), One(32)]
    assert space.neighbours(One(8)) == (One(2), One(32))
    assert space.neighbours(One(2)) == (One(8),)
    assert [v.constraint for v in space.explain(One(4))] == ["value", "listed"]
    assert list(Typed().configs(None, device)) == [One(2), One(1)]
    assert Listing().footprint(None, One(2), device) is None
    with pytest.raises(NotImplementedError, match="Neither"):
        Neither().configs(None, device)
    with pytest.raises(TritonConvError, match="at least one"):
        ConfigSpace.listed([])
