"""Draw what :mod:`.classes` computes; style and saving are those of :mod:`.plots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .classes import CLASSES, DIRECTIONS, ClassPoint, ClassRoofline, ClassSummary
from .plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, figure_in_style, plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "forward": "forward",
    "dgrad": "gradient of the input",
    "wgrad": "gradient of the weight",
}
_BARS = {"forward": BLUE, "dgrad": ORANGE, "wgrad": GREEN}
_RIVAL = "PyTorch's kernel: same memory format, fixed order of sums, without benchmark mode."
# More classes than colours: a colour for each kind of work, a marker within it.
_LOOKS = {
    "first layers, 2-D": (RED, "o"),
    "first layers, 3-D": (RED, "s"),
    "patches": (PURPLE, "D"),
    "transposed, 2×2/2": (PURPLE, "v"),
    "depthwise": (GREEN, "o"),
    "grouped": (GREEN, "X"),
    "1-D": (GREEN, "^"),
    "3-D k×k×k": (SKY, "s"),
    "3-D 1×1×1": (SKY, "o"),
    "strided": (ORANGE, "P"),
    "k×k": (BLUE, "s"),
    "k×k, small maps": (BLUE, "v"),
    "1×1": (BLACK, "o"),
    "1×1, small maps": (BLACK, "v"),
    "1×1, one pixel": (BLACK, "s"),
}


def draw_classes(found: ClassSummary, caption: str) -> Figure:
    """Bars of the speed-up over PyTorch's kernel, a line where both are as fast."""
    rows = {(row.name, row.direction): row for row in found.rows}
    names = [name for name in CLASSES if any((name, d) in rows for d in DIRECTIONS)]
    with figure_in_style(7.4, 0.52 * len(names) + 1.9, f"{_RIVAL} {caption}") as figure:
        ax = figure.subplots()
        values = [v for row in found.rows for v in (row.generated, row.dispatched)] or [1.0]
        left, right = min(*values, 0.9) / 1.1, max(*values, 1.1) * 1.9
        for index, direction in enumerate(DIRECTIONS):
            chosen = [
                (place + 0.27 * (index - 1), rows[name, direction])
                for place, name in enumerate(names)
                if (name, direction) in rows
            ]
            ys = [y for y, _ in chosen]
            # From 1.0, so that on a logarithmic axis twice as fast is as long as half as fast.
            ax.barh(
                ys,
                [row.generated - 1 for _, row in chosen],
                height=0.25,
                left=1,
                color=_BARS[direction],
                label=f"{_TITLES[direction]}, best generated kernel",
            )
            ax.plot(
                [row.dispatched for _, row in chosen],
                ys,
                "D",
                color=BLACK,
                markerfacecolor="white",
                markersize=3.5,
                label="tuned call, PyTorch's kernel included" if index == 2 else None,
            )
            for y, row in chosen:
                ax.annotate(
                    f"{row.generated:.2f}  (n = {row.problems})",
                    (max(row.generated, row.dispatched, 1), y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=6.5,
                )
        ax.axvline(1, color=BLACK, linewidth=1)
        ax.set_xscale("log")
        ax.set_xlim(left, right)
        plain_ticks(ax.xaxis, [left, right])
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("PyTorch's time / ours, geometric mean (over 1: ours is faster)")
        figure.legend(loc="outside upper left", ncols=2, fontsize=7.5)
    return figure


def draw_roofline_of_classes(found: ClassRoofline, caption: str) -> Figure:
    """Both rivals of every problem under the roofs, one panel per product."""
    with figure_in_style(10.2, 5.0, f"{_RIVAL} {caption}") as figure:
        axes = figure.subplots(1, len(DIRECTIONS), sharex=True, sharey=True)
        for ax, direction in zip(axes, DIRECTIONS, strict=True):
            points = [point for point in found.points if point.direction == direction]
            _scatter(ax, points)
            ax.set_title(f"{_TITLES[direction]}, {len(points)} problems", loc="left")
            ax.set_xscale("log")
            ax.set_yscale("log")
        xs = [point.intensity for point in found.points] or [1.0]
        ys = [v for point in found.points for v in (point.generated, point.aten)] or [1.0]
        left, right = min(xs) / 1.6, max(xs) * 1.6
        bottom, top = min(ys) / 1.6, max(ys) * 1.6
        if found.bandwidth is not None and found.rates:
            right = max(right, 3 * max(found.rates.values()) / found.bandwidth)
            top = max(top, 2 * max(found.rates.values()) / 1e12)
            for ax in axes:
                _roofs(ax, found, left, right)
        axes[0].set_xlim(left, right)
        axes[0].set_ylim(bottom, top)
        plain_ticks(axes[0].xaxis, [left, right])
        plain_ticks(axes[0].yaxis, [bottom, top])
        axes[0].set_ylabel("TFLOP/s")
        axes[1].set_xlabel("floating-point operations per byte of compulsory traffic")
        handles: dict[str, Any] = {}
        for ax in axes:
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
        order = [name for name in (*CLASSES, "PyTorch's kernel") if name in handles]
        figure.legend(
            [handles[name] for name in order], order, loc="outside upper left", ncols=5,
            fontsize=7.5,
        )  # fmt: skip
    return figure


def _scatter(ax: Any, points: list[ClassPoint]) -> None:
    ax.plot(
        [point.intensity for point in points],
        [point.aten for point in points],
        "x",
        color=GREY,
        markersize=3.2,
        markeredgewidth=0.8,
        label="PyTorch's kernel",
    )
    for name in CLASSES:
        chosen = [point for point in points if point.name == name]
        if chosen:
            colour, marker = _LOOKS[name]
            ax.plot(
                [point.intensity for point in chosen],
                [point.generated for point in chosen],
                marker,
                color=colour,
                markersize=4,
                markeredgewidth=0,  # an edge of its own is a quarter of the file
                label=name,
            )


def _roofs(ax: Any, found: ClassRoofline, left: float, right: float) -> None:
    assert found.bandwidth is not None
    end = max(found.rates.values()) / found.bandwidth
    ax.plot(
        [left, end], [x * found.bandwidth / 1e12 for x in (left, end)], color=BLACK, linewidth=1.1
    )
    ax.annotate(
        f"{found.bandwidth / 1e12:.2f} TB/s",
        (end / 12, end / 12 * found.bandwidth / 1e12),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=7,
    )
    for kind, rate in found.rates.items():
        ax.plot([rate / found.bandwidth, right], [rate / 1e12] * 2, color=BLACK, linewidth=1.1)
        ax.annotate(
            f"{kind} {rate / 1e12:.0f} TFLOP/s",
            (right, rate / 1e12),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
