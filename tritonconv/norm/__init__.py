"""Batch normalisation with an activation: public function, operators, kernels."""
