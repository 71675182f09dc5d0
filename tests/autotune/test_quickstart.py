from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tritonconv.autotune import quickstart
from tritonconv.autotune.cli import app
from tritonconv.autotune.interpret import InterpreterError, interpret

missing = [name for name in ("matplotlib", "PIL") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"the demo extra is not installed: {missing}"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten small pairs: a bright disc to be found."""
    from PIL import Image

    folder = tmp_path / "images"
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    for index in range(10):
        centre = 10 + index
        disc = (rows - centre) ** 2 + (columns - 16) ** 2 < 40
        generator = torch.Generator().manual_seed(index)
        noise = torch.rand(32, 32, generator=generator) * 80
        for kind, values in (("image", disc * 120 + noise), ("label", disc * 255)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.to(torch.uint8).numpy()).save(folder / kind / f"{index}.png")
    return folder


# The command as a process would have it, with seconds for compilation rather than half a minute.
SHORT = """
from tritonconv.autotune import quickstart
from tritonconv.autotune.cli import main

quickstart._COMPILE_SECONDS = 5.0
main()
"""


def test_the_whole_demonstration(cache: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quickstart", "--data", str(images), "--out", str(out), "--train-seconds", "1",
                 "--budget", "5s", "--cache-dir", str(cache), "--json"]  # fmt: skip
    # Without TRITON_INTERPRET, which forbids compilation; one thread: the machine may be shared.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SHORT, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    assert value["schema_version"] == 1
    assert json.loads((out / "quickstart.json").read_text()) == value
    assert (out / "segmentation.png").read_bytes().startswith(b"\x89PNG")
    assert "sigmoid" in value["generated"]["function"] and value["generated"]["source"].strip()
    training = value["training"]
    assert training["steps"] > 0 and len(training["dice_after"]) == 2
    assert set(training["ms_per_step"]) >= {"ours", "PyTorch"}
    assert all(math.isfinite(ms) for ms in training["ms_per_step"].values())
    if value["device"]["gpu"]:
        assert value["tuning"]["results"]
    else:
        kernels = value["compiled"]["kernels"]
        assert kernels and value["interpreted"]["ok"]
        # Gradients of the maps of classes (M2) are slices of a concatenation, in no format.
        wide = [k["problem"] for k in kernels if "M2 " not in k["problem"]]
        assert [p for p in wide if "bfloat16 channels_last" not in p] == []
    assert not list(out.glob("checkpoint*"))
    assert "Train an Attention U-Net" in done.stderr


def test_a_missing_folder_is_exit_2_before_anything_long(cache: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quickstart", "--data", str(tmp_path / "nothing")])
    assert done.exit_code == 2 and "nothing" in done.stderr


def test_the_generated_source_names_the_users_function() -> None:
    text = quickstart.generated_source(quickstart.swish_shift)
    assert "swish_shift" in text and "tl." in text


def test_an_interpreting_process_that_fails_says_why() -> None:
    with pytest.raises(InterpreterError, match=r"no\.such\.operator"):
        interpret("no.such.operator", {})
