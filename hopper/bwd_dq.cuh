// The role of hopper/bwd.cu that has dQ: products of dS and K, added to dq_accum in memory.
// Included by bwd.cu only.
#pragma once
#include "common/device/global_wait.cuh"
#include "common/ptx/bulk.cuh"
#include "hopper/bwd_roles.cuh"

// dQ += dS K, added to dq_accum in memory. Sums depend on the order of the additions; if
// Cfg::kOrdered, key tiles take turns at each query tile, the first keys first, each warp with its
// rows. So a CTA waits for CTAs ahead of it in the launch only, which have started: key_work()
// gives those to the tiles before its own. All walk from their last query tile to their first:
// behind a window's right edge, where one begins, the ones ahead have been already.
struct DqRole : RoleBase {
  static constexpr i32 kColumns = round_up(Cfg::kHeadDimQk, 16);
  static constexpr i32 kPartColumns = Cfg::kWgmmaDqN;  // of one product; the last may be narrower
  static constexpr i32 kFullParts = kColumns / kPartColumns;
  static constexpr i32 kLastColumns = kColumns % kPartColumns;
  static_assert(kColumns <= kPartColumns || kPartColumns % Chunk::kCols == 0);
  static_assert(kLastColumns == 0 || (kLastColumns == Cfg::kWgmmaDqLastN && Cfg::kDqBuffers == 1));
  DsRing ds;
  i32 add_stage;
  u32 steps;

  DEVICE DqRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : RoleBase(p, tile, smem), ds(smem), add_stage(0), steps(0) {
    griddepcontrol_wait();  // bwd_preprocess.cu clears dq_accum
  }

  DEVICE void step(i32 head, i32 m_block) {
    const SeqlenInfo seq = tile.seq();
    const i32 batch_idx = tile.get(KeyTile::kBatchIdx);
    if constexpr (kCtas > 1) {
      const bool others = steps % 2 != rank();
      ++steps;
      if (others) {
        return;
      }
      if (keys_pending) {
        wait_phase(warp.smem + Smem::kBarKPeerFull, 0);
      }
    }
    wait_keys(Smem::kBarKFull);
    if constexpr (kCtas > 1) {
      wait_phase_cluster(ds.full(), ds.parity);
    } else {
      ds.wait();
    }
    const i32 first_row = m_block * kM + warp.warp_idx * 16;
    f32* strip = accum_rows<Cfg>(p, seq, batch_idx, head, 0, first_row);
    const Turn turn{strip, m_block, first_row < seq.seqlen_q};
    if constexpr (Cfg::kDqBuffers == 2) {
      overlapped(turn, strip, seq.seqlen_q - first_row);
      end(turn);
      return;
    }
#pragma unroll 1
    for (i32 m = 0; m < kM / 64; ++m) {
      const i32 rows = seq.seqlen_q - first_row - m * 64;
      f32* strip_m = strip + m * 64 * kColumns;
#pragma unroll 1
      for (i32 part = 0; part < kFullParts; ++part) {
        f32 rDq[kPartColumns / 2];
        issue<kPartColumns>(rDq, m, part * kPartColumns);
        if (m == 0 && part == 0) {
          begin(turn);
        }
        wgmma_wait_group<0>();
        add<kPartColumns>(rDq, strip_m, part * kPartColumns, rows);
      }
      if constexpr (kLastColumns > 0) {
        f32 rDq[Cfg::kWgmmaDqLastN / 2];
        issue<Cfg::kWgmmaDqLastN>(rDq, m, kFullParts * kPartColumns);
        wgmma_wait_group<0>();
        add<Cfg::kWgmmaDqLastN>(rDq, strip_m, kFullParts * kPartColumns, rows);
      }
    }
    release_ds();
    end(turn);
  }

  DEVICE void finish() const {
    if (Cfg::kAddStages > 0 && warp.leads()) {
      tma_store_wait_group<0>();  // shared memory lives as long as the CTA
    }
  }

 private:
  // This key tile's, at the rows that a warp has of a query tile.
  struct Turn {
    const f32* strip;
    i32 m_block;
    bool any;  // rows of the sequence
  };

  // Waits for the key tiles ahead.
  DEVICE void begin(const Turn& turn) const {
    if constexpr (Cfg::kOrdered) {
      if (turn.any && warp.leads()) {
        constexpr i32 kKeys = kCtas * kN;
        const i32 ahead = tile.get(KeyTile::kFirstKey) / kKeys -
                          first_key_tile<Cfg>(p, tile.seq(), turn.m_block, kKeys);
        wait_global_at_least(strip_counter<Cfg>(p, turn.strip), u32(ahead));
        if constexpr (Cfg::kAddStages > 0) {
          fence_proxy_async_global();
        }
      }
      warp_sync();
    }
  }

