// Which query tile a CTA of a Hopper kernel works on next, and how it learns of it. CTAs stay; they
// draw tiles from a counter, so that none waits for another.
// Order: groups of units (a unit is one head, or kGqaGroup heads that share their tiles, of one
// sequence or of all packed sequences) whose K and V fit in L2; inside a group the tiles with most
// keys first, units fastest.
#pragma once
#include "common/device/mask.cuh"
#include "common/device/packed_tiles.cuh"
#include "common/device/params.cuh"
#include "common/device/seqlen.cuh"
#include "hopper/pipeline.cuh"

// One query tile. In shared memory it is a record of kWorkBytes, written by the scheduler's warp.
struct Work {
  i32 batch_idx;  // negative: there is no more work
  i32 head_idx;   // the first one of Cfg::kGqaGroup
  i32 first_row;  // of the tile, within its sequence
  SeqlenInfo seq;

  DEVICE bool valid() const { return batch_idx >= 0; }
};
// Behind the Work in a record: key tiles of the CTA and of each of its up to four times 64 rows,
// with a window or chunks. Finding them takes divisions, and tensor cores wait while every warp
// does: 4 % of the time with chunks of 1024. Else they are cheap, and cost fewer registers found
// than read.
constexpr u32 kRangesAt = 32, kRangeBytes = 16;
constexpr u32 kWorkBytes = kRangesAt + 5 * kRangeBytes;
template <class Cfg>
constexpr bool kPublishesTiles = Cfg::kLocal || Cfg::kChunk;
template <class Cfg>
constexpr i32 kSlices = Cfg::kNumMmaWarpgroups / Cfg::kVSplit;

// rows: 0 for all rows of the tile, 1 + s for its s-th 64.
template <class Cfg>
DEVICE TileRange find_tiles(const HopperFwdParams& p, const Work& work, i32 rows) {
  constexpr i32 kSliceRows = Cfg::kQueryRows / kSlices<Cfg>;
  return key_tiles<Cfg>(p, work.seq, work.first_row + imax(rows - 1, 0) * kSliceRows,
                        rows == 0 ? Cfg::kQueryRows : kSliceRows);
}

DEVICE void write_work(u32 addr, const Work& work) {
  st_shared_v4(
      addr, {u32(work.batch_idx), u32(work.head_idx), u32(work.first_row), u32(work.seq.slot_q)});
  st_shared_v4(addr + 16, {u32(work.seq.q_row), u32(work.seq.k_row), u32(work.seq.seqlen_q),
                           u32(work.seq.seqlen_k)});
}

DEVICE Work read_work(u32 addr) {
  u32 a[4], b[4];
  ld_shared_v4(a, addr);
  ld_shared_v4(b, addr + 16);
  return {i32(a[0]),
          i32(a[1]),
          i32(a[2]),
          {i32(b[0]), i32(b[1]), i32(a[3]), i32(b[2]), i32(b[3]), i32(b[3]) - i32(b[2])}};
}

// Tile `tile` of the launch. All lanes of a warp call it together. The rows behind the last packed
// sequence are tiles of a sequence without queries and keys: they get the defined empty row.
template <class Cfg>
DEVICE Work decode_tile(const HopperFwdParams& p, i32 tile, i32 lane_idx) {
  const i32 tiles_per_group = p.units_per_group * p.tiles_per_unit;
  const i32 group = tile / tiles_per_group;
  const i32 in_group = tile - group * tiles_per_group;
  const i32 first_unit = group * p.units_per_group;
  const i32 units = imin(p.units_per_group, p.num_units - first_unit);
  const i32 rank = in_group / units;
  const i32 unit = first_unit + in_group - rank * units;
  Work work;
  i32 tile_in_sequence;
  if constexpr (Cfg::kVarlenQ) {
    const PackedTile found =
        find_packed_tile<Cfg::kQueryRows>(p.cu_seqlens_q, p.batch, rank, lane_idx);
    work.head_idx = unit * Cfg::kGqaGroup;
    if (found.batch_idx == p.batch) {
      const i32 packed_rows = ld_global_i32(p.cu_seqlens_q + p.batch);
      work.batch_idx = 0;
      work.first_row = found.tile * Cfg::kQueryRows;
      work.seq = SeqlenInfo{packed_rows, 0, p.total_q - packed_rows, 0, 0, 0};
      return work;
    }
    work.batch_idx = found.batch_idx;
    tile_in_sequence = found.tile;
  } else {
    const i32 units_per_sequence = p.num_heads_q / Cfg::kGqaGroup;
    work.batch_idx = unit / units_per_sequence;
    work.head_idx = (unit - work.batch_idx * units_per_sequence) * Cfg::kGqaGroup;
    tile_in_sequence = rank;
  }
  work.seq = seqlen_info<Cfg>(p, work.batch_idx);
  // Last rows first: they see most keys when causal.
  work.first_row =
      (ceil_div(work.seq.slot_q, Cfg::kQueryRows) - 1 - tile_in_sequence) * Cfg::kQueryRows;
  return work;
}

