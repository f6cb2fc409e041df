"""Attention in plain PyTorch, for CPU tensors and as the tests' oracle."""
