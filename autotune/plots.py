"""Draw what :mod:`.analysis` and :mod:`.landscape` compute: one function per plot.

Every function takes numbers and a caption and gives a figure; :func:`save` writes it. Colours are
those of Okabe and Ito, which the colour-blind can tell apart, and nothing is told by colour alone.
matplotlib comes with the extra ``demo``.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analysis import Agreement, RegretSummary, SortedTimings, StrategyCurve, geomean
from .extras import need
from .landscape import HeatMap, Marginal, Roofline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY, BLACK = "#56B4E9", "#CC79A7", "#8C8C8C", "#222222"
_CYCLE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS = 9
"""Most problems in one plot of sorted timings."""

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "tritonconv",
    "figure.facecolor": "white",
}


def matplotlib() -> Any:
    """The drawing library.

    Raises:
        MissingExtraError: the extra ``demo`` is not installed.
    """
    return need("matplotlib", "drawing plots", "tritonconv[demo]")


@contextmanager
def figure_in_style(width: float, height: float, caption: str) -> Iterator[Figure]:
    """A figure in our style with the caption below it."""
    with matplotlib().rc_context(_STYLE):
        figure_class = need("matplotlib.figure", "drawing plots", "tritonconv[demo]").Figure
        figure: Figure = figure_class(figsize=(width, height), layout="constrained")
        yield figure
        lines = textwrap.fill(caption, max(40, int(width * 17)))
        figure.supxlabel(lines, fontsize=7, color="#666666", x=0.01, ha="left")


def save(figure: Figure, path: Path, form: str) -> Path:
    """Write a figure; a reader sees the old file or the new one.

    Args:
        figure: what to write.
        path: where to.
        form: ``png`` or ``svg``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Without a date the same numbers give the same file.
    metadata = {"Date": None} if form == "svg" else None
    with matplotlib().rc_context(_STYLE):
        figure.savefig(temporary, format=form, dpi=160, metadata=metadata)
    os.replace(temporary, path)
    return path


