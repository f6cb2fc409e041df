"""The implementations that the benchmarks compare, on (batch, seqlen, num_heads, head_dim) tensors.

Peers run on the same inputs. One that takes equal head dims only is given q, k, v padded with zeros
to the larger dim, and the padding is inside the timing, because its users pay for it.

FA3 is optional. Name a folder that holds the binary of a FlashAttention-3 wheel:
    FLASH_ATTN_BENCH_FA3_DIR=folder    with folder/flash_attn_3/_C*.so
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Contestant
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FA3_FOLDER = "FLASH_ATTN_BENCH_FA3_DIR"


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


def prepare(names: Iterable[str]) -> None:
    """What peers need before `flash_attn_interface` is imported: it offers FA3's operations too,
    unless they are registered already."""
    if "fa3" in names:
        with suppress(Unavailable):  # the rows will say so
            load_fa3()


OURS = Implementation("ours", "ours", make_ours)
SDPA_FLASH = Implementation("sdpa_flash", "SDPA flash (FA2)", make_sdpa_flash)
SDPA_CUDNN = Implementation("sdpa_cudnn", "SDPA cuDNN", make_sdpa_cudnn)
FA3 = Implementation("fa3", "FA3", make_fa3)
PEERS = {p.key: p for p in (SDPA_FLASH, SDPA_CUDNN, FA3)}
