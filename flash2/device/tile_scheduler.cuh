// Which query tile a CTA works on. One CTA, one tile; grids are one-dimensional, so batch * heads
// may exceed 65535. Order: groups of units (a unit is one head of one sequence, or one head of all
// packed sequences) whose K and V fit in L2; inside a group the tiles with most keys first, units
// fastest.
#pragma once
#include "common/device/elem.cuh"
#include "common/device/params.cuh"
#include "common/device/seqlen.cuh"
#include "common/ptx/shuffle.cuh"

struct Work {
  i32 batch_idx, head_idx;
  i32 first_row;  // of the tile, within its sequence
  SeqlenInfo seq;
};

// Packed sequences: tile `tile` of one head. Tiles past the last sequence clear the rows behind
// cu_seqlens[batch], as many as the packed buffer has: the host launches ceil(total_q / kBlockM) +
// batch tiles, always enough for both.
template <class Cfg>
DEVICE Work packed_tile(const FwdParams& p, i32 tile, i32 head_idx, i32 lane_idx) {
  Work work;
  work.head_idx = head_idx;
  i32 first = 0;  // tiles of the sequences before this round's 32
  for (i32 base = 0; base < p.batch; base += 32) {
    const i32 b = base + lane_idx;
    i32 tiles = 0;
    if (b < p.batch) {
      tiles = ceil_div(ld_global_i32(p.cu_seqlens_q + b + 1) - ld_global_i32(p.cu_seqlens_q + b),
                       Cfg::kBlockM);
    }
    i32 end = tiles;  // inclusive prefix sum
#pragma unroll
    for (i32 delta = 1; delta < 32; delta *= 2) {
      const i32 before = i32(shfl_up_u32(u32(end), delta));
      end += lane_idx >= delta ? before : 0;
    }
    const u32 behind = vote_ballot(
        first + end <= tile);  // sequences that end before this tile: a run of low lanes
    if (behind != 0xffffffffu) {
      i32 owner = 0;
      while ((behind >> owner) & 1u) {
        ++owner;
      }
      const i32 owner_end = first + i32(shfl_idx_u32(u32(end), owner));
      work.batch_idx = base + owner;
      work.seq = seqlen_info<Cfg>(p, work.batch_idx);
      work.first_row =
          (owner_end - 1 - tile) * Cfg::kBlockM;  // last rows first: they see most keys when causal
      return work;
    }
    first += i32(shfl_idx_u32(u32(end), 31));
  }
  const i32 packed_rows = ld_global_i32(p.cu_seqlens_q + p.batch);
  work.batch_idx = 0;
  work.first_row = (tile - first) * Cfg::kBlockM;
  work.seq = SeqlenInfo{packed_rows, 0, p.total_q - packed_rows, 0, 0, 0};
  return work;
}

template <class Cfg>
DEVICE Work this_work(const FwdParams& p, i32 lane_idx) {
  // Nothing here exceeds the grid, so unsigned 32 bits do: the divisions stand before a CTA's first
  // copy, and these are the short ones.
  const u32 tiles_per_group = u32(p.units_per_group) * u32(p.tiles_per_unit);
  const u32 group = u32(block_idx()) / tiles_per_group;
  const u32 in_group = u32(block_idx()) - group * tiles_per_group;
  const u32 first_unit = group * u32(p.units_per_group);
  const u32 units = u32(imin(p.units_per_group, p.num_units - i32(first_unit)));
  const i32 rank = i32(in_group / units);
  const i32 unit = i32(first_unit + in_group % units);
  if constexpr (Cfg::kVarlenQ) {
    return packed_tile<Cfg>(p, rank, unit, lane_idx);
  } else {
    Work work;
    work.batch_idx = unit / p.num_heads_q;
    work.head_idx = unit % p.num_heads_q;
    work.first_row = (p.tiles_per_unit - 1 - rank) * Cfg::kBlockM;
    work.seq = seqlen_info<Cfg>(p, work.batch_idx);
    return work;
  }
}
