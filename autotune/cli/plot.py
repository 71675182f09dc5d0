"""``autotune plot``: pictures of what tuning found."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.errors import ArgumentValueError, bad_value
from tritonconv.runtime.operators import Field, Problem, get_operator, operator_names
from tritonconv.runtime.tables import Entry, Trial

from .. import analysis, class_plots, classes, landscape, plots
from ..replay import compare_strategies
from ..store import Store
from .common import (
    CacheDirOption,
    DtypeOption,
    JsonOption,
    LayoutOption,
    NoColorOption,
    OperatorsArgument,
    Output,
    QuietOption,
    VerboseOption,
    expand_operators,
    pairs_of,
    setup,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Kind(StrEnum):
    """What is drawn."""

    BEST_SO_FAR = "best-so-far"
    SORTED = "sorted"
    MARGINALS = "marginals"
    ROOFLINE = "roofline"
    SPEEDUP = "speedup"
    REGRET = "regret"
    AGREEMENT = "agreement"
    CLASSES = "classes"


class By(StrEnum):
    """What the points of a roofline are told apart by."""

    ARITHMETIC = "arithmetic"
    CLASS = "class"


class Format(StrEnum):
    """How it is written."""

    PNG = "png"
    SVG = "svg"


@dataclasses.dataclass(frozen=True)
class _Plot:
    """The numbers of a plot, how to draw them, and one line that sums them up."""

    numbers: Mapping[str, Any]
    summary: str
    draw: Any

    def figure(self, caption: str) -> Figure:
        figure: Figure = self.draw(caption)
        return figure


def plot(
    kind: Annotated[Kind, typer.Argument(help="What to draw.", show_default=False)],
    operators: OperatorsArgument = None,
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="Only these problems: a suite, a JSON file, or a shape."),
    ] = None,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    tables: Annotated[
        list[Path] | None,
        typer.Option(
            "--tables",
            file_okay=False,
            help="Cache directory to read; repeat it for `agreement`. Default: --cache-dir.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Only entries of this device: a part of its name."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", help="speedup: field of the problems down the side.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="speedup: field along the bottom.")
    ] = None,
    contender: Annotated[
        str, typer.Option("--contender", help="speedup by fields: over default, or an algorithm.")
    ] = landscape.DEFAULT,
    by: Annotated[
        By, typer.Option("--by", help="roofline: by class draws ours and PyTorch's kernel.")
    ] = By.ARITHMETIC,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="best-so-far: processes that compile.")
    ] = 1,
    path: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: KIND.FORMAT.")
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="Default: as --out ends, else png.")
    ] = None,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Draw tuned entries; with --json print the numbers behind the plot.

    best-so-far: search strategies played back on the recorded tables. sorted: all timings of
    problems with the band of ties. marginals: time by each parameter. roofline: problems under the
    roofs of their device. speedup: the winner over the default and every algorithm, or with --rows
    and --columns by two fields. regret: what the lookup would have cost each problem without its
    own entry. agreement: what repeated tunes, in several --tables, picked. classes: generated
    kernels over PyTorch's, by class of convolution.

    With --json a file is written only where --out asks for one.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    written = path if path is not None or json_ else Path(f"{kind}.{form or Format.PNG}")
    if written is not None:
        form = _format(written, form)
        plots.matplotlib()  # before the work: what cannot be drawn need not be computed
    chosen = _Chosen(
        expand_operators(operators),
        None
        if shapes is None
        else {
            (op.name, _frozen(problem.fields()))
            for op, problem in pairs_of(operators, shapes, dtypes=dtype, layouts=layout)
        },
        tuple(dtype or ()),
        tuple(layout or ()),
        device,
    )
    stores = [Store(folder / "tuned") for folder in tables or ()] or [Store()]
    runs = [chosen.of(store, out) for store in stores]
    if kind is Kind.AGREEMENT:
        if len(runs) < 2:
            raise bad_value("--tables", "two or more directories for agreement", len(tables or ()))
        made = _agreement(runs)
    elif len(runs) > 1:
        raise bad_value("--tables", f"one directory for {kind}", len(runs))
    else:
        made = _plot_of(kind, runs[0], rows, columns, contender, by, jobs, out)
    caption = caption_of([entry for run in runs for entry in run])
    payload = {"kind": str(kind), "caption": caption, **made.numbers}
    if written is not None:
        assert form is not None
        plots.save(made.figure(caption), written, form)
        payload["path"] = str(written)
    out.result(payload, made.summary, *([] if written is None else [str(written)]))


def _format(path: Path, form: Format | None) -> Format:
    ending = path.suffix.removeprefix(".").lower()
    if form is not None:
        return form
    if ending not in tuple(Format):
        raise bad_value("--out", "a name ending in .png or .svg, or --format", str(path))
    return Format(ending)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Which entries are drawn."""

    operators: tuple[str, ...]
    problems: set[tuple[str, tuple[tuple[str, Field], ...]]] | None
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    device: str | None

    def of(self, store: Store, out: Output) -> list[Entry]:
        """Entries of one environment and policy, the newest of each problem.

        Raises:
            ArgumentValueError: there is none.
        """
        found = [item.entry for item in store.entries() if self._wanted(item.entry)]
        if not found:
            raise bad_value("tables", "entries that --shapes and the like let through", store.root)
        worlds = Counter(_world(entry) for entry in found)
        world, count = worlds.most_common(1)[0]
        if len(worlds) > 1:
            out.say(
                f"{store.root}: {count} of {len(found)} entries, those of {world}; "
                "choose with --device"
            )
        newest: dict[Any, Entry] = {}
        for entry in found:
            if _world(entry) != world:
                continue
            key = entry.operator, _frozen(entry.problem)
            if key not in newest or _created(newest[key]) < _created(entry):
                newest[key] = entry
        return sorted(newest.values(), key=_place)

    def _wanted(self, entry: Entry) -> bool:
        if self.operators and entry.operator not in self.operators:
            return False
        if self.problems is not None:
            return (entry.operator, _frozen(entry.problem)) in self.problems
        fields = entry.problem
        if self.dtypes and fields.get("dtype") not in self.dtypes:
            return False
        if self.layouts and fields.get("layout") not in self.layouts:
            return False
        return self.device is None or self.device.lower() in _device_name(entry).lower()


