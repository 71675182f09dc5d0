"""The typer application: its verbs, and what errors become on the command line."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from tritonconv.runtime.errors import ArgumentValueError, TritonConvError

from ..measure import NoDeviceError
from . import (
    bench,
    clean,
    compare,
    compile_,
    devices,
    explain,
    export,
    import_,
    list_,
    merge,
    plot,
    quickstart,
    renew,
    selfcheck,
    show,
    tune,
    verify,
)
from .common import ExitCode


class _Group(TyperGroup):
    """Turns exceptions into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except NoDeviceError as error:
            _say(f"error: {error}")
            raise typer.Exit(ExitCode.NO_DEVICE) from None
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except ValueError as error:
            if not isinstance(error, ArgumentValueError):
                return _unexpected(error)
            _say(f"error: {error}")
            raise typer.Exit(ExitCode.USAGE) from None
        except ImportError as error:
            if not isinstance(error, TritonConvError):
                return _unexpected(error)
            _say(f"error: {error}")  # an optional dependency, and how to get it
            raise typer.Exit(ExitCode.USAGE) from None
        except Exception as error:
            if type(error).__module__.startswith(("typer.", "click.")):
                raise  # its own usage errors
            return _unexpected(error)


def _unexpected(error: Exception) -> Any:
    traceback.print_exception(error, file=sys.stderr)
    raise typer.Exit(ExitCode.UNEXPECTED) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)


app = typer.Typer(
    cls=_Group,
    help="Tune tritonconv's kernels for the GPU you have.",
    epilog="Results go to stdout, progress to stderr; every verb takes --json.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("devices")(devices.devices)
app.command("list")(list_.list_)
app.command("tune")(tune.tune)
app.command("compile")(compile_.compile_)
app.command("show")(show.show)
app.command("explain")(explain.explain)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("verify")(verify.verify)
app.command("renew")(renew.renew)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("merge")(merge.merge)
app.command("clean")(clean.clean)
app.command("plot")(plot.plot)
app.command("quickstart")(quickstart.quickstart)
app.command("selfcheck")(selfcheck.selfcheck)
