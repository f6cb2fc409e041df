// Who computes what in hopper/bwd.cu: the warpgroups that have scores and dK, dV, in two divisions
// of work, and the one that has dQ. Included by bwd.cu only. docs/hopper_backward_schedule.md draws
// who does what when.
#pragma once
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "hopper/bwd_epilogue.cuh"
#include "hopper/bwd_layout.cuh"
#include "hopper/bwd_scores.cuh"

enum NamedBarrier {
  kBarSend = 1,  // + key block: dS^T of the block lies ready for the other CTA
};

// A warp's end of what several roles do.
struct RoleBase {
  const HopperBwdParams& p;
  const KeyTile& tile;
  Warp warp;
  bool keys_pending;

  DEVICE RoleBase(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : p(p), tile(tile), warp(smem), keys_pending(true) {}

  DEVICE u32 rank() const { return kCtas > 1 ? u32(tile.get(KeyTile::kRank)) : 0; }
  // The first step that needs K or V waits for it. bar: Smem::kBarKFull or kBarVFull.
  DEVICE void wait_keys(u32 bar) {
    if (keys_pending) {
      wait_phase(warp.smem + bar, 0);
      keys_pending = false;
    }
  }
};

DEVICE void wait_phase_cluster(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity_cluster(bar, parity)) {
  }
}

// Hands dS^T to the warpgroup that makes dQ of it: this CTA's, or in every other step the other's.
struct DsWriter {
  u32 rank;
  DsRing own;
  u32 sent_stage = 0, sent_parity = 1;
  u32 step = 0;

  DEVICE DsWriter(u32 smem, u32 rank) : rank(rank), own(smem) {}

  // Of key block `block`. first, last: of the blocks of a step that this warp hands over.
  DEVICE void put(const Packed& rDs, const Warp& warp, i32 block, bool first, bool last) {
    const u32 in_tile = u32(block) * kQueryChunkBytes;
    if (kCtas == 1 || step % 2 == rank) {
      if (first) {
        own.wait_empty();
      }
      store_ds(own.tile() + in_tile, rDs, warp);
      warp_sync();
      if (warp.leads()) {
        if constexpr (kCtas > 1) {  // a fourth of a block of the other CTA's
          mbarrier_arrive_expect_tx(own.full(), kQueryChunkBytes / 4);
        } else {
          mbarrier_arrive(own.full());
        }
      }
      if (last) {
        own.advance();
      }
    } else {
      if (first) {
        wait_phase_cluster(warp.smem + Smem::kBarSentEmpty + sent_stage * 8, sent_parity);
      }
      const u32 from = warp.smem + Smem::kSentDs + sent_stage * Smem::kOwnDsBytes + in_tile;
      const u32 to =
          warp.smem + Smem::kDs + sent_stage * Smem::kDsBytes + Smem::kOwnDsBytes + in_tile;
      store_ds(from, rDs, warp);
      named_barrier_sync(kBarSend + block, 128);
      if (warp.warp_idx == 0 && warp.leads()) {
        bulk_copy_to_cluster(
            mapa_shared_cluster(to, rank ^ 1u), from, kQueryChunkBytes,
            mapa_shared_cluster(warp.smem + Smem::kBarDsFull + sent_stage * 8, rank ^ 1u));
      }
      if (last) {
        const bool end = sent_stage + 1 == Cfg::kStagesDs;
        sent_stage = end ? 0 : sent_stage + 1;
        sent_parity ^= end ? 1u : 0u;
      }
    }
    step += last ? 1u : 0u;
  }
};

// Joint division: all of S^T, dP^T, dV and dK of 64 keys.
struct KeyRole : RoleBase {
  i32 block;
  QRing q;
  DoRing dos;
  DsWriter ds;
  DkSum rDk;
  DvSum rDv;

