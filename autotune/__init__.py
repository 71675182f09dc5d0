"""Tune tritonconv's operators for a GPU: measure, choose, check, store; the command ``autotune``.

From Python::

    from tritonconv.autotune.tune import tune
    from tritonconv.runtime.operators import get_operator

    operator = get_operator("conv2d.forward")
    problem = operator.parse({"batch": 8, "in_channels": 64, "out_channels": 64, "height": 56})
    reports = tune(operator, [problem])
"""
