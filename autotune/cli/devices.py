"""``autotune devices``: the GPU, the versions, and where tables are looked for."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import torch
import triton
from rich.table import Table

from tritonconv.runtime.aot import TARGETS
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import environment, user_directory

from ..roofline import ceilings
from .common import (
    NO_GPU,
    CacheDirOption,
    JsonOption,
    NoColorOption,
    QuietOption,
    VerboseOption,
    setup,
)


def devices(
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Show GPUs, versions and the hash that tuned entries are filed under."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
    }
    rows = [_gpu(index) for index in range(torch.cuda.device_count())]
    payload = {
        "devices": rows,
        "versions": versions,
        "compile_targets": list(TARGETS),
        "tables": {
            "user": str(user_directory()),
            "shared": [str(path) for path in settings.cache_path],
        },
    }
    listing = Table.grid(padding=(0, 2))
    for name, value in versions.items():
        listing.add_row(name, value)
    listing.add_row("tuned entries", str(user_directory()))
    listing.add_row("compile targets", ", ".join(TARGETS))
    for row in rows:
        listing.add_row("")
        for name, value in row.items():
            listing.add_row(name, str(value))
    if not rows:
        listing.add_row("GPU", f"{NO_GPU}: kernels can be compiled for the targets, not measured")
    out.result(payload, listing)


def _gpu(index: int) -> dict[str, Any]:
    facts = device_facts(index)
    measured = ceilings(facts)
    return {
        "index": index,
        **facts.as_dict(),
        "environment_hash": environment(facts).hash,
        "ceilings": "unknown"
        if measured is None
        else "measured"
        if measured.measured
        else "datasheet",
        **_driver(index),
    }


_BASIC = ("driver_version", "clocks.sm", "clocks.max.sm")
_THROTTLE = "clocks_event_reasons.active"  # drivers before 535 know it by another name


def _driver(index: int) -> dict[str, str]:
    """Driver, clocks and throttling as nvidia-smi tells them; nothing where it is missing."""
    tool = shutil.which("nvidia-smi")
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if tool is None or uuid is None:
        return {}
    for fields in ((*_BASIC, _THROTTLE), _BASIC):
        try:
            text = subprocess.run(
                [
                    tool,
                    f"--id=GPU-{uuid}",
                    f"--query-gpu={','.join(fields)}",
                    "--format=csv,noheader",
                ],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(fields, (part.strip() for part in text.split(",")), strict=False))
    return {}
