"""PyTorch's global settings are borrowed, whoever else does so at the same time."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from tritonconv.runtime.compat import cudnn_settings

State = tuple[str, bool]


def state() -> State:
    return torch.backends.cudnn.conv.fp32_precision, torch._C._get_cudnn_deterministic()


def test_cudnn_settings_nest_and_survive_an_error() -> None:
    before = state()
    with cudnn_settings(allow_tf32=False, deterministic=False):
        assert state() == ("ieee", before[1])
        with cudnn_settings(allow_tf32=True, deterministic=True):
            assert state() == ("tf32", True)
        assert state() == ("ieee", before[1])
    with pytest.raises(KeyError), cudnn_settings(allow_tf32=True, deterministic=True):
        raise KeyError
    assert state() == before


def test_cudnn_settings_of_two_threads() -> None:
    before = state()
    seen: dict[str, State] = {}
    first_is_in, second_begins = threading.Event(), threading.Event()

    def first() -> None:
        with cudnn_settings(allow_tf32=False, deterministic=True):
            first_is_in.set()
            second_begins.wait(10)
            # Time for the other thread to enter, if nothing kept it.
            threading.Event().wait(0.05)
            seen["first"] = state()

    def second() -> None:
        first_is_in.wait(10)
        second_begins.set()
        with cudnn_settings(allow_tf32=True, deterministic=False):
            seen["second"] = state()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"first": ("ieee", True), "second": ("tf32", before[1])}
    assert state() == before


INHERITED = """
import torch
from tritonconv.runtime.compat import cudnn_settings

torch.backends.fp32_precision = "tf32"
with cudnn_settings(allow_tf32=False, deterministic=True):
    pass
torch.backends.fp32_precision = "ieee"
print(torch.backends.cudnn.conv.fp32_precision)
"""


def test_cudnn_settings_leave_an_inherited_precision_inherited() -> None:
    # No setting of PyTorch's undoes the first line, hence another process.
    done = subprocess.run([sys.executable, "-c", INHERITED], capture_output=True, text=True)
    assert done.stdout.strip() == "ieee", done.stderr
