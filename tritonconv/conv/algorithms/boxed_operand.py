"""Dense products over boxes whose epilogue reads a residual (sm_90 on)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .boxed_operand_products import AHEAD, EARLY, ENGINE, LATE, operand_plan, operands_of
from .boxed_space import BoxedConfig, boxed_footprint, boxed_space, has_copy_engine
from .boxed_views import unsuited, weight_rows
from .tiles import power_of_two


@dataclass(frozen=True)
class OperandConfig(BoxedConfig):
    """Tile of a product over boxes with an operand as large as the result.

    Attributes:
        fetch: when and how the operand is read: behind the product (0), before it into registers
            (1), behind it by the copy engine (2), the same with a request to the L2 cache before
            the product (3).
        engine_store: whether the copy engine writes the result.
    """

    fetch: int = LATE
    engine_store: int = 0


class BoxedOperand(Algorithm):
    """``boxed`` with an epilogue whose tensor of the result's layout is asked for ahead of time."""

    name: ClassVar[str] = "boxed_operand"
    config_type = OperandConfig
    sources = (
        "boxed_operand_products",
        "boxed_products",
        "boxed_space",
        "boxed_views",
        "common",
        "product_wgrad",
        "split",
        "tiles",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """What ``boxed`` serves, with an operand that lies in memory as the result does."""
        if problem.direction is Direction.WGRAD or operands_of(problem) is None:
            return "no operand of the epilogue has the strides of the result"
        reason = unsuited(problem)
        if reason is None and not weight_rows(problem):
            return "weight that is not channels_last"
        return reason

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[OperandConfig]:
        """A list, the fastest of an H100 first."""
        return ConfigSpace.listed(_configs(problem, device))

    def plan(self, problem: ConvProblem, config: OperandConfig) -> LaunchPlan:
        """One launch."""
        return operand_plan(problem, config)

    def footprint(
        self, problem: ConvProblem, config: OperandConfig, device: DeviceFacts
    ) -> Footprint | None:
        """Of the product and what the epilogue reads."""
        asked = boxed_footprint(problem, config, device)
        spec, operands = problem.epilogue, operands_of(problem)
        assert spec is not None and operands is not None
        item = spec.element_dtypes[operands.tile].itemsize
        extra = asked.programs * config.block_m * config.block_n * item
        return dataclasses.replace(asked, bytes_loaded=asked.bytes_loaded + extra)


# Rows, columns, depth, warps, stages, fetch, engine_store, in the order that an H100 gave: at
# most 128 rows, so that several programs share a multiprocessor (while one computes its epilogue,
# another one multiplies), and the operand not before the product is under way.
_NARROW = (
    (128, 64, 64, 4, 3, ENGINE, 1),
    (128, 64, 64, 4, 3, EARLY, 1),
    (128, 64, 64, 4, 3, LATE, 0),
    (256, 64, 64, 8, 2, ENGINE, 1),
    (128, 64, 64, 4, 3, AHEAD, 1),
    (64, 64, 64, 4, 3, ENGINE, 1),
    (64, 64, 64, 4, 3, EARLY, 1),
    (128, 64, 64, 4, 2, ENGINE, 1),
    (128, 64, 64, 4, 4, ENGINE, 1),
    (64, 64, 64, 4, 3, LATE, 0),
    (256, 64, 64, 8, 3, ENGINE, 1),
)
_WIDE = (
    (128, 128, 64, 8, 3, ENGINE, 1),
    (128, 128, 64, 4, 3, ENGINE, 1),
    (64, 128, 64, 4, 3, EARLY, 1),
    (128, 128, 64, 8, 3, EARLY, 1),
    (128, 128, 64, 4, 3, AHEAD, 1),
    (64, 128, 64, 4, 3, ENGINE, 1),
    (128, 128, 64, 8, 3, AHEAD, 1),
    (128, 64, 64, 4, 3, ENGINE, 1),
    (128, 128, 64, 8, 3, LATE, 0),
    (256, 128, 64, 8, 3, ENGINE, 1),
    (128, 256, 64, 8, 3, ENGINE, 1),
    (128, 128, 128, 8, 2, ENGINE, 1),
)


def fills(problem: ConvProblem, device: DeviceFacts) -> bool:
    """Whether the GPU has the engine, and the default enough tiles for its multiprocessors.

    The sum of a tile is not split: small maps are for others.
    """
    if not has_copy_engine(device):
        return False
    return _programs(problem, _configs(problem, device)[0], device) >= device.sm_count


def _programs(problem: ConvProblem, config: OperandConfig, device: DeviceFacts) -> int:
    return boxed_footprint(problem, config, device).programs


def _configs(problem: ConvProblem, device: DeviceFacts) -> list[OperandConfig]:
    base = boxed_space(problem, device).default
    plain = OperandConfig(**{**base.as_dict(), "split_k": 1, "one_launch": 0})
    if not has_copy_engine(device):
        return [plain]
    forward = problem.direction is Direction.FORWARD
    columns = problem.out_channels if forward else problem.in_channels
    depth = problem.in_channels if forward else problem.out_channels
    found = [
        dataclasses.replace(
            plain,
            block_m=m,
            block_n=n,
            block_k=min(k, power_of_two(depth, 16, 128)),
            num_warps=warps,
            num_stages=stages,
            fetch=fetch,
            engine_store=engine,
        )
        for m, n, k, warps, stages, fetch, engine in (_WIDE if columns > 64 else _NARROW)
    ]
    room = device.shared_bytes - 1024
    fitting = [c for c in found if boxed_footprint(problem, c, device).shared_bytes <= room]
    fitting.sort(key=lambda config: _programs(problem, config, device) < device.sm_count)
    return list(dict.fromkeys(fitting)) or [plain]
