"""GPU kernels for PyTorch, generated from the mathematics you write."""
