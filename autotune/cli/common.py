"""What the verbs share: options, output, the device, the problems that arguments name."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, RenderableType
from rich.table import Table

import tritonconv  # noqa: F401  # registers the operators
from tritonconv.runtime.aot import TARGETS
from tritonconv.runtime.device import DeviceFacts, device_facts, nominal_device
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem, get_operator, operator_names
from tritonconv.runtime.settings import settings

from ..suites import Suite, load_shapes

SCHEMA_VERSION = 1
NO_GPU = "no CUDA GPU was found"


class ExitCode(IntEnum):
    """Exit codes of every verb."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    NOTHING_PASSED = 3
    NUMERIC = 4
    REGRESSION = 5
    NO_DEVICE = 6
    PARTIAL = 7
    INTERRUPTED = 130


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
CacheDirOption = Annotated[
    Path | None, typer.Option("--cache-dir", help="Directory of tuned entries.", file_okay=False)
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="More on stderr; repeat for more.")
]
NoColorOption = Annotated[bool, typer.Option("--no-color", help="No colours (also NO_COLOR).")]
OperatorsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OP]...", help="Operators, such as conv2d.forward; see `autotune list`."
    ),
]
ShapesOption = Annotated[
    str | None,
    typer.Option(
        "--shapes", help='A suite, a JSON file, or a shape: "N=8,C=64,M=64,H=56,K=3,P=1".'
    ),
]
SeveralShapesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shapes",
        help='A suite, a JSON file, or a shape: "N=8,C=64,M=64,H=56,K=3,P=1"; repeat for several.',
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model whose training step is run: a name of `autotune list --models`, "
        "module:callable, or timm:NAME.",
    ),
]
ModelArgsOption = Annotated[
    str | None, typer.Option("--model-args", help='Its arguments: "num_classes=3".')
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Batch of the model's input.")]
SizeOption = Annotated[
    str, typer.Option("--size", help="Sizes of the model's input: 224, 160x192 or 160x160x96.")
]
ChannelsOption = Annotated[
    int | None,
    typer.Option("--channels", min=1, help="Channels of its input; what it takes by default."),
]
DtypeOption = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="float32, float16, bfloat16; repeat for several."),
]
LayoutOption = Annotated[
    list[str] | None,
    typer.Option("--layout", help="channels_last or contiguous; repeat for several."),
]
PrecisionOption = Annotated[
    list[str] | None,
    typer.Option("--precision", help="Of float32: ieee, tf32 or tf32x3; repeat for several."),
]
OpOption = Annotated[
    str | None, typer.Option("--op", help="Only this operator or family, such as conv2d.")
]
TargetOption = Annotated[
    str, typer.Option("--target", help=f"GPU to stand in when there is none: {', '.join(TARGETS)}.")
]


@dataclass(frozen=True)
class Output:
    """Where results and messages go: stdout for results, stderr for everything else."""

    as_json: bool
    verbosity: int
    out: Console
    err: Console

    def result(self, payload: Mapping[str, Any], *rendered: RenderableType) -> None:
        """Print the result: the payload as JSON, or the tables."""
        if self.as_json:
            print(json.dumps({"schema_version": SCHEMA_VERSION, **payload}, indent=1))
            return
        for item in rendered:
            self.out.print(item)

    def say(self, text: str) -> None:
        """Tell the user something that is not part of the result."""
        if self.verbosity >= 0:
            self.err.print(text, highlight=False, markup=False)


def setup(
    *, as_json: bool, cache_dir: Path | None, quiet: bool, verbose: int, no_color: bool
) -> Output:
    """Apply the options that every verb has."""
    if cache_dir is not None:
        settings.cache_dir = cache_dir.expanduser().absolute()
    settings.report_misses = False  # that remark is for programs that use the kernels
    plain = no_color or bool(os.environ.get("NO_COLOR"))
    # A pipe or a file gets wide tables instead of ones folded to 80 columns.
    width = None if sys.stdout.isatty() else 200
    return Output(
        as_json,
        -1 if quiet else verbose,
        Console(no_color=plain, highlight=False, width=width),
        Console(no_color=plain, highlight=False, stderr=True),
    )


def facts_or_nominal(target: str) -> tuple[DeviceFacts, bool]:
    """Facts of the GPU, or of the target's board when there is none; whether it is real."""
    if torch.cuda.is_available():
        return device_facts(), True
    return nominal_device(target), False


def pairs_of(
    operators: Sequence[str] | None,
    shapes: str,
    *,
    dtypes: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
) -> list[tuple[Operator, Problem]]:
    """The problems that operator names and ``--shapes`` mean, in a fixed order.

    Raises:
        ArgumentValueError: an unknown operator, suite or field.
    """
    suite = load_shapes(shapes)
    names = expand_operators(operators) or _operators_of(suite)
    chosen = {"dtype": dtypes or (), "layout": layouts or (), "precision": precisions or ()}
    return [
        (operator, operator.parse(row))
        for operator in map(get_operator, names)
        for row in suite.rows(chosen, operator.name)
    ]


def expand_operators(names: Sequence[str] | None) -> tuple[str, ...]:
    """Operator names from exact names or prefixes up to a dot: ``conv2d`` is all three products.

    Raises:
        ArgumentValueError: a name matches no operator.
    """
    found: dict[str, None] = {}
    for name in names or ():
        matches = [known for known in operator_names() if known == name]
        matches = matches or [known for known in operator_names() if known.startswith(f"{name}.")]
        if not matches:
            raise bad_value("operator", " | ".join(operator_names()), repr(name))
        found.update(dict.fromkeys(matches))
    return tuple(found)


def _operators_of(suite: Suite) -> tuple[str, ...]:
    if not suite.operators:
        raise bad_value(
            "operator", f"a name before --shapes: {' | '.join(operator_names())}", "none"
        )
    return suite.operators


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose columns named with a trailing ``>`` are right-aligned."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        right = column.endswith(">")
        made.add_column(
            column.rstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    return made


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number for a table cell; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def problem_json(operator: str, problem: Problem) -> dict[str, Any]:
    """A problem in JSON output."""
    return {"operator": operator, "problem": dict(problem.fields()), "text": str(problem)}


def fields_text(fields: Mapping[str, Any]) -> str:
    """Fields of a stored problem in one line."""
    return " ".join(f"{name}={value}" for name, value in fields.items())


def parse_size(text: str) -> tuple[int, ...]:
    """Spatial sizes from ``224`` (a square), ``160x192`` or ``160x160x96``.

    Raises:
        ArgumentValueError: another form.

    Example:
        >>> parse_size("224"), parse_size("160x160x96")
        ((224, 224), (160, 160, 96))
    """
    if re.fullmatch(r"\d+(x\d+){0,2}", text.strip()) is None:
        raise bad_value("size", "224, 160x192 or 160x160x96", repr(text))
    sizes = tuple(int(part) for part in text.strip().split("x"))
    return sizes * 2 if len(sizes) == 1 else sizes
