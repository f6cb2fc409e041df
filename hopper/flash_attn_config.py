"""FlashAttention-3's top-level module of this name: what its build left out, as clients ask.

Nothing is left out here, since kernels are compiled for the call at hand; what is True does not
exist.
"""

_LEFT_OUT = {
    "BACKWARD": False,
    "SPLIT": False,
    "PAGEDKV": False,
    "APPENDKV": False,
    "LOCAL": False,
    "SOFTCAP": False,
    "PACKGQA": False,
    "FP16": False,
    "FP8": True,
    "VARLEN": False,
    "CLUSTER": False,
    "HDIM64": False,
    "HDIM96": False,
    "HDIM128": False,
    "HDIM192": False,
    "HDIM256": False,
    "HDIMDIFF64": False,
    "HDIMDIFF192": False,
    "SM8x": False,
}

CONFIG = {
    "build_flags": {f"FLASHATTENTION_DISABLE_{name}": value for name, value in _LEFT_OUT.items()}
    # The spelling of these two, of which clients know both.
    | {f"FLASH_ATTENTION_DISABLE_HDIMDIFF{dim}": False for dim in (64, 192)}
}
