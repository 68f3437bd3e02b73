"""Elementwise kernels: activations and dropout."""
