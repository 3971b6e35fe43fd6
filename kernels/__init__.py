"""Triton kernels, one file per operation: device code and launches, no autograd and no dispatch."""
