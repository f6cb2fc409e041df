"""FlashAttention-2's subpackage of this name; we have its `cross_entropy` only."""
