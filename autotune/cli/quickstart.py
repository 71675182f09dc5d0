"""``autotune quickstart``: the whole library on one real task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.syntax import Syntax

from .. import quickstart as steps
from ..tune import Progress
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    Output,
    QuietOption,
    TargetOption,
    VerboseOption,
    setup,
    table,
)
from .progress import progress_on
from .tune import parse_duration

_LINE_SECONDS = 10.0  # between progress lines where stderr is no terminal


def quickstart(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of your images: image/*.png and label/*.png."),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="Time for tuning: 60s, 10m.")] = "60s",
    target: TargetOption = "sm_90",
    train_seconds: Annotated[
        float, typer.Option("--train-seconds", min=0.1, help="Seconds of training.")
    ] = 60.0,
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder for the picture and the record.")
    ] = Path("tritonconv-quickstart"),
    seed: Annotated[int, typer.Option("--seed", help="Of weights, crops and search.")] = 0,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Generate, tune and train on a real task; without a GPU, compile, check and train.

    Takes about three minutes. Writes a picture and a record into the output folder.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    plan = steps.Quickstart(data, parse_duration(budget), target, train_seconds, out_folder, seed)
    record = steps.run(plan, _Reporter(out))
    if out.as_json:
        out.result(record.to_json())
    if record.interrupted:
        raise typer.Exit(130)


class _Reporter:
    """Shows the steps on stdout, or on stderr when stdout is for JSON; progress on stderr."""

    def __init__(self, out: Output) -> None:
        self.output = out
        self.console: Console = out.err if out.as_json else out.out
        self.silent = out.as_json and out.verbosity < 0

    def heading(self, number: int, text: str) -> None:
        """A step begins."""
        if not self.silent:
            self.console.print()
            self.console.rule(f"[bold]{number}  {text}", align="left")

    def text(self, text: str) -> None:
        """A line."""
        if not self.silent:
            self.console.print(text, markup=False)

    def code(self, text: str) -> None:
        """Source text."""
        if not self.silent:
            self.console.print(Syntax(text.rstrip(), "python", background_color="default"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of cells."""
        shown = table(*columns)
        for row in rows:
            shown.add_row(*row)
        if not self.silent:
            self.console.print(shown)

    @contextlib.contextmanager
    def tuning(self) -> Iterator[Progress]:
        """Progress of the tuning step."""
        with progress_on(self.output.err, self.output.verbosity) as progress:
            yield progress

    @contextlib.contextmanager
    def bar(self, text: str) -> Iterator[Callable[[float, str], None]]:
        """A bar on a terminal, a line every few seconds elsewhere, nothing when quiet."""
        if self.output.verbosity < 0:
            yield lambda fraction, remark: None
        elif self.output.err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[remark]}"),
                TimeElapsedColumn(),
            )
            with RichProgress(*columns, console=self.output.err, transient=True) as shown:
                task = shown.add_task(text, total=1.0, remark="")
                yield lambda fraction, remark: shown.update(task, completed=fraction, remark=remark)
        else:
            yield self._lines(text)

    def _lines(self, text: str) -> Callable[[float, str], None]:
        said = time.monotonic()

        def move(fraction: float, remark: str) -> None:
            nonlocal said
            if time.monotonic() - said >= _LINE_SECONDS:
                said = time.monotonic()
                self.output.say(f"{text}: {100 * fraction:.0f}%, {remark}")

        return move
