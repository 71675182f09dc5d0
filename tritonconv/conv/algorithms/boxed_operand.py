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
from .boxed_operand_products import EARLY, LATE, MOVED, PREFETCH, operand_plan, operands_of
from .boxed_space import BoxedConfig, boxed_footprint, boxed_space, has_copy_engine
from .boxed_views import unsuited, weight_rows


@dataclass(frozen=True)
class OperandConfig(BoxedConfig):
    """Tile of a product over boxes with an operand as large as the result.

    Attributes:
        fetch: when the operand is asked for: behind the product (0), before it into registers (1),
            before it into the L2 cache (2), the same by the copy engine (3).
    """

    fetch: int = LATE


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
        """A list: small tiles first, of which several fill a multiprocessor."""
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


# Rows, columns, depth, warps, stages, fetch. Two to four programs of a multiprocessor: while one
# of them waits for its operand or computes its epilogue, another one multiplies.
_TILES = (
    (128, 64, 64, 4, 3, PREFETCH),
    (128, 64, 64, 4, 3, EARLY),
    (64, 64, 64, 4, 3, PREFETCH),
    (128, 128, 64, 8, 3, PREFETCH),
    (128, 64, 64, 4, 3, LATE),
    (64, 64, 64, 4, 4, PREFETCH),
    (64, 128, 64, 4, 3, PREFETCH),
    (128, 64, 64, 4, 3, MOVED),
    (64, 64, 64, 4, 3, EARLY),
    (128, 128, 64, 8, 3, LATE),
    (64, 128, 64, 4, 3, EARLY),
    (128, 64, 64, 4, 2, PREFETCH),
    (128, 128, 64, 8, 2, PREFETCH),
    (128, 128, 64, 4, 3, PREFETCH),
    (256, 64, 64, 8, 3, PREFETCH),
    (64, 64, 64, 4, 3, LATE),
    (128, 64, 32, 4, 4, PREFETCH),
    (256, 128, 64, 8, 3, PREFETCH),
)


def _configs(problem: ConvProblem, device: DeviceFacts) -> list[OperandConfig]:
    base = boxed_space(problem, device).default
    plain = OperandConfig(**{**base.as_dict(), "split_k": 1, "one_launch": 0}, fetch=LATE)
    if not has_copy_engine(device):
        return [plain]
    forward = problem.direction is Direction.FORWARD
    columns = problem.out_channels if forward else problem.in_channels
    depth = problem.in_channels if forward else problem.out_channels
    found = [
        dataclasses.replace(
            plain, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages, fetch=fetch
        )
        for m, n, k, warps, stages, fetch in _TILES
        if n <= max(64, columns) and k <= max(plain.block_k, 32) and depth >= 16
    ]
    kept = [
        config
        for config in found
        if boxed_footprint(problem, config, device).shared_bytes <= device.shared_bytes - 1024
    ]
    return kept or [plain]
