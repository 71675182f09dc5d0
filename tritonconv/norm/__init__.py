"""Batch normalisation with an activation, layer normalisation: functions, operators, kernels."""
