"""Kernels compiled ahead of the first call, from `headdim.json`."""
