// The output roles of hopper/fwd_wide.cu: a warpgroup holds a half of the columns of O of all rows.
// Included by fwd_wide.cu only.
#pragma once
#include "common/ptx/memory.cuh"
#include "common/ptx/shuffle.cuh"
#include "common/ptx/wgmma.cuh"
#include "hopper/softmax.cuh"
#include "hopper/wide_layout.cuh"

template <i32 kHalf>
struct OutputRole {
  const HopperFwdParams& p;
  u32 smem;
  i32 warp_idx, lane_idx;
  VRing<kHalf> values;
  RecordRing records;
  f32 rO[kPartsV][kRegsO];

  DEVICE OutputRole(const HopperFwdParams& p, u32 smem)
      : p(p),
        smem(smem),
        warp_idx(thread_idx() / 32 % 4),
        lane_idx(thread_idx() % 32),
        values(smem),
        records(smem) {}

  DEVICE bool leads_warp() const { return lane_idx == 0; }

  // Of the record that the ring is at: what this lane's two rows of O are multiplied by.
  DEVICE void read_factors(f32 (&factor)[2]) const {
    const u32 at = factor_address(records.tile(), warp_idx, lane_idx);
    factor[0] = ld_shared_f32(at);
    factor[1] = ld_shared_f32(at + 32);
  }

  DEVICE void release_record() {
    warp_sync();
    records.release(leads_warp());
  }

  // O = O * factors + P V of the next key tile, a piece of V at a time. A piece is released once
  // the next one's products are issued.
  DEVICE void step() {
    records.wait();
    f32 factor[2];
    read_factors(factor);
    if (vote_any(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (i32 part = 0; part < kPartsV; ++part) {
#pragma unroll
        for (i32 i = 0; i < kRegsO; ++i) {
          rO[part][i] *= factor[row_of(i)];
        }
      }
    }
    u32 rP[kStepsPv][4];
#pragma unroll
    for (i32 k = 0; k < kStepsPv; ++k) {
      ld_shared_v4(rP[k], fragment_address(records.tile(), warp_idx, k, lane_idx));
    }
    release_record();
    VRing<kHalf> behind = values;
#pragma unroll
    for (i32 part = 0; part < kPartsV; ++part) {
      values.wait();
      wgmma_fence();
      const u64 desc_v = Chunk::mn_major(values.tile(), kBoxBytes);
#pragma unroll
      for (i32 k = 0; k < kStepsPv; ++k) {
        wgmma_rs<Cfg::kBf16, true>(rO[part], rP[k],
                                   wgmma_desc_advance(desc_v, Chunk::mn_major_step(k)), true);
      }
      wgmma_commit_group();
      values.advance();
      if (part > 0) {
        wgmma_wait_group<1>();
        behind.release(leads_warp());
      }
    }
    wgmma_wait_group<0>();
#pragma unroll
    for (i32 part = 0; part < kPartsV; ++part) {
      wgmma_hold(rO[part]);
    }
    behind.release(leads_warp());
  }

  // O straight from registers, in the rows that the sequence owns. A factor of 0 is a row without
  // visible keys, where V that no query sees may hold NaN.
  DEVICE void store(const Work& work) {
    records.wait();
    f32 factor[2];
    read_factors(factor);
    release_record();
    const i32 first_col = kHalf * kHalfColumns + 2 * (lane_idx % 4);
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 row_of_tile = warp_idx * 16 + lane_idx / 4 + 8 * r;
      const i32 query_row = work.first_row + row_of_tile / kGqaGroup;
      if (row_of_tile >= kWgQueries * kGqaGroup || query_row >= work.seq.slot_q) {
        continue;
      }
      // Of first_col: the other columns are immediate offsets from there.
      char* out = static_cast<char*>(p.out) +
                  2 * (work.batch_idx * p.out_batch_stride +
                       (work.seq.q_row + query_row) * p.out_row_stride +
                       (work.head_idx + row_of_tile % kGqaGroup) * p.out_head_stride + first_col);
#pragma unroll
      for (i32 part = 0; part < kPartsV; ++part) {
#pragma unroll
        for (i32 i = 2 * r; i < kRegsO; i += 4) {
          const i32 col = part * Cfg::kWgmmaPvN + 8 * (i / 4);
          if (2 * kHalfColumns == Cfg::kHeadDimV || col < Cfg::kHeadDimV - first_col) {
            const u32 pair =
                pack2<Cfg::kBf16>(rO[part][i] * factor[r], rO[part][i + 1] * factor[r]);
            st_global_u32(out + 2 * col, factor[r] == 0.0f ? 0 : pair);
          }
        }
      }
    }
  }

  DEVICE void run() {
    const Queue queue(smem);
    for (i32 i = 0;; ++i) {
      const Work work = queue.wait(i);
      if (!work.valid()) {
        break;
      }
      const TileRange tiles = queue.row_tiles<Cfg>(p, i, work, 0);
      warp_sync();
      if (leads_warp()) {
        queue.take();
      }
#pragma unroll
      for (i32 part = 0; part < kPartsV; ++part) {
#pragma unroll
        for (i32 j = 0; j < kRegsO; ++j) {
          rO[part][j] = 0.0f;
        }
      }
#pragma unroll 1
      for (i32 n_block = tiles.begin; n_block < tiles.end; ++n_block) {
        step();
      }
      store(read_work(queue.record(i)));
    }
  }
};