// The scheduler hands its tiles to the CTA's other warps through kSlots records, the i-th through
// record i % kSlots.
//   full[slot]: signalled by the scheduler. Waited on by producer and consumers.
//   taken:      signalled by the producer a little before the end of a tile. Waited on by the
//               scheduler, which then draws the next one: claiming earlier would unbalance the end
//               of the launch.
// A record is overwritten only kSlots - 1 tiles later, when the producer has seen the Q buffers of
// its tile empty again, and so everyone is done with it.
template <u32 kRecords, u32 kFull, u32 kTaken>
struct WorkQueue {
  static constexpr i32 kSlots = 4;
  u32 smem;

  DEVICE explicit WorkQueue(u32 smem) : smem(smem) {}

  DEVICE void init() const {
    for (i32 i = 0; i < kSlots; ++i) {
      mbarrier_init(smem + kFull + u32(8 * i), 1);
    }
    mbarrier_init(smem + kTaken, 1);
  }

  DEVICE u32 record(i32 i) const { return smem + kRecords + u32(i % kSlots) * kWorkBytes; }

  DEVICE Work wait(i32 i) const {
    wait_phase(smem + kFull + u32(i % kSlots * 8), u32(i / kSlots) & 1u);
    return read_work(record(i));
  }

  // Key tiles of `work`, which wait(i) returned. rows: 0 for those of the CTA, 1 + s for its
  // s-th 64.
  template <class Cfg>
  DEVICE TileRange row_tiles(const HopperFwdParams& p, i32 i, const Work& work, i32 rows) const {
    if constexpr (kPublishesTiles<Cfg>) {
      u32 a[4];
      ld_shared_v4(a, record(i) + kRangesAt + u32(rows) * kRangeBytes);
      return {i32(a[0]), i32(a[1]), i32(a[2]), i32(a[3])};
    }
    return find_tiles<Cfg>(p, work, rows);
  }

  DEVICE void take() const { mbarrier_arrive(smem + kTaken); }

  // The scheduler's role, by one warp. The launch draws one tile per tile worked on, so the draw
  // that returns num_tiles - 1 is the last; it sets the counter back for the next launch.
  template <class Cfg>
  DEVICE void schedule(const HopperFwdParams& p, i32 lane_idx) const {
    i32 tile = block_idx();
    for (i32 i = 0;; ++i) {
      Work work;
      work.batch_idx = -1;
      while (tile < p.num_tiles) {
        work = decode_tile<Cfg>(p, tile, lane_idx);
        if (work.first_row < work.seq.slot_q) {
          break;
        }
        tile = draw(p, tile, lane_idx);  // past the end of a packed buffer
        work.batch_idx = -1;
      }
      publish<Cfg>(p, i, work, lane_idx);
      if (!work.valid()) {
        break;
      }
      wait_phase(smem + kTaken, u32(i) & 1u);
      tile = draw(p, tile, lane_idx);
    }
    if (p.tile_counter != nullptr && lane_idx == 0 && tile == p.num_tiles + grid_dim() - 1) {
      st_global_u32(p.tile_counter, 0);
    }
  }

 private:
  // Lane 0 writes the work itself, and lane s the key tiles of rows s, as row_tiles() reads them.
  template <class Cfg>
  DEVICE void publish(const HopperFwdParams& p, i32 i, const Work& work, i32 lane_idx) const {
    if constexpr (kPublishesTiles<Cfg>) {
      static_assert(kRangesAt + (1 + kSlices<Cfg>)*kRangeBytes <= kWorkBytes);
      if (lane_idx <= kSlices<Cfg>) {
        TileRange tiles{0, 0, 0, 0};
        if (work.valid()) {
          tiles = find_tiles<Cfg>(p, work, lane_idx);
        }
        st_shared_v4(
            record(i) + kRangesAt + u32(lane_idx) * kRangeBytes,
            {u32(tiles.begin), u32(tiles.end), u32(tiles.interior_begin), u32(tiles.interior_end)});
      }
    }
    if (lane_idx == 0) {
      write_work(record(i), work);
    }
    warp_sync();
    if (lane_idx == 0) {
      mbarrier_arrive(smem + kFull + u32(i % kSlots * 8));
    }
  }

  DEVICE static i32 draw(const HopperFwdParams& p, i32 tile, i32 lane_idx) {
    if (p.tile_counter == nullptr) {
      return tile + grid_dim();
    }
    u32 drawn = 0;
    if (lane_idx == 0) {
      drawn = atomic_add_global_u32(p.tile_counter, 1);
    }
    return i32(shfl_idx_u32(drawn, 0)) + grid_dim();
  }
};
