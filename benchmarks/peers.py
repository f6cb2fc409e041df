"""The implementations that the benchmarks compare, on (batch, seqlen, num_heads, head_dim) tensors.

Peers run on the same inputs. One that takes equal head dims only is given q, k, v padded with zeros
to the larger dim, and the padding is inside the timing, because its users pay for it.

FA3 and FA4 are optional. Name a folder that holds the binary of a FlashAttention-3 wheel, and one
that the wheels of flash-attn-4 and what it needs are unpacked in (its package `flash_attn` hides
ours in this process):
    FLASH_ATTN_BENCH_FA3_DIR=folder    with folder/flash_attn_3/_C*.so
    FLASH_ATTN_BENCH_FA4_DIR=folder    with folder/flash_attn/cute
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Contestant
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FA3_FOLDER = "FLASH_ATTN_BENCH_FA3_DIR"
FA4_FOLDER = "FLASH_ATTN_BENCH_FA4_DIR"


class Unavailable(Exception):
    """This peer cannot serve this problem or is not on this machine; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """key: column name in the results. make: problem tensors -> something to call and to time."""

    key: str
    label: str
    make: Callable[[Tensor, Tensor, Tensor, bool], Contestant]


def pad_to(width: int, x: Tensor) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def make_ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Contestant:
    from flash_attn_interface import flash_attn_func

    return Contestant("ours", partial(flash_attn_func, q, k, v, causal=causal))


def make_ours_deterministic(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Contestant:
    """Differs in the backward only."""
    from flash_attn_interface import flash_attn_func

    call = partial(flash_attn_func, q, k, v, causal=causal, deterministic=True)
    return Contestant("ours_deterministic", call)


def our_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """Name of the kernel that serves the call, for the record."""
    from flash_attn_interface import explain

    spec = explain(q, k, v, causal=causal).spec
    return spec.label() if spec else "none"


def make_sdpa_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Contestant:
    """torch's FlashAttention-2. Equal head dims only."""
    head_dim_v, width, scale = v.shape[-1], max(q.shape[-1], v.shape[-1]), q.shape[-1] ** -0.5

    def call() -> Tensor:
        padded = (pad_to(width, x).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*padded, is_causal=causal, scale=scale)
        return out.transpose(1, 2)[..., :head_dim_v]

    return Contestant("sdpa_flash", call, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION))


def make_sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Contestant:
    """torch's cuDNN attention, which takes unequal head dims as they are."""

    def call() -> Tensor:
        views = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*views, is_causal=causal).transpose(1, 2)

    return Contestant("sdpa_cudnn", call, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION))


@cache
def load_fa3() -> None:
    """Registers torch.ops.flash_attn_3 from the binary in $FLASH_ATTN_BENCH_FA3_DIR."""
    if FA3_FOLDER not in os.environ:
        raise Unavailable(f"{FA3_FOLDER} is not set")
    folder = Path(os.environ[FA3_FOLDER])
    libraries = sorted(folder.glob("flash_attn_3/_C*.so"))
    if not libraries:
        raise Unavailable(f"no flash_attn_3/_C*.so in {folder}")
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        raise Unavailable("another torch.ops.flash_attn_3 is registered in this process")
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        raise Unavailable(f"{libraries[0].name} does not load: {error}") from error


def make_fa3(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Contestant:
    """FlashAttention-3's forward binary. Equal head dims, as its users must pad them."""
    load_fa3()
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        raise Unavailable("FA3 needs compute capability 9.0")
    head_dim_v, width, scale = v.shape[-1], max(q.shape[-1], v.shape[-1]), q.shape[-1] ** -0.5
    forward = torch.ops.flash_attn_3.fwd

    def call() -> Tensor:
        padded = (pad_to(width, x) for x in (q, k, v))
        out = forward(*padded, softmax_scale=scale, is_causal=causal, num_splits=1)[0]
        return out[..., :head_dim_v]

    return Contestant("fa3", call)


@cache
def load_fa4() -> Any:
    """flash_attn_func of the FlashAttention-4 in $FLASH_ATTN_BENCH_FA4_DIR."""
    if FA4_FOLDER not in os.environ:
        raise Unavailable(f"{FA4_FOLDER} is not set")
    folder = Path(os.environ[FA4_FOLDER])
    sys.path[:0] = [str(folder), str(folder / "nvidia_cutlass_dsl" / "dsl_packages")]
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"flash_attn.cute does not import: {error}") from error
    return flash_attn_func


def make_fa4(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Contestant:
    """FlashAttention-4, forward and backward. Takes some unequal head dims as they are."""
    forward = load_fa4()

    def call() -> Tensor:
        out = forward(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return Contestant("fa4", call)


def prepare(names: Iterable[str]) -> None:
    """What peers need before our packages are imported: `flash_attn_interface` offers FA3's
    operations too, unless they are registered already, and FA4 is a package of `flash_attn`."""
    names = set(names)
    for name, load in (("fa3", load_fa3), ("fa4", load_fa4)):
        if name in names:
            with suppress(Unavailable):  # the rows will say so
                load()


OURS = Implementation("ours", "ours", make_ours)
OURS_DETERMINISTIC = Implementation(
    "ours_deterministic", "ours, deterministic", make_ours_deterministic
)
SDPA_FLASH = Implementation("sdpa_flash", "SDPA flash (FA2)", make_sdpa_flash)
SDPA_CUDNN = Implementation("sdpa_cudnn", "SDPA cuDNN", make_sdpa_cudnn)
FA3 = Implementation("fa3", "FA3", make_fa3)
FA4 = Implementation("fa4", "FA4", make_fa4)
PEERS = {p.key: p for p in (SDPA_FLASH, SDPA_CUDNN, FA3, FA4)}
