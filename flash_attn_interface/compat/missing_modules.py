"""FlashAttention-2's modules that this project does not have: importing one says what to use.

`flash_attn/__init__.py` installs the finder, the last of all, so that whoever does ship such a
module is found first. Clients that try an import and do without get the ModuleNotFoundError that
they would get anyway, with another text; `importlib.util.find_spec` still says None.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_COMPILED = "torch.compile fuses the torch.nn layers that it replaces"
_NORMS = "flash_attn.ops.triton.layer_norm has layer_norm_fn, rms_norm_fn and RMSNorm"
_MODELS = (
    'transformers runs these models on our kernels with attn_implementation="flash_attention_2"'
)
_ATTENTION = "flash_attn.flash_attn_func and its varlen and packed forms are the attention itself"

INSTEAD = {
    "flash_attn.flash_attention": _ATTENTION,
    "flash_attn.flash_attn_triton": f"{_ATTENTION}, without a bias other than ALiBi",
    "flash_attn.flash_attn_triton_amd": "upstream's build for AMD GPUs; ours are NVIDIA's",
    "flash_attn.flash_attn_triton_og": _ATTENTION,
    "flash_attn.flash_blocksparse_attention": "torch.nn.attention.flex_attention takes block masks",
    "flash_attn.flash_blocksparse_attn_interface": (
        "torch.nn.attention.flex_attention takes block masks"
    ),
    "flash_attn.fused_softmax": "torch.softmax under torch.compile",
    "flash_attn.layers.patch_embed": "torch.nn.Conv2d with stride = kernel_size does the same",
    "flash_attn.losses.cross_entropy_parallel": (
        "torch.distributed.tensor.parallel.loss_parallel divides the vocabulary among ranks"
    ),
    "flash_attn.models": _MODELS,
    "flash_attn.modules": "",
    "flash_attn.modules.block": _COMPILED,
    "flash_attn.modules.embedding": "torch.nn.Embedding",
    "flash_attn.modules.mha": (
        f"{_ATTENTION}: torch.nn.Linear around it makes a multi-head attention, with "
        "flash_attn.layers.rotary for positions and flash_attn_with_kvcache for decoding"
    ),
    "flash_attn.modules.mlp": _COMPILED,
    "flash_attn.ops.activations": "torch.nn.functional has them, and torch.compile fuses them",
    "flash_attn.ops.fused_dense": _COMPILED,
    "flash_attn.ops.gelu_activation": "torch.nn.functional.gelu",
    "flash_attn.ops.layer_norm": _NORMS,
    "flash_attn.ops.rms_norm": _NORMS,
    "flash_attn.ops.triton.k_activations": _COMPILED,
    "flash_attn.ops.triton.layernorm": _NORMS,
    "flash_attn.ops.triton.linear": _COMPILED,
    "flash_attn.ops.triton.mlp": _COMPILED,
    "flash_attn.utils": "",
    "flash_attn.utils.benchmark": "torch.utils.benchmark and torch.profiler",
    "flash_attn.utils.distributed": "torch.distributed and torch.distributed.tensor",
    "flash_attn.utils.generation": "transformers' generate, or a loop over flash_attn_with_kvcache",
    "flash_attn.utils.library": "torch.library",
    "flash_attn.utils.pretrained": "transformers' from_pretrained, or huggingface_hub",
    "flash_attn.utils.testing": "torch.testing",
    "flash_attn.utils.torch": "torch.library",
}
"""Module or package: what to use in its place; empty where only its modules say."""


class _Finder:
    """Knows where nothing is to be found."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("flash_attn."):
            return None
        known = name if name in INSTEAD else name.rpartition(".")[0]
        if known not in INSTEAD or known == "flash_attn" or _only_asking():
            return None
        advice = _advice(known)
        raise ModuleNotFoundError(
            f"No module named {name!r}: this flash_attn has the attention functions of "
            f"FlashAttention-2, not all of its modules. Instead: {advice}.",
            name=name,
        )


def _advice(name: str) -> str:
    """Of a package that has none itself, that of its modules."""
    if INSTEAD[name]:
        return INSTEAD[name]
    inside = (module for module in INSTEAD if module.startswith(f"{name}."))
    return "; ".join(f"for {module.rpartition('.')[2]}, {INSTEAD[module]}" for module in inside)


def _only_asking() -> bool:
    """Whether `importlib.util.find_spec` called, two frames above the finder: no import."""
    frame = sys._getframe(3)
    return frame.f_globals.get("__name__") == "importlib.util"


def install() -> None:
    """Idempotent."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
