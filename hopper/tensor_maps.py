"""How hopper_fwd sees its tensors: one TMA tensor map each, patched with an address per call.

All maps have the dims (column, row, head, first row, batch). A packed or partly used tensor is
"ragged": its sequences end at lengths that only the device knows, and what lies behind must neither
be read as keys nor be written. So a sequence is addressed by its end: rows count from
`map_rows - length`, which puts the sequence's end at the end of the second dim, where TMA clips;
and the fourth dim, a second axis of rows, is moved to the sequence's end. The sum is `map_rows`
rows too far, by which the map's address is moved back. See `map_row` in fwd.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flash_attn_interface._common import tensor_map
from flash_attn_interface._common.params import ParamBlock
from flash_attn_interface._common.problem import Problem, Strides

from .tiles import ELEM_BYTES

# TMA: addresses and strides are multiples of this.
VECTOR_BYTES = 16


def refuses_layout(problem: Problem) -> str | None:
    """Why TMA cannot address these tensors; None if it can."""
    p = problem
    if p.vector_bytes < VECTOR_BYTES:
        return (
            f"TMA needs pointers and strides of q, k and v in multiples of {VECTOR_BYTES} bytes, "
            f"these are multiples of {p.vector_bytes}"
        )
    if p.head_dim_v * ELEM_BYTES % VECTOR_BYTES:
        return f"TMA stores rows in multiples of {VECTOR_BYTES} bytes: head_dim_v % 8 must be 0"
    for name, strides, sizes in (
        ("q", p.q_strides, (p.batch, p.seqlen_q, p.num_heads_q)),
        ("k", p.k_strides, (p.batch, p.seqlen_k, 1)),
        ("v", p.v_strides, (p.batch, p.seqlen_k, 1)),
    ):
        varlen = p.varlen_q if name == "q" else p.varlen_k
        for axis, stride, size in zip(("batch", "row", "head"), strides, sizes, strict=True):
            if stride == 0 and size > 1 and not (varlen and axis == "batch"):
                return f"{name} is expanded along its {axis} axis (stride 0)"
    return None


@dataclass(frozen=True)
class MapPlan:
    """All of one tensor's map but the address. back_bytes: how far the address is moved back."""

    field: str  # of HopperFwdParams
    dtype: str
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int
    back_bytes: int

    def encode(self, kind: tensor_map.Kind, address: int) -> bytes:
        """The map of the tensor at `address`."""
        return tensor_map.encode(
            kind,
            self.dtype,
            address - self.back_bytes,
            self.dims,
            self.strides_bytes,
            self.box,
            self.swizzle_bytes,
        )


def plan_map(
    field: str,
    dtype: str,
    head_dim: int,
    sizes: tuple[int, int, int],
    strides: Strides,
    *,
    ragged: bool,
    box_rows: int,
    swizzle_bytes: int,
) -> MapPlan:
    """sizes: (batch, rows, heads); packed tensors have batch 1. strides: in elements."""
    batch, rows, heads = sizes
    batch_bytes, row_bytes, head_bytes = (
        # The stride of an axis of size 1 is 0 here and never used; TMA wants a plausible one.
        stride * ELEM_BYTES or -(-head_dim * ELEM_BYTES // VECTOR_BYTES) * VECTOR_BYTES
        for stride in strides
    )
    return MapPlan(
        field,
        dtype,
        dims=(head_dim, rows, heads, rows + 1 if ragged else 1, batch),
        strides_bytes=(row_bytes, head_bytes, row_bytes, batch_bytes),
        box=(swizzle_bytes // ELEM_BYTES, box_rows, 1, 1, 1),
        swizzle_bytes=swizzle_bytes,
        back_bytes=rows * row_bytes if ragged else 0,
    )


def address_setter(
    block: ParamBlock, plan: MapPlan, kind: tensor_map.Kind, example: int
) -> Callable[[int], None]:
    """A function that points the map in the block at another tensor of the same layout.

    example: any address of the tensor's alignment. Patching the address costs 0.1 us, encoding a
    map anew 1.5 us.
    """
    block.set(plan.field, plan.encode(kind, example))
    if not tensor_map.address_comes_first(kind):
        return lambda address: block.set(plan.field, plan.encode(kind, address))
    slot, back_bytes = block.tensor_map_slot(plan.field), plan.back_bytes

    def patch(address: int) -> None:
        slot.value = address - back_bytes

    return patch
