// hopper/fwd_wide.cu: attention forward for sm_90a where O of 64 rows fills half of the register
// file: head_dim_v over 256 beside a wide head_dim_qk. Launched by hopper/fwd.py.
// CTA: 64 query rows, three roles. Warpgroup 0: threads that load Q and K, either half of V, and a
// warp that schedules. Warpgroup 1: scores, softmax, P. Warpgroups 2 and 3: half of the columns of
// O each. K and V come in pieces through rings, each read by one warpgroup; P crosses through
// shared memory, lane by lane, with a factor for each row of O. Last keys first.
// Change here: scores and when P is given away. Change elsewhere: loads -> wide_loads.cuh, O ->
// wide_output.cuh, memory map -> wide_layout.cuh, scale, masks, dropout -> fwd_scores.cuh, order of
// work -> tile_scheduler.cuh, stages and registers -> wide_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/params.cuh"
#include "common/device/score.cuh"
#include "common/device/sink.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/setmaxnreg.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "hopper/softmax.cuh"
#include "hopper/wide_layout.cuh"
#include "hopper/wide_loads.cuh"
#include "hopper/wide_output.cuh"
// Behind the layout.
#include "hopper/fwd_scores.cuh"

struct ScoreRole {
  const HopperFwdParams& p;
  u32 smem;
  i32 warp_idx, lane_idx;
  KRing keys;
  RecordRing records;
  u32 bar_unannounced;  // "full" of a record that is written and not given away; 0: none
  u32 q_parity;
  f32 rS[kRegsS];
  RowSoftmax softmax;
  Dropout dropout;

  DEVICE ScoreRole(const HopperFwdParams& p, u32 smem)
      : p(p),
        smem(smem),
        warp_idx(thread_idx() / 32 % 4),
        lane_idx(thread_idx() % 32),
        keys(smem),
        records(smem),
        bar_unannounced(0),
        q_parity(0) {
    if constexpr (Cfg::kDropout) {
      dropout = Dropout(p, 0, 0);
    }
  }

  DEVICE bool leads_warp() const { return lane_idx == 0; }

  // S = Q K^T of the next key tile, a piece of K at a time. A piece is released once the next one's
  // products are issued.
  DEVICE void multiply() {
    KRing behind = keys;
    const u64 desc_q = Chunk::k_major(smem + Smem::kQ);
#pragma unroll
    for (i32 piece = 0; piece < kPiecesK; ++piece) {
      keys.wait();
      wgmma_fence();
      const u64 desc_k = Chunk::k_major(keys.tile());
#pragma unroll
      for (i32 k = 0; k < kStepsPerPiece; ++k) {
        const i32 step = piece * kStepsPerPiece + k;
        if (step < kStepsQk) {
          wgmma_ss<Cfg::kBf16, false>(
              rS, wgmma_desc_advance(desc_q, Chunk::k_major_step(step, kBoxBytes)),
              wgmma_desc_advance(desc_k, Chunk::k_major_step(k, kBoxBytes)), step > 0);
        }
      }
      wgmma_commit_group();
      keys.advance();
      if (piece > 0) {
        wgmma_wait_group<1>();
        behind.release(leads_warp());
      }
    }
    wgmma_wait_group<0>();
    wgmma_hold(rS);
    behind.release(leads_warp());
  }

  // Gives the record away that was written last. P of a key tile is announced only when the scores
  // of the next one are done: so these have the tensor cores to themselves, and P V runs beside the
  // next softmax. Announced at once, both products end together and softmax finds the tensor cores
  // idle: 580 TFLOP/s against 665 at (512, 512), 16k tokens, by the main loop alone on an H200.
  DEVICE void announce() {
    if (bar_unannounced != 0) {
      if (leads_warp()) {
        mbarrier_arrive(bar_unannounced);
      }
      bar_unannounced = 0;
    }
  }

  // Completes a record whose P, if it has any, this warp has written.
  DEVICE void write_factors(f32 first, f32 second) {
    if (lane_idx % 4 == 0) {
      const u32 at = factor_address(records.tile(), warp_idx, lane_idx);
      st_shared_f32(at, first);
      st_shared_f32(at + 32, second);
    }
    warp_sync();
    bar_unannounced = records.full();
    records.advance();
  }

  // From products to scores, masked or not. row: of this thread, as in fwd.cu's Item.
  DEVICE void finish_scores(const Work& work, const TileRange& tiles, const Score<Cfg>& score,
                            i32 row, i32 n_block) {
    const i32 first_col = n_block * Cfg::kBlockN + 2 * (lane_idx % 4);
    transform_scores(rS, score, work.seq, row, first_col);
    if (n_block >= tiles.interior_end ||
        ((Cfg::kLocal || Cfg::kChunk) && n_block < tiles.interior_begin)) {
      mask_scores(rS, p, work.seq, row, first_col);
    }
  }

  // One key tile, from its products to a record.
  DEVICE void step(const Work& work, const TileRange& tiles, const Score<Cfg>& score, i32 row,
                   i32 n_block) {
    multiply();
    announce();
    const bool last = n_block == tiles.begin;
    if (last && leads_warp()) {
      mbarrier_arrive(smem + Smem::kBarQEmpty);
    }
    finish_scores(work, tiles, score, row, n_block);
    f32 factor[2] = {1.0f, 1.0f};
    softmax.update<false>(rS, factor, score.to_log2());
    if constexpr (Cfg::kDropout) {
      dropout.set_head(p, work.batch_idx, work.head_idx);
      drop(rS, dropout, work.first_row + warp_idx * 16, n_block * Cfg::kBlockN, lane_idx);
    }
    records.wait_empty();
#pragma unroll
    for (i32 k = 0; k < kStepsPv; ++k) {
      u32 words[4];
#pragma unroll
      for (i32 j = 0; j < 4; ++j) {
        words[j] = pack2<Cfg::kBf16>(rS[8 * k + 2 * j], rS[8 * k + 2 * j + 1]);
      }
      st_shared_v4(fragment_address(records.tile(), warp_idx, k, lane_idx), words);
    }
    const bool first = n_block == tiles.end - 1;  // O is zero: nothing to bring to a new reference
    write_factors(first ? 1.0f : factor[0], first ? 1.0f : factor[1]);
    if (last) {
      announce();
    }
  }