  DEVICE KeyRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem, i32 block)
      : RoleBase(p, tile, smem), block(block), q(smem), dos(smem), ds(smem, rank()) {
    clear(rDk);
    clear(rDv);
  }

  DEVICE i32 first_row() const { return block * 64 + warp.warp_idx * 16; }

  DEVICE void step(i32 head, i32 m_block) {
    const u32 rows = u32(block * 64 * 128);
    const ScoreTile scores{p, tile, first_row(), warp.lane_idx};
    f32 rS[kRegsS];
    Packed rP, rX;
    if (keys_pending) {
      wait_phase(warp.smem + Smem::kBarKFull, 0);
    }
    q.wait();
    wgmma_fence();
    issue_scores<Cfg::kHeadDimQk, Cfg::kAuxLse>(rS, warp.smem + Smem::kK + rows, q.tile(),
                                                warp.smem + Smem::kOnes, lse_stage(q));
    wgmma_wait_group<0>();
    wgmma_hold(rS);
    scores.finish_scores(rS, rP, rX, head, m_block, lse_stage(q));

    f32 rDp[kRegsS];
    wait_keys(Smem::kBarVFull);
    dos.wait();
    wgmma_fence();
    issue_scores<Cfg::kHeadDimV, Cfg::kAuxD>(rDp, warp.smem + Smem::kV + rows, dos.tile(),
                                             warp.smem + Smem::kOnes, d_stage(dos));
    issue_gradient(rDv, rP, dos.tile());
    wgmma_wait_group<1>();
    wgmma_hold(rDp);
    Packed rDs;
    scores.finish_ds(rDs, rX, rDp, d_stage(dos));
    wgmma_fence();
    issue_gradient(rDk, rDs, q.tile());
    ds.put(rDs, warp, block, true, true);
    wgmma_wait_group<1>();
    hold(rDv);
    dos.release(warp.leads());
    wgmma_wait_group<0>();
    hold(rDk);
    q.release(warp.leads());
  }

  DEVICE void finish() const {
    store_dv(rDv, p, tile, first_row(), warp.lane_idx);
    store_dk(rDk, p, tile, first_row(), warp.lane_idx);
  }
};

// Where a lane's fragments of P^T lie on their way from one role to the other: 16 bytes each.
DEVICE u32 handoff(const Warp& warp, i32 block, i32 k) {
  return warp.smem + Smem::kP +
         u32(((block * 4 + warp.warp_idx) * kStepsM + k) * 512 + warp.lane_idx * 16);
}

// Split roles, first: S^T, P^T and dV.
struct ScoreRole : RoleBase {
  QRing q;
  DoRing dos;
  DvSum rDv[kKeyBlocks];
  u32 p_parity;

  DEVICE ScoreRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : RoleBase(p, tile, smem), q(smem), dos(smem), p_parity(1) {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      clear(rDv[block]);
    }
  }

  DEVICE void step(i32 head, i32 m_block) {
    wait_keys(Smem::kBarKFull);
    q.wait();
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      const ScoreTile scores{p, tile, block * 64 + warp.warp_idx * 16, warp.lane_idx};
      f32 rS[kRegsS];
      Packed rP, rX;
      wgmma_fence();
      issue_scores<Cfg::kHeadDimQk, Cfg::kAuxLse>(rS, warp.smem + Smem::kK + u32(block * 64 * 128),
                                                  q.tile(), warp.smem + Smem::kOnes, lse_stage(q));
      wgmma_wait_group<0>();
      wgmma_hold(rS);
      if (block > 0) {
        hold(rDv[block > 0 ? block - 1 : 0]);
      }
      scores.finish_scores(rS, rP, rX, head, m_block, lse_stage(q));
      wait_phase(warp.smem + Smem::kBarPEmpty + u32(8 * block), p_parity);
#pragma unroll
      for (i32 k = 0; k < kStepsM; ++k) {
        st_shared_v4(handoff(warp, block, k), rX[k]);
      }
      warp_sync();
      if (warp.leads()) {
        mbarrier_arrive(warp.smem + Smem::kBarPFull + u32(8 * block));
      }
      if (block == 0) {
        dos.wait();
      }
      wgmma_fence();
      issue_gradient(rDv[block], rP, dos.tile());
    }
    q.release(warp.leads());
    wgmma_wait_group<0>();
    hold(rDv[kKeyBlocks - 1]);
    dos.release(warp.leads());
    p_parity ^= 1u;
  }

  DEVICE void finish() const {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      store_dv(rDv[block], p, tile, block * 64 + warp.warp_idx * 16, warp.lane_idx);
    }
  }
};

// Split roles, second: dP^T, dS^T and dK.
struct GradientRole : RoleBase {
  QRing q;
  DoRing dos;
  DsWriter ds;
  DkSum rDk[kKeyBlocks];
  u32 p_parity;