def _frozen(fields: Mapping[str, Field]) -> tuple[tuple[str, Field], ...]:
    return tuple(sorted(fields.items()))


def _device_name(entry: Entry) -> str:
    return str(entry.environment.get("device", {}).get("name", "?"))


def _world(entry: Entry) -> str:
    """What timings must share to stand in one plot."""
    env = entry.environment
    return (
        f"{_device_name(entry)}, torch {env.get('torch', '?')}, "
        f"Triton {env.get('triton', '?')}, {entry.policy}"
    )


def _place(entry: Entry) -> tuple[Any, ...]:
    """Products in their order, each from small to large sizes."""
    names = operator_names()
    known = names.index(entry.operator) if entry.operator in names else len(names)
    sizes = tuple(v for v in entry.problem.values() if type(v) is int)
    return known, entry.operator, sizes, _frozen(entry.problem)


def _created(entry: Entry) -> str:
    return str(entry.recorded.get("created", ""))


def caption_of(entries: Sequence[Entry]) -> str:
    """Device, versions, policy and dates of what a plot shows."""
    worlds = dict.fromkeys(map(_world, entries))
    dates = sorted({_created(entry)[:10] for entry in entries} - {""})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "no date"
    return f"{'; '.join(worlds)}; tuned {span}"


def _problem(entry: Entry) -> Problem:
    return get_operator(entry.operator).parse(entry.problem)


def _device(entry: Entry) -> DeviceFacts:
    return DeviceFacts(**entry.environment["device"])


def _serves(trial: Trial, fields: Mapping[str, Field], operator: str) -> bool:
    """Whether a winner can run another problem, as the lookup would ask."""
    try:
        known = get_operator(operator)
        return known.algorithm(trial.algorithm).supports(known.parse(fields)) is None
    except ArgumentValueError:  # an entry of a kernel that is no longer there
        return True


def _plot_of(
    kind: Kind,
    entries: Sequence[Entry],
    rows: str | None,
    columns: str | None,
    contender: str,
    by: By,
    jobs: int,
    out: Output,
) -> _Plot:
    if kind is Kind.CLASSES or (kind is Kind.ROOFLINE and by is By.CLASS):
        return _by_class(kind, entries, out)
    if kind is Kind.BEST_SO_FAR:
        return _best_so_far(entries, jobs)
    if kind in (Kind.SORTED, Kind.MARGINALS):
        most = sorted(entries, key=lambda e: -sum(t.timing is not None for t in e.trials))
        return _sorted(most, out) if kind is Kind.SORTED else _marginals(most[0], out, len(most))
    if kind is Kind.ROOFLINE:
        roof = landscape.roofline(entries, _device(entries[0]), _problem)
        share = analysis.geomean(
            p.of_roof for p in roof.points if p.of_roof and p.contender == "tuned"
        )
        text = "no ceilings are known" if share is None else f"{100 * share:.1f} % of the roof"
        return _Plot(_json(roof), f"{len(entries)} problems: {text}", _drawer("roofline", roof))
    if kind is Kind.REGRET:
        return _regret(entries)
    return _speedup(entries, rows, columns, contender)


