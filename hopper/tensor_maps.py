"""How hopper_fwd and hopper_bwd see their tensors: one TMA tensor map each, patched with an address
per call.

Maps have the dims (column, row, head, 1, batch). A packed or partly used tensor is "ragged": its
sequences end at lengths that only the device knows, and what lies behind must neither be read as
keys nor be written. Its maps have the dims (column, row, head, end of the sequence, wrap), and a
sequence is addressed by its end: rows count from `RAGGED_ROWS - length`, so that the sequence ends
where the second dim does and TMA clips there; the fourth dim, a second axis of rows, is moved to
the sequence's end. The sum is RAGGED_ROWS rows too far, which the fifth coordinate takes back:
addresses are computed modulo 2**64, and RAGGED_ROWS times its stride is 2**64 less those rows.
Moving the map's address back instead would save that dim, but then it may lie outside of every
allocation, which no documentation allows.
See `row_coords.cuh`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flash_attn_interface._common.ask.backward_problem import BackwardProblem
from flash_attn_interface._common.ask.problem import Problem, Strides
from flash_attn_interface._common.launch import tensor_map
from flash_attn_interface._common.params import ParamBlock

from .fwd_tiles import ELEM_BYTES, WG_ROWS

# TMA: addresses and strides are multiples of this.
VECTOR_BYTES = 16
# Rows of a ragged map's second dim, kRaggedRows in row_coords.cuh.
RAGGED_ROWS = 2**30
# Strides of maps are below this; of a ragged map's rows below 2**64 / RAGGED_ROWS, which leaves the
# fifth dim a stride.
END_OF_STRIDES_BYTES = 2**40


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
        reason = refuses_strides(name, strides, varlen or (name != "q" and p.has_seqused_k))
        if reason is not None:
            return reason
    if p.has_seqused_k and not p.varlen_k:
        for name, strides in (("k", p.k_strides), ("v", p.v_strides)):
            if p.batch > 1 and strides[1] and strides[0] % strides[1]:
                return (
                    f"with seqused_k TMA finds sequences by rows: {name}'s batch stride of "
                    f"{strides[0]} must be a multiple of its row stride of {strides[1]}"
                )
            if ragged_rows(p, strides) >= RAGGED_ROWS:
                return f"{name} spans {ragged_rows(p, strides)} rows, over {RAGGED_ROWS - 1}"
    return None


def refuses_strides(name: str, strides: Strides, ragged: bool) -> str | None:
    """Whether they are too wide for a tensor map."""
    for axis, stride in zip(("batch", "row", "head"), strides, strict=True):
        end = 2**64 // RAGGED_ROWS if ragged and axis == "row" else END_OF_STRIDES_BYTES
        if stride * ELEM_BYTES >= end:
            return f"{name}'s {axis} stride of {stride} elements is not below {end} bytes"
    return None


def batch_rows(problem: Problem, strides: Strides) -> int:
    """Rows from one sequence of k or v to the next; 0 where cu_seqlens say."""
    if problem.varlen_k or problem.batch == 1:
        return 0
    return strides[0] // strides[1] if strides[1] else 1  # sequences of one row: see plan_map


def ragged_rows(problem: Problem, strides: Strides) -> int:
    """Rows of all of k or v, with those between sequences; 0 if no sequence ends early."""
    p = problem
    if p.varlen_k:
        return p.total_k
    return (p.batch - 1) * batch_rows(p, strides) + p.seqlen_k if p.has_seqused_k else 0


@dataclass(frozen=True)
class Side:
    """A tensor that the backward loads by TMA."""

    name: str
    of_queries: bool
    head_dim: int
    sizes: tuple[int, int, int]  # (batch, rows, heads); packed tensors have batch 1
    strides: Strides
    varlen: bool
    ragged: bool  # sequences end at lengths that only the device knows

    @property
    def batch_rows(self) -> int:
        """Rows from one sequence to the next; 0 where cu_seqlens say, or nothing is ragged."""
        batch, _, _ = self.sizes
        if self.varlen or not self.ragged or batch == 1:
            return 0
        return self.strides[0] // self.strides[1] if self.strides[1] else 1

    @property
    def ragged_rows(self) -> int:
        """Rows of the whole tensor, with those between sequences; 0 if no sequence ends early."""
        batch, rows, _ = self.sizes
        return (batch - 1) * self.batch_rows + rows if self.ragged else 0


def sides(problem: BackwardProblem) -> tuple[Side, ...]:
    """dout, q, k and v."""
    p = problem.forward
    rows_q = (1, p.total_q) if p.varlen_q else (p.batch, p.seqlen_q)
    rows_k = (1, p.total_k) if p.varlen_k else (p.batch, p.seqlen_k)
    ragged_q, ragged_k = p.varlen_q or p.has_seqused_q, p.varlen_k or p.has_seqused_k
    sizes_q, sizes_k, sizes_v = (
        (*rows, heads)
        for rows, heads in (
            (rows_q, p.num_heads_q), (rows_k, p.num_heads_k), (rows_k, p.num_heads_v)
        )
    )  # fmt: skip
    qk, v = p.head_dim_qk, p.head_dim_v
    return (
        Side("dout", True, v, sizes_q, problem.dout_strides, p.varlen_q, ragged_q),
        Side("q", True, qk, sizes_q, p.q_strides, p.varlen_q, ragged_q),
        Side("k", False, qk, sizes_k, p.k_strides, p.varlen_k, ragged_k),
        Side("v", False, v, sizes_v, p.v_strides, p.varlen_k, ragged_k),
    )


def refuses_backward_layout(problem: BackwardProblem) -> str | None:
    """Why TMA cannot address the tensors of a backward; None if it can."""
    if problem.vector_bytes < VECTOR_BYTES:
        return (
            f"TMA needs pointers and strides of q, k, v and dout in multiples of {VECTOR_BYTES} "
            f"bytes, these are multiples of {problem.vector_bytes}"
        )
    for side in sides(problem):
        for axis, stride, size in zip(
            ("batch", "row", "head"), side.strides, side.sizes, strict=True
        ):
            if stride == 0 and size > 1:
                return f"{side.name} is expanded along its {axis} axis (stride 0)"
        if side.ragged and not side.varlen:
            batch_stride, row_stride, _ = side.strides
            if side.sizes[0] > 1 and row_stride and batch_stride % row_stride:
                return (
                    f"with lengths on the device TMA finds sequences by rows: {side.name}'s batch "
                    f"stride of {batch_stride} must be a multiple of its row stride of {row_stride}"
                )
        reason = refuses_strides(side.name, side.strides, side.ragged)
        if reason is not None:
            return reason
        if side.ragged_rows >= RAGGED_ROWS:
            return f"{side.name} spans {side.ragged_rows} rows, over {RAGGED_ROWS - 1}"
    return None


@dataclass(frozen=True)
class MapPlan:
    """All of one tensor's map but the address."""

    field: str  # of HopperFwdParams or HopperBwdParams
    dtype: str
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int

    def encode(self, kind: tensor_map.Kind, address: int) -> bytes:
        """The map of the tensor at `address`."""
        return tensor_map.encode(
            kind,
            self.dtype,
            address,
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
    ragged_rows: int = 0,
    box_rows: int,
    swizzle_bytes: int,
) -> MapPlan:
    """sizes: (batch, rows, heads); packed tensors have batch 1. strides: in elements.

    ragged_rows: of the whole tensor, one past the last that may be touched; 0 if not ragged.
    """
    batch, rows, heads = sizes
    if ragged_rows and strides[1] == 0:  # sequences of one row: the next row is the next sequence's
        strides = (strides[0], strides[0], strides[2])
    batch_bytes, row_bytes, head_bytes = (
        # The stride of an axis of size 1 is 0 here and never used; TMA wants a plausible one.
        stride * ELEM_BYTES or -(-head_dim * ELEM_BYTES // VECTOR_BYTES) * VECTOR_BYTES
        for stride in strides
    )
    dims = (head_dim, rows, heads, 1, batch)
    if ragged_rows:
        # Extents no larger than coordinates get: whatever cu_seqlens hold, nothing else is read.
        dims = (head_dim, RAGGED_ROWS, heads, ragged_rows + 1, RAGGED_ROWS + 1)
        batch_bytes = 2**64 // RAGGED_ROWS - row_bytes
    return MapPlan(
        field,
        dtype,
        dims,
        strides_bytes=(row_bytes, head_bytes, row_bytes, batch_bytes),
        box=(swizzle_bytes // ELEM_BYTES, box_rows, 1, 1, 1),
        swizzle_bytes=swizzle_bytes,
    )


def plan_packed_heads_map(
    field: str,
    dtype: str,
    head_dim: int,
    sizes: tuple[int, int, int],
    strides: Strides,
    *,
    group: int,
    swizzle_bytes: int,
) -> MapPlan:
    """q of packed GQA (gqa_packing.py): boxes of the same rows of `group` heads, heads fastest.

    Dims: (column, head of the group, row, group, batch). Sequences need no end here, as in
    fwd_producer.cuh.
    """
    batch, rows, heads = sizes
    batch_bytes, row_bytes, head_bytes = (
        stride * ELEM_BYTES or -(-head_dim * ELEM_BYTES // VECTOR_BYTES) * VECTOR_BYTES
        for stride in strides
    )
    return MapPlan(
        field,
        dtype,
        dims=(head_dim, group, rows, heads // group, batch),
        strides_bytes=(head_bytes, row_bytes, group * head_bytes, batch_bytes),
        box=(swizzle_bytes // ELEM_BYTES, group, WG_ROWS // group, 1, 1),
        swizzle_bytes=swizzle_bytes,
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
    slot = block.tensor_map_slot(plan.field)

    def patch(address: int) -> None:
        slot.value = address

    return patch
