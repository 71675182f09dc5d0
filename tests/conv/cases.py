"""Small problems of every kind, as the operators parse them."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]


def fields(**values: Any) -> Fields:
    """Named values of one problem."""
    return values


PROBLEMS: dict[str, Fields] = {
    "3x3": fields(N=2, C=10, M=7, H=5, W=7, K=3, P=1),
    "few channels": fields(N=2, C=3, M=5, H=6, W=5, K=3, P=1),
    "stem 7x7 stride 2": fields(N=1, C=3, M=4, H=13, W=11, K=7, S=2, P=3),
    "stride 2": fields(N=1, C=9, M=6, H=7, W=8, K=3, S=2, P=1),
    "stride 3x2, kernel 2x3": fields(N=1, C=4, M=5, H=9, W=8, K="2x3", S="3x2"),
    "kernel below stride": fields(N=1, C=9, M=4, H=8, W=7, K=1, S=2),
    "dilation 2": fields(N=1, C=9, M=4, H=7, W=8, K=3, P=2, dilation=2),
    "stride 2, dilation 2": fields(N=1, C=9, M=4, H=9, W=8, K=3, S=2, P=2, dilation=2),
    "stride 4, dilation 6": fields(N=1, C=9, M=4, H=15, W=14, K=3, S=4, P=1, dilation=6),
    "large padding": fields(N=1, C=9, M=4, H=4, W=3, K=3, P="4x3"),
    "1x1": fields(N=2, C=17, M=9, H=5, W=7, K=1),
    "1x1 map": fields(N=3, C=9, M=4, H=1, W=1, K=3, P=1),
    "patches": fields(N=2, C=3, M=6, H=8, W=12, K=4, S=4),
    "patches with a rest": fields(N=1, C=9, M=6, H=7, W=9, K="2x3", S="2x3"),
    "groups": fields(N=1, C=8, M=6, H=5, W=7, K=3, P=1, G=2),
    "groups, stride 2": fields(N=1, C=12, M=20, H=5, W=7, K=3, S=2, P=1, G=4),
    "narrow groups": fields(N=1, C=16, M=24, H=5, W=4, K=3, P=1, G=8),
    "depthwise": fields(N=2, C=6, M=6, H=5, W=7, K=3, P=1, G=6),
    "depthwise, multiplier, stride 2": fields(N=1, C=5, M=10, H=7, W=6, K="3x2", S=2, P=1, G=5),
    "depthwise, dilation": fields(N=1, C=3, M=3, H=9, W=8, K=3, P=2, dilation=2, G=3),
    "one of everything": fields(N=1, C=1, M=1, H=1, W=1, K=1),
    "row of 63": fields(N=1, C=9, M=3, H=1, W=63, K="1x3"),
    "3x3x3": fields(N=2, C=10, M=7, D=3, H=5, W=4, K=3, P=1),
    "few channels, stride 2, 3-D": fields(N=1, C=3, M=4, D=4, H=5, W=6, K=3, S=2, P=1),
    "an axis each": fields(
        N=1, C=9, M=5, D=5, H=6, W=7, K="2x3x1", S="2x1x3", P="1x0x2", dilation="1x2x1"
    ),
    "stride 2, dilation 2, 3-D": fields(N=1, C=9, M=4, D=7, H=6, W=5, K=3, S=2, P=2, dilation=2),
    "1x1x1": fields(N=2, C=17, M=9, D=2, H=3, W=5, K=1),
    "3-D patches": fields(N=2, C=3, M=6, D=4, H=6, W=4, K="2x3x2", S="2x3x2"),
    "3-D patches with a rest": fields(N=1, C=9, M=4, D=5, H=6, W=5, K=2, S=2),
    "groups, 3-D": fields(N=1, C=8, M=6, D=3, H=4, W=5, K="3x3x2", P="1x1x0", G=2),
    "few channels, 16 bits": fields(N=2, C=16, M=8, H=5, W=9, K=3, P=1, dtype="float16"),
    "few channels, 16 bits, 3-D": fields(
        N=1, C=8, M=24, D=4, H=5, W=7, K="3x2x3", P="1x0x2", dtype="float16"
    ),
    "narrow groups, 16 bits": fields(N=2, C=16, M=32, H=4, W=5, K=3, P=1, G=4, dtype="float16"),
    "narrow groups, 16 bits, 3-D": fields(
        N=1, C=16, M=16, D=3, H=4, W=5, K="3x2x3", P="1x0x2", G=2, dtype="float16"
    ),
    "depth of one": fields(N=1, C=9, M=6, D=1, H=5, W=4, K="1x3x3", P="0x1x1"),
}


def rank_of(case: Fields) -> int:
    """Number of spatial axes of a problem."""
    return 3 if "D" in case else 2


# One per algorithm, for the longer products with dtypes and configs.
KINDS = (
    "3x3",
    "few channels",
    "1x1",
    "patches",
    "groups",
    "narrow groups",
    "depthwise, multiplier, stride 2",
    "an axis each",
    "few channels, 16 bits",
    "narrow groups, 16 bits",
)