  // The last record of a query tile: what normalises O. Writes softmax_lse if it is wanted; rows
  // without visible keys get -inf, and the factor 0.
  DEVICE void finish(const Work& work, i32 row) {
    const f32 to_log2 = Score<Cfg>::kPrescaled ? 1.0f : p.softmax_scale_log2;
    softmax.finish();
    f32 factor[2];
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
      const i32 query_row = (row + 8 * r) / kGqaGroup;
      const i32 row_of_tile = warp_idx * 16 + lane_idx / 4 + 8 * r;
      const bool empty = query_row >= work.seq.seqlen_q || !(softmax.row_sum[r] > 0.0f);
      factor[r] = empty ? 0.0f : 1.0f / softmax.row_sum[r];
      if constexpr (Cfg::kDropout) {
        factor[r] *= p.keep_scale;
      }
      SinkRow with;
      if constexpr (Cfg::kSink) {
        with = with_sink(empty ? bits_as_f32(kNegInfBits) : softmax.lse(r, to_log2),
                         ld_global_f32(p.s_aux + work.head_idx + (row + 8 * r) % kGqaGroup));
        factor[r] *= with.share;
      }
      if (p.softmax_lse != nullptr && lane_idx % 4 == 0 && row_of_tile < kWgQueries * kGqaGroup &&
          query_row < work.seq.slot_q) {
        f32* lse = p.softmax_lse + work.batch_idx * p.lse_batch_stride +
                   (work.head_idx + (row + 8 * r) % kGqaGroup) * p.lse_head_stride + work.seq.q_row;
        st_global_f32(lse + query_row, Cfg::kSink ? with.lse
                                       : empty    ? bits_as_f32(kNegInfBits)
                                                  : softmax.lse(r, to_log2));
      }
    }
    records.wait_empty();
    write_factors(factor[0], factor[1]);
    announce();
  }

  DEVICE void run() {
    const Queue queue(smem);
    for (i32 i = 0;; ++i) {
      const Work work = queue.wait(i);
      if (!work.valid()) {
        break;
      }
      const TileRange tiles = queue.row_tiles<Cfg>(p, i, work, 0);
      const i32 row = work.first_row * kGqaGroup + warp_idx * 16 + lane_idx / 4;
      softmax.clear();
      if (tiles.begin < tiles.end) {
        wait_phase(smem + Smem::kBarQFull, q_parity);
        q_parity ^= 1u;
        const Score<Cfg> score(p, work.batch_idx, work.head_idx);
#pragma unroll 1
        for (i32 n_block = tiles.end - 1; n_block >= tiles.begin; --n_block) {
          step(work, tiles, score, row, n_block);
        }
      }
      finish(work, row);
    }
  }
};

DEVICE void init_barriers(u32 smem) {
  KRing(smem).init(4);
  VRing<0>(smem).init(4);
  VRing<1>(smem).init(4);
  RecordRing(smem).init(8, 4);
  mbarrier_init(smem + Smem::kBarQFull, 1);
  mbarrier_init(smem + Smem::kBarQEmpty, 4);
  for (i32 i = 0; i < Queue::kSlots; ++i) {
    mbarrier_init(smem + Smem::kBarWorkFull + u32(8 * i), 1);
  }
  mbarrier_init(smem + Smem::kBarWorkTaken, kTakers);
  fence_mbarrier_init();
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) hopper_fwd_wide(GRID_CONSTANT HopperFwdParams p) {
  const u32 smem = smem_base();
  const i32 wg_idx = i32(shfl_idx_u32(u32(thread_idx() / 128), 0));  // uniform, and known to be
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.q_map);
    prefetch_tensor_map(&p.k_map);
    prefetch_tensor_map(&p.v_map);
    init_barriers(smem);
  }
  cta_sync();
  if (wg_idx == 0) {
    setmaxnreg_dec<Cfg::kProducerRegisters>();
    const i32 warp_idx = i32(shfl_idx_u32(u32(thread_idx() / 32), 0));
    const bool loads = thread_idx() % 32 == 0;
    if (warp_idx == 0 && loads) {
      KeyLoader(p, smem).run();
    } else if (warp_idx == 1 && loads) {
      load_values<0>(p, smem);
    } else if (warp_idx == 2 && loads) {
      load_values<1>(p, smem);
    } else if (warp_idx == 3) {
      Queue(smem).schedule<Cfg>(p, thread_idx() % 32);
    }
  } else if (wg_idx == 1) {
    if constexpr (Cfg::kScoreRegisters > 128) {
      setmaxnreg_inc<Cfg::kScoreRegisters>();
    } else {
      setmaxnreg_dec<Cfg::kScoreRegisters>();
    }
    ScoreRole(p, smem).run();
  } else {
    setmaxnreg_inc<Cfg::kOutputRegisters>();
    if (wg_idx == 2) {
      OutputRole<0>(p, smem).run();
    } else {
      OutputRole<1>(p, smem).run();
    }
  }
}
