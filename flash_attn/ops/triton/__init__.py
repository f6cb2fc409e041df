"""FlashAttention-2's subpackage of this name; we have three of its modules, without Triton."""
