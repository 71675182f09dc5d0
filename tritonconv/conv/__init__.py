"""Tiled convolution: public functions, their problems, operators and algorithms."""