  DEVICE GradientRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : RoleBase(p, tile, smem), q(smem), dos(smem), ds(smem, rank()), p_parity(0) {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      clear(rDk[block]);
    }
  }

  DEVICE void step(i32, i32) {
    const ScoreTile scores{p, tile, 0, warp.lane_idx};
    wait_keys(Smem::kBarVFull);
    dos.wait();
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      f32 rDp[kRegsS];
      Packed rX, rDs;
      wgmma_fence();
      issue_scores<Cfg::kHeadDimV, Cfg::kAuxD>(rDp, warp.smem + Smem::kV + u32(block * 64 * 128),
                                               dos.tile(), warp.smem + Smem::kOnes, d_stage(dos));
      wait_phase(warp.smem + Smem::kBarPFull + u32(8 * block), p_parity);
#pragma unroll
      for (i32 k = 0; k < kStepsM; ++k) {
        ld_shared_v4(rX[k], handoff(warp, block, k));
      }
      warp_sync();
      if (warp.leads()) {
        mbarrier_arrive(warp.smem + Smem::kBarPEmpty + u32(8 * block));
      }
      wgmma_wait_group<0>();
      wgmma_hold(rDp);
      if (block > 0) {
        hold(rDk[block > 0 ? block - 1 : 0]);
      }
      scores.finish_ds(rDs, rX, rDp, d_stage(dos));
      if (block == 0) {
        q.wait();
      }
      wgmma_fence();
      issue_gradient(rDk[block], rDs, q.tile());
      ds.put(rDs, warp, block, block == 0, block == kKeyBlocks - 1);
    }
    dos.release(warp.leads());
    wgmma_wait_group<0>();
    hold(rDk[kKeyBlocks - 1]);
    q.release(warp.leads());
    p_parity ^= 1u;
  }

  DEVICE void finish() const {
#pragma unroll
    for (i32 block = 0; block < kKeyBlocks; ++block) {
      store_dk(rDk[block], p, tile, block * 64 + warp.warp_idx * 16, warp.lane_idx);
    }
  }
};

// dQ += dS K, added to dq_accum in memory.
struct DqRole : RoleBase {
  static constexpr i32 kColumns = round_up(Cfg::kHeadDimQk, 16);
  static constexpr i32 kPartColumns = Cfg::kWgmmaDqN;  // of one product; the last may be narrower
  static constexpr i32 kFullParts = kColumns / kPartColumns;
  static constexpr i32 kLastColumns = kColumns % kPartColumns;
  static_assert(kColumns <= kPartColumns || kPartColumns % Chunk::kCols == 0);
  DsRing ds;
  i32 add_stage;
  u32 steps;

  DEVICE DqRole(const HopperBwdParams& p, const KeyTile& tile, u32 smem)
      : RoleBase(p, tile, smem), ds(smem), add_stage(0), steps(0) {}

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
#pragma unroll 1
    for (i32 m = 0; m < kM / 64; ++m) {
      const i32 first_row = m_block * kM + m * 64 + warp.warp_idx * 16;
      f32* strip = accum_rows<Cfg>(p, seq, batch_idx, head, 0, first_row);
      const bool exists = first_row < seq.seqlen_q;
      const u32 a = ds.tile() + u32(m * 64 * 128);
#pragma unroll 1
      for (i32 part = 0; part < kFullParts; ++part) {
        add_part<kPartColumns>(a, part * kPartColumns, strip, exists);
      }
      if constexpr (kLastColumns > 0) {
        add_part<kLastColumns>(a, kFullParts * kPartColumns, strip, exists);
      }
    }
    if constexpr (kCtas > 1) {
      if (warp.leads()) {
        mbarrier_arrive_cluster(
            mapa_shared_cluster(warp.smem + Smem::kBarSentEmpty + ds.stage * 8, rank() ^ 1u));
      }
    }
    ds.release(warp.leads());
  }

  DEVICE void finish() const {
    if (Cfg::kAddStages > 0 && warp.leads()) {
      tma_store_wait_group<0>();  // shared memory lives as long as the CTA
    }
  }

 private:
  // kCols columns from `column` on. a: dS of 64 queries. strip: of this warp's 16 rows.
  template <i32 kCols>
  DEVICE void add_part(u32 a, i32 column, f32* strip, bool exists) {
    f32 rDq[kCols / 2];
    const u64 desc_a = Chunk::k_major(a);
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
    wgmma_wait_group<0>();
    wgmma_hold(rDq);
    if (exists) {
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
