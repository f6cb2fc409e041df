"""FlashAttention-2's subpackage of this name; we have its `triton` subpackage only."""
