"""Context parallelism: attention over sequences that several GPUs hold a part of each.

    layout = Layout(group, cu_seqlens=cu_seqlens)
    out_local = attention(q_local, k_local, v_local, layout, causal=True)

docs/context_parallel.md explains layouts, methods and what they cost.
"""

from .function import attention
from .layout import Layout

__all__ = ["Layout", "attention"]
