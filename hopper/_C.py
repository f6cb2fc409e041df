"""FlashAttention-3's extension module of this name, in Python: defines `torch.ops.flash_attn_3`.

Clients import it for that effect alone. The operations are those of
`flash_attn_interface/compat/fa3_library.py`; a second definition of one would free the first, which
its users do not survive.
"""

from flash_attn_interface.compat import fa3_library

fa3_library.register()
