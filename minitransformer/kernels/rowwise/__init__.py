"""Kernels over the rows of a matrix (N, C): softmax, norms, cross-entropy."""
