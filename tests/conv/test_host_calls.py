"""The calls of the host-time ladder compute what they say."""

from __future__ import annotations

import torch

from tritonconv.runtime.operators import get_operator, host_calls_of

FIELDS = {"batch": 1, "in_channels": 16, "out_channels": 16, "height": 4, "width": 4}


def test_ours_and_pytorchs_calls_agree(device: torch.device) -> None:
    fields = {**FIELDS, "kernel": "3x3", "padding": "1x1", "dtype": "float32"}
    problem = get_operator("conv2d.forward").parse(fields)
    calls = host_calls_of("conv2d.forward")(problem, device)
    ours = {name: call for name, call in calls.items() if name.startswith("tc.")}
    assert len(ours) == 5
    for mine, theirs in (
        ("tc.conv2d(x, w)", "F.conv2d(x, w)"),
        ("tc.conv2d(x, w, b)", "F.conv2d(x, w, b)"),
        (
            "tc.conv2d(x, w, b, epilogue=relu of the sum with s)",
            "torch.relu(F.conv2d(x, w, b) + s)",
        ),
    ):
        torch.testing.assert_close(calls[mine](), calls[theirs](), rtol=1e-3, atol=1e-3)
    assert calls["tc.conv2d(x, w), recording"]().requires_grad
    calls["tc.conv2d forward and both gradients"]()