def _by_class(kind: Kind, entries: Sequence[Entry], out: Output) -> _Plot:
    full = [entry for entry in entries if not classes.is_compact(entry)]
    if len(full) < len(entries):
        out.say(
            f"{len(entries) - len(full)} entries came from a bundle, which leaves out the losers, "
            "PyTorch's kernel among them: not drawn"
        )
    summary = classes.summarize_classes(full)
    if not summary.rows:
        raise bad_value(
            "tables", "convolutions tuned there, with PyTorch's kernel timed beside ours", "none"
        )
    means = {
        direction: analysis.geomean(
            row.generated for row in summary.rows for _ in range(row.problems)
            if row.direction == direction
        )
        for direction in classes.DIRECTIONS
    }  # fmt: skip
    said = ", ".join(f"{name} {value:.2f}x" for name, value in means.items() if value)
    text = (
        f"{summary.compared} problems ({summary.left_out} left out: fused, or without a rival): "
        f"{said} PyTorch's kernel"
    )
    if kind is Kind.CLASSES:
        numbers = {**_json(summary), "geomean": means}
        return _Plot(numbers, text, lambda caption: class_plots.draw_classes(summary, caption))
    roof = classes.roofline_of_classes(full, _device(full[0]), _problem)
    return _Plot(
        _json(roof), text, lambda caption: class_plots.draw_roofline_of_classes(roof, caption)
    )


def _drawer(name: str, *numbers: Any) -> Any:
    return lambda caption: getattr(plots, f"draw_{name}")(*numbers, caption)


def _best_so_far(entries: Sequence[Entry], jobs: int) -> _Plot:
    curves = analysis.best_so_far(compare_strategies(entries, seeds=range(3), jobs=jobs))
    numbers = {
        "curves": [_json(curve) for curve in curves],
        "seconds_to_5_percent": {curve.strategy: curve.reaches(1.05) for curve in curves},
    }
    reached = [
        f"{curve.strategy}: "
        + (f"{t:.1f} s" if (t := curve.reaches(1.05)) is not None else "never")
        for curve in curves
    ]
    text = f"seconds per problem to within 5 % of the best: {', '.join(reached)}"
    return _Plot(numbers, text, _drawer("best_so_far", curves))


def _sorted(entries: Sequence[Entry], out: Output) -> _Plot:
    found = [analysis.sorted_timings(entry) for entry in entries]
    if len(found) > plots.PANELS:
        out.say(f"drawing the {plots.PANELS} problems with most timings of {len(found)}")
    numbers = {"problems": [_json(one) for one in found]}
    tied = sum(len(entry.tied) for entry in entries) / len(entries)
    text = f"{len(found)} problems, {tied:.1f} configs tied on average"
    return _Plot(numbers, text, _drawer("sorted", found))


def _marginals(entry: Entry, out: Output, of: int) -> _Plot:
    if of > 1:
        out.say(f"drawing {analysis.label(entry)}, one of {of}; choose with --shapes")
    found = landscape.marginals(entry)
    name = analysis.label(entry)
    numbers = {"problem": name, "marginals": [_json(one) for one in found]}
    text = f"{name}: {len(found)} parameters of {entry.best.algorithm} with several values"
    return _Plot(numbers, text, _drawer("marginals", name, found))


def _speedup(
    entries: Sequence[Entry], rows: str | None, columns: str | None, contender: str
) -> _Plot:
    if (rows is None) != (columns is None):
        raise bad_value("--rows, --columns", "both or neither", "one")
    if rows is None or columns is None:
        found = landscape.over_contenders(entries)
        title = "Tuned over contender: times faster"
    else:
        found = landscape.over_fields(entries, rows, columns, contender)
        title = f"Tuned over {contender}: times faster"
        if not found.rows:
            known = sorted({name for entry in entries for name in entry.problem})
            raise bad_value("--rows, --columns", ", ".join(known), f"{rows}, {columns}")
    over = landscape.over_contenders(entries)
    means = {
        name: analysis.geomean(v for row in over.values if (v := row[i]) is not None)
        for i, name in enumerate(over.columns)
    }
    numbers = {**_json(found), "geomean": means}
    said = ", ".join(f"{value:.2f}x {name}" for name, value in means.items() if value)
    text = f"geometric mean over {len(entries)}: {said}"
    return _Plot(numbers, text, _drawer("heat_map", found, title))


def _regret(entries: Sequence[Entry]) -> _Plot:
    found = analysis.leave_one_out(entries, _serves)
    text = f"{found.counted} of {len(found.rows)} problems counted"
    if found.geomean is not None:
        text += f": geometric mean {found.geomean:.3f}, worst {found.worst:.2f}"
    return _Plot(_json(found), text, _drawer("regret", found))


def _agreement(runs: Sequence[Sequence[Entry]]) -> _Plot:
    found = analysis.agreement(runs)
    if not found.rows:
        raise bad_value("--tables", "directories that share tuned problems", "none in common")
    text = agreement_text(found)
    return _Plot(_json(found), text, _drawer("agreement", found))


def agreement_text(found: analysis.Agreement) -> str:
    """An agreement in one line."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f} %"

    return (
        f"{found.runs} tunes of {len(found.rows)} problems: all agree on "
        f"{percent(found.unanimous)} of them, {percent(found.modal)} of all choices are the usual "
        f"one; by the least median alone {percent(found.unanimous_fastest)} and "
        f"{percent(found.modal_fastest)}"
    )


def _json(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)
