"""Tiled convolution: public functions, their problems, operators and algorithms."""

from . import host_calls  # registers what `autotune bench --host` times

__all__ = ["host_calls"]