  // Lets the next one add, once this one's additions are in memory.
  DEVICE void end(const Turn& turn) const {
    if constexpr (Cfg::kOrdered) {
      if constexpr (Cfg::kAddStages == 0) {
        fence_acq_rel_gpu();
        warp_sync();
      }
      if (turn.any && warp.leads()) {
        if constexpr (Cfg::kAddStages > 0) {
          tma_store_wait_group<0>();
        }
        red_release_global_add_u32(strip_counter<Cfg>(p, turn.strip), 1);
      }
    }
  }

  // The same with the next part's product on its way while a part is added.
  DEVICE void overlapped(const Turn& turn, f32* strip, i32 rows) {
    constexpr i32 kParts = kM / 64 * kFullParts;
    f32 rDq[2][kPartColumns / 2];
    issue<kPartColumns>(rDq[0], 0, 0);
    begin(turn);
#pragma unroll
    for (i32 i = 0; i < kParts; ++i) {
      const i32 m = i / kFullParts;
      if (i + 1 < kParts) {
        issue<kPartColumns>(rDq[(i + 1) % 2], (i + 1) / kFullParts,
                            (i + 1) % kFullParts * kPartColumns);
        wgmma_wait_group<1>();
      } else {
        wgmma_wait_group<0>();
        release_ds();
      }
      add<kPartColumns>(rDq[i % 2], strip + m * 64 * kColumns, i % kFullParts * kPartColumns,
                        rows - m * 64);
    }
  }

  DEVICE void release_ds() {
    if constexpr (kCtas > 1) {
      if (warp.leads()) {
        mbarrier_arrive_cluster(
            mapa_shared_cluster(warp.smem + Smem::kBarSentEmpty + ds.stage * 8, rank() ^ 1u));
      }
    }
    ds.release(warp.leads());
  }

  // rDq = kCols columns of dS K from `column` on, of 64 queries from 64 * m on.
  template <i32 kCols>
  DEVICE void issue(f32 (&rDq)[kCols / 2], i32 m, i32 column) const {
    const u64 desc_a = Chunk::k_major(ds.tile() + u32(m * 64 * 128));
    const u32 chunks = u32(column / Chunk::kCols) * kKeyChunkBytes;
    const u64 desc_own = Chunk::mn_major(warp.smem + Smem::kK + chunks, kKeyChunkBytes);
    const u64 desc_other = Chunk::mn_major(warp.smem + Smem::kKPeer + chunks, kKeyChunkBytes);
    wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kCtas * kN / 16; ++k) {
      wgmma_ss<Cfg::kBf16, true>(
          rDq, wgmma_desc_advance(desc_a, Chunk::k_major_step(k, kQueryChunkBytes)),
          wgmma_desc_advance(k < kN / 16 ? desc_own : desc_other,
                             Chunk::mn_major_step(k % (kN / 16))),
          k > 0);
    }
    wgmma_commit_group();
  }

  // strip: of this warp's 16 rows. rows: of the sequence from there on.
  template <i32 kCols>
  DEVICE void add(f32 (&rDq)[kCols / 2], f32* strip, i32 column, i32 rows) {
    wgmma_hold(rDq);
    if (rows <= 0) {
      return;
    }
    f32* dst = strip + column / 8 * kFragmentFloats;
    if constexpr (Cfg::kAddStages > 0) {
      add_staged<kCols>(dst, rDq);
    } else {
#pragma unroll
      for (i32 j = 0; j < kCols / 8; ++j) {
        const f32 fragment[4] = {rDq[4 * j], rDq[4 * j + 1], rDq[4 * j + 2], rDq[4 * j + 3]};
        red_global_add_v4_f32(dst + j * kFragmentFloats + warp.lane_idx * 4, fragment);
      }
    }
  }

  // By one bulk addition of the warp, through shared memory.
  template <i32 kCols>
  DEVICE void add_staged(f32* dst, const f32 (&rDq)[kCols / 2]) {
    if (warp.leads()) {
      tma_store_wait_group_read<Cfg::kAddStages - 1>();
    }
    warp_sync();
    const u32 stage =
        warp.smem + Smem::kStage + u32(add_stage * 4 + warp.warp_idx) * (64 * kPartColumns);
#pragma unroll
    for (i32 j = 0; j < kCols / 8; ++j) {
      const u32 words[4] = {f32_as_bits(rDq[4 * j]), f32_as_bits(rDq[4 * j + 1]),
                            f32_as_bits(rDq[4 * j + 2]), f32_as_bits(rDq[4 * j + 3])};
      st_shared_v4(stage + u32(j * 512 + warp.lane_idx * 16), words);
    }
    fence_proxy_async_shared();
    warp_sync();
    if (warp.leads()) {
      bulk_reduce_add_f32(dst, stage, kCols * 64);
      tma_store_commit_group();
    }
    add_stage = add_stage + 1 == Cfg::kAddStages ? 0 : add_stage + 1;
  }
};