def draw_best_so_far(curves: Sequence[StrategyCurve], caption: str) -> Figure:
    """Best time so far over the best in the recorded table, against wall time per problem."""
    with figure_in_style(6.4, 3.8, caption) as figure:
        ax = figure.subplots()
        end = max((curve.points[-1][0] for curve in curves), default=1.0)
        for index, curve in enumerate(curves):
            times = [t for t, _ in curve.points] + [end]
            values = [v for _, v in curve.points] + [curve.points[-1][1]]
            ax.step(
                times,
                values,
                where="post",
                color=_CYCLE[index % len(_CYCLE)],
                linestyle=_DASHES[index % len(_DASHES)],
                linewidth=1.7,
                label=curve.strategy,
            )
        ax.axhline(1, color=BLACK, linewidth=0.8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_ticks(ax.yaxis, [v for curve in curves for _, v in curve.points])
        plain_ticks(ax.xaxis, [t for curve in curves for t, _ in curve.points])
        ax.set_xlabel("compiling and measuring, seconds per problem")
        ax.set_ylabel("best so far / best of all configs")
        ax.legend(loc="upper right")
        problems = max((curve.problems for curve in curves), default=0)
        ax.set_title(f"Search strategies, geometric mean over {problems} problems", loc="left")
    return figure


def draw_sorted(found: Sequence[SortedTimings], caption: str) -> Figure:
    """All timed configs of each problem, fastest first, with the band of ties."""
    shown = found[:PANELS]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    with figure_in_style(3.3 * columns + 0.6, 2.7 * lines + 0.5, caption) as figure:
        axes = figure.subplots(lines, columns, squeeze=False)
        for ax in axes.flat[len(shown) :]:
            ax.remove()
        for ax, timings in zip(axes.flat, shown, strict=False):
            rows = timings.rows
            ranks = range(1, len(rows) + 1)
            low, high = timings.band_us
            ax.axhspan(low, high, color=SKY, alpha=0.35, linewidth=0, label="tie band, 2 %")
            ax.vlines(
                ranks,
                [row.p20_us for row in rows],
                [row.p80_us for row in rows],
                color="#BBBBBB",
                linewidth=1,
                label="p20 to p80",
            )
            ax.plot(ranks, [row.p50_us for row in rows], ".", color=GREY, markersize=3)
            for role, marker, colour, size, text in (
                ("tied", "o", BLUE, 4, "tied"),
                ("default", "s", ORANGE, 9, "default"),
                ("best", "*", RED, 10, "chosen"),
            ):
                picked = [(i, r.p50_us) for i, r in zip(ranks, rows, strict=True) if role in r.role]
                if picked:
                    ax.plot(
                        [i for i, _ in picked],
                        [us for _, us in picked],
                        marker,
                        color=colour,
                        markersize=size,
                        markerfacecolor="none" if role == "default" else colour,
                        markeredgecolor=colour if role == "default" else "white",
                        markeredgewidth=1.6 if role == "default" else 0.5,
                        label=text,
                    )
            ax.set_yscale("log")
            plain_ticks(ax.yaxis, [row.p50_us for row in rows])
            failed = sum(timings.failed.values())
            note = f", {failed} failed" if failed else ""
            ax.set_title(f"{timings.problem}\n{len(rows)} timed{note}", loc="left")
        for ax in axes[-1]:
            ax.set_xlabel("rank")
        for row_axes in axes:
            row_axes[0].set_ylabel("time, µs")
        axes.flat[0].legend(loc="upper left", handletextpad=0.3)
    return figure


def draw_marginals(problem: str, found: Sequence[Marginal], caption: str) -> Figure:
    """The best and the median time by each parameter of the winner's algorithm."""
    columns = min(4, max(len(found), 1))
    lines = max(1, math.ceil(len(found) / columns))
    with figure_in_style(2.3 * columns + 0.6, 2.3 * lines + 0.6, caption) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for ax in axes.flat[len(found) :]:
            ax.remove()
        for ax, marginal in zip(axes.flat, found, strict=False):
            places = range(len(marginal.values))
            ax.plot(places, marginal.typical, "s--", color=GREY, markersize=4, label="median")
            ax.plot(places, marginal.best, "o-", color=BLUE, markersize=5, label="best")
            ax.set_xticks(list(places), [str(value) for value in marginal.values])
            ax.margins(x=0.15)
            ax.set_yscale("log")
            ax.set_xlabel(marginal.parameter.partition(".")[2])
        values = [v for m in found for v in (*m.best, *m.typical)]
        if values:
            plain_ticks(axes.flat[0].yaxis, values)
            axes.flat[0].legend(loc="best")
        for row_axes in axes:
            row_axes[0].set_ylabel("time / best")
        algorithm = found[0].parameter.partition(".")[0] if found else ""
        figure.suptitle(f"{problem}, {algorithm}", x=0.01, ha="left", fontsize=9)
    return figure


def draw_roofline(found: Roofline, caption: str) -> Figure:
    """Tuned problems and their defaults under the measured roofs."""
    with figure_in_style(6.4, 4.4, caption) as figure:
        ax = figure.subplots()
        points = found.points
        xs = [point.intensity for point in points] or [1.0]
        left, right = min(xs) / 2, max(xs) * 2
        kinds = list(dict.fromkeys(point.arithmetic for point in points))
        if found.bandwidth is not None and found.rates:
            ridges = [rate / found.bandwidth for rate in found.rates.values()]
            right = max(right, 3 * max(ridges))
            top = max(found.rates.values()) / found.bandwidth
            ends = [left, top]
            ax.plot(ends, [x * found.bandwidth / 1e12 for x in ends], color=BLACK, linewidth=1.2)
            ax.annotate(
                f"{found.bandwidth / 1e12:.2f} TB/s",
                (left, left * found.bandwidth / 1e12),
                xytext=(14, 2),
                textcoords="offset points",
                fontsize=8,
            )
            for kind, rate in found.rates.items():
                ax.plot(
                    [rate / found.bandwidth, right], [rate / 1e12] * 2, color=BLACK, linewidth=1.2
                )
                ax.annotate(
                    f"{kind} {rate / 1e12:.0f} TFLOP/s",
                    (right, rate / 1e12),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
        by_problem: dict[tuple[str, float], dict[str, float]] = {}
        for point in points:
            by_problem.setdefault((point.problem, point.intensity), {})[point.contender] = (
                point.tflops
            )
        for (_, intensity), rates in by_problem.items():
            if len(rates) == 2:
                ax.plot([intensity] * 2, list(rates.values()), color="#CCCCCC", linewidth=0.8)
        for index, kind in enumerate(kinds):
            for contender, filled in (("default", False), ("tuned", True)):
                chosen = [p for p in points if p.arithmetic == kind and p.contender == contender]
                colour = _CYCLE[index % len(_CYCLE)]
                ax.plot(
                    [p.intensity for p in chosen],
                    [p.tflops for p in chosen],
                    _MARKERS[index % len(_MARKERS)],
                    color=colour,
                    markerfacecolor=colour if filled else "white",
                    markersize=4.5,
                    label=f"{kind}, {contender}" if len(kinds) > 1 else contender,
                )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(left, right)
        plain_ticks(ax.xaxis, [left, right])
        plain_ticks(ax.yaxis, ax.get_ylim())
        ax.set_xlabel("floating-point operations per byte of compulsory traffic")
        ax.set_ylabel("TFLOP/s")
        ax.legend(loc="lower right")
        share = geomean(p.of_roof for p in points if p.of_roof and p.contender == "tuned")
        if share is None:
            title = "No ceilings are known for this device"
        else:
            source = "measured roofs" if found.measured else "datasheet roofs"
            title = f"Tuned: {100 * share:.0f} % of the roof in the geometric mean ({source})"
        ax.set_title(title, loc="left")
    return figure


def draw_heat_map(found: HeatMap, title: str, caption: str) -> Figure:
    """A matrix of speed-ups; blue where the tuned kernel is faster, red where slower."""
    rows, columns = len(found.rows), len(found.columns)
    names = max((len(row) for row in found.rows), default=0)
    width = 0.068 * names + 0.75 * columns + 1.6
    with figure_in_style(max(width, 5.0), 0.24 * rows + 1.8, caption) as figure:
        ax = figure.subplots()
        cells = [[math.nan if v is None else math.log2(v) for v in row] for row in found.values]
        known = [abs(v) for row in cells for v in row if not math.isnan(v)]
        # Beyond fourfold the colour says no more: one slow rival must not pale all the others.
        limit = min(max([*known, 0.1]), 2.0)
        image = ax.imshow(cells, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        ax.grid(False)
        ax.set_xticks(range(columns), found.columns, rotation=30, ha="right")
        ax.set_yticks(range(rows), found.rows)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        for y, row in enumerate(found.values):
            for x, value in enumerate(row):
                if value is not None:
                    dark = abs(math.log2(value)) > 0.6 * limit
                    text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
                    colour = "white" if dark else BLACK
                    ax.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        bar = figure.colorbar(image, ax=ax, shrink=min(1.0, 8 / max(rows, 1)), pad=0.02)
        steps = [s for s in (0.25, 0.5, 0.8, 1, 1.25, 2, 4) if abs(math.log2(s)) <= limit + 1e-9]
        bar.set_ticks([math.log2(s) for s in steps], labels=[f"{s:g}×" for s in steps])
        bar.outline.set_visible(False)
        ax.set_title(title, loc="left")
    return figure


def draw_regret(found: RegretSummary, caption: str) -> Figure:
    """Regret of every problem had it not been tuned itself, sorted, by the tier that serves it."""
    with figure_in_style(6.4, 3.8, caption) as figure:
        ax = figure.subplots()
        counted = [(row, row.ratio) for row in found.rows if row.ratio is not None]
        counted.sort(key=lambda item: item[1])
        tiers = list(dict.fromkeys(str(row.tier) for row, _ in counted))
        for index, tier in enumerate(sorted(tiers)):
            chosen = [(i, r) for i, (row, r) in enumerate(counted, 1) if str(row.tier) == tier]
            ax.plot(
                [i for i, _ in chosen],
                [r for _, r in chosen],
                _MARKERS[index],
                color=_CYCLE[index],
                markersize=5,
                label=f"{tier} ({len(chosen)})",
            )
        ax.axhline(1, color=BLACK, linewidth=0.8)
        if found.geomean is not None:
            ax.axhline(found.geomean, color=GREY, linestyle="--", linewidth=1)
            ax.annotate(
                f"geometric mean {found.geomean:.3f}",
                (1, found.geomean),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
            )
        if counted:
            row, worst = counted[-1]
            ax.annotate(
                f"{row.problem}: {worst:.2f}",
                (len(counted), worst),
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
            )
        ax.set_yscale("log")
        plain_ticks(ax.yaxis, [r for _, r in counted] or [1.0])
        ax.set_xlabel("problem, by regret")
        ax.set_ylabel("time as looked up / time as tuned")
        ax.legend(loc="upper left", title="served by", title_fontsize=8)
        missing = len(found.rows) - found.counted
        note = f"; {missing} more not timed with what was looked up" if missing else ""
        ax.set_title(f"Never tuned against tuned, {found.counted} problems{note}", loc="left")
    return figure


def draw_agreement(found: Agreement, caption: str) -> Figure:
    """Which config each repeated tune picked: with the tie-break and without."""
    rows = found.rows
    names = max((len(row.problem) for row in rows), default=0)
    width = 0.066 * names + 2 * (0.24 * found.runs) + 1.6
    with figure_in_style(max(width, 5.5), 0.22 * len(rows) + 1.9, caption) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        colours = ["#E8EDF1", BLUE, RED, GREEN, PURPLE, BLACK]  # the usual pick is pale
        palette = need("matplotlib.colors", "drawing plots", "tritonconv[demo]")
        for ax, picks, share, title in (
            (axes[0], [row.chosen for row in rows], found.unanimous, "with the tie-break"),
            (axes[1], [r.fastest for r in rows], found.unanimous_fastest, "least median alone"),
        ):
            cells = [[min(number, len(colours) - 1) for number in row] for row in picks]
            if cells:
                ax.imshow(
                    cells,
                    cmap=palette.ListedColormap(colours),
                    vmin=-0.5,
                    vmax=len(colours) - 0.5,
                    aspect="auto",
                )
            for y, row in enumerate(picks):
                for x, number in enumerate(row):
                    if number:
                        ax.text(
                            x, y, chr(65 + number), ha="center", va="center", fontsize=7,
                            color="white",
                        )  # fmt: skip
            ax.grid(False)
            ax.set_xticks([run + 0.5 for run in range(found.runs - 1)], minor=True)
            ax.set_yticks([line + 0.5 for line in range(len(rows) - 1)], minor=True)
            ax.grid(True, which="minor", color="white", linewidth=1.2)
            ax.tick_params(which="both", length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
            ax.set_xticks(range(found.runs), [str(run + 1) for run in range(found.runs)])
            ax.set_xlabel("run")
            percent = "-" if share is None else f"{100 * share:.0f} %"
            ax.set_title(f"{title}\nall runs agree: {percent} of problems", loc="left")
        axes[0].set_yticks(range(len(rows)), [row.problem for row in rows])
    return figure


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Round numbers, written plainly, on a logarithmic axis that may span little or much."""
    ticker = need("matplotlib.ticker", "drawing plots", "tritonconv[demo]")
    axis.set_major_locator(ticker.FixedLocator(round_ticks(min(values), max(values))))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


_STEPS = ((1.0,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8))


def round_ticks(low: float, high: float, least: int = 4) -> list[float]:
    """Round numbers within a range: the coarsest progression that has enough of them.

    Example:
        >>> round_ticks(1.0, 2.3)
        [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
        >>> round_ticks(13, 900)
        [20.0, 50.0, 100.0, 200.0, 500.0]
    """
    low, high = low * 0.999, high * 1.001
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        ticks = [float(f"{s * 10.0**d:.6g}") for d in decades for s in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= least:
            return ticks
    # Less than an octave: even steps.
    width = 10.0 ** math.floor(math.log10((high - low) / least))
    step = max(s * width for s in (1, 2, 5) if (high - low) / (s * width) >= least - 1)
    count = math.floor(high / step) - math.ceil(low / step) + 1
    first = math.ceil(low / step)
    return [float(f"{(first + i) * step:.6g}") for i in range(count)]
