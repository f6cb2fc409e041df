"""How clients decide whether FlashAttention is here, each in its own way, as facts and not as code.

Run by test_clients.py in a fresh interpreter: `python client_probes.py SITE` prints all answers as
JSON. SITE is a folder with installed distributions. Nothing is imported from the checkout.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import inspect
import json
import site
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from packaging.version import Version


def owners(python_3_10: bool = False) -> dict[str, list[str]]:
    """Import package -> distributions. Python 3.10 knows only what top_level.txt lists."""
    if not python_3_10:
        found = dict(metadata.packages_distributions())
    else:
        found = {}
        for distribution in metadata.distributions():
            for name in (distribution.read_text("top_level.txt") or "").split():
                found.setdefault(name, []).append(distribution.metadata["Name"])
    return {name: [x.replace("_", "-") for x in found.get(name, [])] for name in NAMES}


NAMES = ("flash_attn", "flash_attn_interface", "flash_attn_2_cuda", "flash_attn_3")


def names(module: str, *wanted: str) -> list[str]:
    """Those of the wanted names that the module lacks."""
    loaded = importlib.import_module(module)
    return [name for name in wanted if not hasattr(loaded, name)]


def metadata_only() -> Any:
    """Works without torch."""
    return {
        "owners": owners(),
        "owners_3_10": owners(python_3_10=True),
        "versions": {
            spelling: version_or_none(spelling)
            for spelling in ("flash-attn", "flash_attn", "flash-attn-3", "flash_attn_3")
        },
        "specs": {name: find_spec(name) is not None for name in NAMES},
    }


def version_or_none(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def transformers() -> Any:
    """Presence, owner and version; then signatures of the varlen functions, by parameter name."""

    def here(package: str, distribution: str) -> bool:
        return find_spec(package) is not None and distribution in owners().get(package, [])

    answer: dict[str, Any] = {
        "fa2": here("flash_attn", "flash-attn")
        and Version(metadata.version("flash-attn")) >= Version("2.3.3"),
        "fa3": here("flash_attn_interface", "flash-attn-3"),
        "fa4": here("flash_attn", "flash-attn-4"),
        "lacking": names(
            "flash_attn", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"
        )
        + names("flash_attn.bert_padding", "pad_input", "unpad_input")
        + names(
            "flash_attn_interface",
            "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache",
        ),
    }  # fmt: skip
    for module in ("flash_attn", "flash_attn_interface"):
        loaded = importlib.import_module(module)
        varlen = inspect.signature(loaded.flash_attn_varlen_func).parameters
        passed = ("dropout_p", "window_size", "deterministic", "softcap", "max_seqlen_q", "s_aux")
        answer[f"{module} takes"] = [name for name in passed if name in varlen]
        cache = inspect.signature(loaded.flash_attn_with_kvcache).parameters
        answer[f"{module} pages"] = next(n for n in ("block_table", "page_table") if n in cache)
        kinds = {p.kind for p in (*varlen.values(), *cache.values())}
        answer[f"{module} hides"] = inspect.Parameter.VAR_KEYWORD in kinds
    return answer


def diffusers() -> Any:
    answer = {
        "fa2": find_spec("flash_attn") is not None
        and Version(metadata.version("flash_attn")) >= Version("2.6.3"),
        "fa3": find_spec("flash_attn_3") is not None
        and version_or_none("flash_attn_3") is not None,
    }
    wrapped = ("_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward")
    lacking = names("flash_attn", "flash_attn_func", "flash_attn_varlen_func")
    lacking += names("flash_attn.flash_attn_interface", *wrapped)
    lacking += names("flash_attn_interface", "flash_attn_func", "flash_attn_varlen_func")
    dense = inspect.signature(importlib.import_module("flash_attn_interface").flash_attn_func)
    keywords = (
        "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale", "window_size",
        "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin",
        "return_attn_probs",
    )  # fmt: skip
    lacking += [keyword for keyword in keywords if keyword not in dense.parameters]
    return {**answer, "lacking": lacking}


def transformer_engine() -> Any:
    """Version ranges of its releases, the upper end as (version, included); unguarded imports."""
    version = Version(metadata.version("flash-attn"))
    ranges = {
        "2.8": ("2.1.1", "2.8.1", True),
        "2.10": ("2.1.1", "2.8.3", True),
        "2.18": ("2.7.3", "2.8.3", True),
        "2.19": ("2.1.1", "2.8.4", False),
    }
    accepted = [
        release
        for release, (low, high, included) in ranges.items()
        if Version(low) <= version
        and (version < Version(high) or (included and version == Version(high)))
    ]
    lacking = names("flash_attn_2_cuda", "varlen_bwd")
    lacking += names(
        "flash_attn.flash_attn_interface",
        "flash_attn_func", "flash_attn_varlen_func", "_flash_attn_forward", "_flash_attn_backward",
        "_flash_attn_varlen_forward", "_flash_attn_varlen_backward",
    )  # fmt: skip
    fa3 = version_or_none("flash-attn-3")
    answer = {"accepted": accepted, "fa3": fa3 is not None and Version(fa3).major == 3}
    answer["fa3 before 2.15"] = fa3 is not None and Version(fa3) > Version("3.0.0b")
    if fa3 is not None:
        wanted = (
            "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache",
            "_flash_attn_forward", "_flash_attn_backward",
        )  # fmt: skip
        lacking += names("flash_attn_interface", *wanted)
        lacking += names("flash_attn_3.flash_attn_interface", *wanted)
    return {**answer, "lacking": lacking}


def xformers() -> Any:
    """Importable means that __version__ must lie in a range, else its own import fails."""
    version = Version(importlib.import_module("flash_attn").__version__)
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    extension = getattr(interface, "flash_attn_cuda", None) or interface.flash_attn_gpu
    answer: dict[str, Any] = {
        "accepted": Version("2.7.1") <= version <= Version("2.8.4"),
        "lacking": [
            name
            for name in ("fwd", "varlen_fwd", "bwd", "varlen_bwd")
            if not hasattr(extension, name)
        ],
    }
    try:
        answer["fa3"] = find_spec("flash_attn_3._C") is not None
    except ModuleNotFoundError:
        answer["fa3"] = False
    if answer["fa3"]:
        import torch

        importlib.import_module("flash_attn_3._C")
        answer["schemas"] = [
            str(getattr(torch.ops.flash_attn_3, name).default._schema) for name in ("fwd", "bwd")
        ]
    return answer


def pytorch() -> Any:
    """Its own code, where this torch has it."""
    import torch

    importlib.import_module("flash_attn_interface")
    answer: dict[str, Any] = {
        "operations": [n for n in ("fwd", "bwd") if hasattr(torch.ops.flash_attn_3, n)],
        "loaded": "flash_attn_3" in sys.modules,
    }
    attention = importlib.import_module("torch.nn.attention")
    if not hasattr(attention, "activate_flash_attention_impl"):
        return answer
    try:
        attention.activate_flash_attention_impl("FA3")
        answer["activated"] = attention.current_flash_attention_impl()
        attention.restore_flash_attention_impl()
    except RuntimeError as error:
        answer["activated"] = f"refused: {error}"
    return answer


def megatron() -> Any:
    """A plain function or an operation with `_init_fn`, whose signature it reads."""
    try:
        interface = importlib.import_module("flash_attn_3.flash_attn_interface")
    except ModuleNotFoundError:
        return {"fa3": False}
    forward = interface._flash_attn_forward
    forward = getattr(forward, "_init_fn", forward)
    main = importlib.import_module("flash_attn_interface")
    return {
        "fa3": True,
        "parameters": list(inspect.signature(forward).parameters),
        "copies": [n for n in interface.__all__ if getattr(interface, n) is not getattr(main, n)],
        "lacking": names("flash_attn_3.flash_attn_interface", "flash_attn_with_kvcache"),
    }


def ring_flash_attn() -> Any:
    """Names and defaults from getfullargspec of the private operations."""
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    answer = {}
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        function = getattr(interface, f"_flash_attn_{name}")
        spec = inspect.getfullargspec(getattr(function, "_init_fn", function))
        defaults = spec.defaults or ()
        first = len(spec.args) - len(defaults)
        answer[name] = {
            arg: defaults[i - first] if i >= first else None for i, arg in enumerate(spec.args)
        }
    return answer


def imports() -> Any:
    """The names that other clients import, and what each module lacks of them."""
    wanted = {
        "flash_attn.ops.triton.rotary": ["apply_rotary"],  # vLLM, wherever flash_attn is found
        "flash_attn.layers.rotary": [
            "RotaryEmbedding", "apply_rotary_emb", "apply_rotary_emb_qkv_",
        ],
        "flash_attn.bert_padding": ["index_first_axis", "pad_input", "unpad_input"],
        "flash_attn.ops.triton.layer_norm": ["RMSNorm", "layer_norm_fn", "rms_norm_fn"],
        "flash_attn.ops.triton.cross_entropy": ["cross_entropy_loss"],  # axolotl
        "flash_attn.losses.cross_entropy": ["CrossEntropyLoss"],
        "flash_attn.flash_attn_interface": ["flash_attn_gpu"],  # unsloth
        "flash_attn_2_cuda": ["fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"],
        "flash_attn": [
            "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
            "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func",
            "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache", "__version__",
        ],
        "flash_attn_interface": [
            "flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func",
            "flash_attn_with_kvcache", "flash_attn_combine", "get_scheduler_metadata",
            "_flash_attn_forward", "_flash_attn_backward", "flash_attn_f3b2_func",
        ],
    }  # fmt: skip
    lacking = {module: names(module, *attributes) for module, attributes in wanted.items()}
    return {module: missing for module, missing in lacking.items() if missing}


def build_flags() -> Any:
    """As LMDeploy asks which head dims a build of FlashAttention-3 has."""
    try:
        config = importlib.import_module("flash_attn_config").CONFIG
    except ModuleNotFoundError:
        return None
    return config["build_flags"]


PROBES: tuple[Callable[[], Any], ...] = (
    metadata_only,  # before anything is imported
    pytorch,  # before anything but flash_attn_interface is
    transformers,
    diffusers,
    transformer_engine,
    xformers,
    megatron,
    ring_flash_attn,
    imports,
    build_flags,
)


def answers() -> dict[str, Any]:
    """Of all; a probe that fails answers with its error."""
    found: dict[str, Any] = {}
    for probe in PROBES:
        try:
            found[probe.__name__] = probe()
        except Exception:
            found[probe.__name__] = {"error": traceback.format_exc()}
    return found


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # in place of this folder; before any other flash_attn
    site.addsitedir(sys.argv[1])  # reads the .pth files of editable installs
    print(json.dumps(answers()))
