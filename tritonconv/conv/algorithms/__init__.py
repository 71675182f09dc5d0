"""The algorithms of convolution, in the fixed order in which ties are broken."""

from __future__ import annotations

from ...runtime.operators import Algorithm
from .aten import Aten
from .banded import Banded
from .banded_groups import BandedGroups
from .boxed import Boxed
from .boxed_operand import BoxedOperand
from .bundled import Bundled
from .bundled_weights import BundledWeights
from .dense import Dense
from .depthwise import Depthwise
from .few_channel import FewChannel
from .grouped import Grouped
from .packed_phases import PackedPhases
from .patchify import Patchify
from .pointwise import Pointwise
from .single_channel import SingleChannel
from .walked import Walked

ALGORITHMS: tuple[Algorithm, ...] = (
    Patchify(),
    SingleChannel(),
    FewChannel(),
    Depthwise(),
    Bundled(),
    BundledWeights(),
    Walked(),
    Pointwise(),
    Grouped(),
    Dense(),
    Boxed(),
    BoxedOperand(),
    Banded(),
    PackedPhases(),
    BandedGroups(),
    Aten(),
)
"""Most special first: the first that supports a problem is its untuned default."""
