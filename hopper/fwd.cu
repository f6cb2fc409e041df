// hopper/fwd.cu: attention forward for sm_90a (WGMMA, TMA). Launched by hopper/fwd.py.
// CTA: one producer warpgroup (a warp that loads, a warp that schedules) and
// Cfg::kNumMmaWarpgroups consumers. A consumer owns 64 query rows, or with Cfg::kVSplit = 2 half of
// the columns of O of 64 rows. K and V tiles stream through rings of kNumStages, last keys first.
// docs/hopper_forward_schedule.md shows who does what when.
// Change here: loop order, consumers. Change elsewhere: loads -> fwd_producer.cuh, stores of O and
// softmax_lse -> fwd_epilogue.cuh, memory map -> fwd_layout.cuh, mask rules -> mask.cuh, order of
// work -> tile_scheduler.cuh, rings -> pipeline.cuh, PTX -> common/ptx, tile sizes -> fwd_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "common/device/params.cuh"
#include "common/device/score.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/setmaxnreg.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "hopper/fwd_epilogue.cuh"
#include "hopper/fwd_layout.cuh"
#include "hopper/fwd_producer.cuh"
#include "hopper/fwd_scores.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tile_scheduler.cuh"

// One query tile as a consumer warpgroup sees it.
struct Item {
  Work work;
  // First row of this thread, within the sequence; the other is row + 8. With kGqaGroup > 1 rows
  // of several heads are counted: that of the query is row / kGqaGroup.
  i32 row;
  TileRange cta;  // key tiles that the CTA loads
  TileRange own;  // of these, the ones with keys for this warpgroup's rows
  i32 num_right_skipped, num_left_skipped;  // tiles of the CTA right and left of the own ones

  DEVICE bool has_keys() const { return own.begin < own.end; }
};

struct Consumer {
  const HopperFwdParams& p;
  u32 smem;
  i32 wg_idx, warp_idx, lane_idx;
  bool is_leader;  // one thread of the warpgroup
  KRing keys;
  VRing values;
  u32 bar_q_release;  // of a Q slice whose O is being stored; 0: none
  bool has_output;    // rO holds a sum, rather than nothing
  f32 rS[kRegsS];
  f32 rO[kRegsO];
  u32 rP[kStepsPv][4];  // P, unless it is in shared memory: Cfg::kPInSmem
  RowSoftmax softmax;
  Dropout dropout;

  DEVICE Consumer(const HopperFwdParams& p, u32 smem, i32 wg_idx)
      : p(p),
        smem(smem),
        wg_idx(wg_idx),
        warp_idx(thread_idx() / 32 % 4),
        lane_idx(thread_idx() % 32),
        is_leader(thread_idx() % 128 == 0),
        keys(smem),
        values(smem),
        bar_q_release(0),
        has_output(false) {
    if constexpr (Cfg::kDropout) {
      dropout = Dropout(p, 0, 0);
    }
  }

  DEVICE i32 wg_row() const { return wg_idx / Cfg::kVSplit * kWgQueries; }
  DEVICE bool leads_warp() const { return lane_idx == 0; }
  // Item::row.
  DEVICE i32 first_row(const Work& work) const {
    return (work.first_row + wg_row()) * kGqaGroup + warp_idx * 16 + lane_idx / 4;
  }

  // The i-th one; waits for it.
  DEVICE Item item(const Queue& queue, i32 i) const {
    Item it;
    it.work = queue.wait(i);
    it.row = first_row(it.work);
    it.cta = queue.row_tiles<Cfg>(p, i, it.work, 0);
    it.own = queue.row_tiles<Cfg>(p, i, it.work, 1 + wg_idx / Cfg::kVSplit);
    it.num_right_skipped = it.cta.end - it.own.end;
    it.num_left_skipped = it.own.begin - it.cta.begin;
    return it;
  }

  // With Cfg::kPingPong warpgroups issue their products in turn, one softmax runs while another
  // warpgroup's products do. Each takes one turn per key tile of the CTA, skipped or not.
  DEVICE void begin_turn() const {
    if constexpr (Cfg::kPingPong) {
      named_barrier_sync(kBarTurn + wg_idx, 256);
    }
  }
  DEVICE void end_turn() const {
    if constexpr (Cfg::kPingPong) {
      named_barrier_arrive(kBarTurn + (wg_idx + 1 == kNumWgs ? 0 : wg_idx + 1), 256);
    }
  }

  DEVICE void skip_k() {
    keys.wait();
    begin_turn();
    end_turn();
    keys.release(leads_warp());
  }
  DEVICE void skip_v() {
    values.wait();
    values.release(leads_warp());
  }
  // The K tiles in front of the own ones and, in the order of loads, all but the last of their Vs.
  DEVICE void skip_right(i32 count) {
#pragma unroll 1
    for (i32 i = 0; i < count; ++i) {
      skip_k();
      if (i > 0) {
        skip_v();
      }
    }
  }

  // The O stored from the previous tile's slice has left it: the producer may load Q there.
  DEVICE void release_stored_slice() {
    if (bar_q_release != 0) {
      if (is_leader) {
        tma_store_wait_group_read<0>();
        mbarrier_arrive(bar_q_release);
      }
      bar_q_release = 0;
    }
  }

  // O in shared memory over P: this warp has no scores left to compute from Q.
  DEVICE void release_q(const QSlot& q) {
    if (kStageOInP && leads_warp()) {
      mbarrier_arrive(q.empty(smem));
    }
  }
  // O in shared memory over P: it has left.
  DEVICE void acquire_p() {
    if constexpr (kStageOInP) {
      if (is_leader) {
        tma_store_wait_group_read<0>();
      }
      named_barrier_sync(kBarOutput + wg_idx, 128);
    }
  }

  // S = Q K^T of the tile that the K ring is at. q_slice: shared address.
  DEVICE void issue_scores(u32 q_slice) {
    const u64 desc_q = ChunkQk::k_major(q_slice);
    const u64 desc_k = ChunkQk::k_major(keys.tile());
#pragma unroll
    for (i32 k = 0; k < kStepsQk; ++k) {
      wgmma_ss<Cfg::kBf16, false>(
          rS, wgmma_desc_advance(desc_q, ChunkQk::k_major_step(k, kQChunkBytes)),
          wgmma_desc_advance(desc_k, ChunkQk::k_major_step(k, kKChunkBytes)), k > 0);
    }
    wgmma_commit_group();
  }

  // O += P V of the tile that the V ring is at.
  DEVICE void issue_output() {
    const u32 first_chunk = u32(wg_idx % Cfg::kVSplit * kChunksO * kVChunkBytes);
    const u64 desc_v = ChunkV::mn_major(values.tile() + first_chunk, kVChunkBytes);
    const u64 desc_p = ChunkP::k_major(p_tile());
#pragma unroll
    for (i32 k = 0; k < kStepsPv; ++k) {
      const u64 desc_v_k = wgmma_desc_advance(desc_v, ChunkV::mn_major_step(k));
      const bool accumulate = k > 0 || has_output;
      if constexpr (Cfg::kPInSmem) {
        const u32 step = ChunkP::k_major_step(k, kPChunkBytes);
        wgmma_ss<Cfg::kBf16, true>(rO, wgmma_desc_advance(desc_p, step), desc_v_k, accumulate);
      } else {
        wgmma_rs<Cfg::kBf16, true>(rO, rP[k], desc_v_k, accumulate);
      }
    }
    wgmma_commit_group();
    has_output = true;
  }

  // From products to scores, masked or not.
  template <bool kMasked>
  DEVICE void finish_scores(const Item& it, const Score<Cfg>& score, i32 n_block) {
    const i32 first_col = n_block * Cfg::kBlockN + 2 * (lane_idx % 4);
    transform_scores(rS, score, it.work.seq, it.row, first_col);
    if constexpr (kMasked) {
      mask_scores(rS, p, it.work.seq, it.row, first_col);
    }
  }

  // Zeroes the dropped elements of P; survivors are scaled in the epilogue.
  DEVICE void apply_dropout(const Item& it, i32 n_block) {
    if constexpr (Cfg::kDropout) {
      dropout.set_head(p, it.work.batch_idx, it.work.head_idx);
      drop(rS, dropout, it.work.first_row + wg_row() + warp_idx * 16, n_block * Cfg::kBlockN,
           lane_idx);
    }
  }

  // This warpgroup's P in shared memory, if it is there.
  DEVICE u32 p_tile() const { return smem + Smem::kP + u32(wg_idx) * Smem::kPBytes; }

  // rS -> P in two bytes an element, where issue_output() takes it from.
  DEVICE void pack_p() {
    constexpr i32 kUnits = ChunkP::kCols / 8;
    const u32 first_unit =
        ChunkP::unit_address(p_tile(), warp_idx * 16 + lane_idx % 16, lane_idx / 16);
#pragma unroll
    for (i32 i = 0; i < kRegsS; i += 8) {
      u32(&words)[4] = rP[i / 8];
#pragma unroll
      for (i32 j = 0; j < 4; ++j) {
        words[j] = pack2<Cfg::kBf16>(rS[i + 2 * j], rS[i + 2 * j + 1]);
      }
      if constexpr (Cfg::kPInSmem) {
        const i32 unit = i / 4;  // of eight columns
        stmatrix_x4(ChunkP::unit_at(first_unit, unit % kUnits) + u32(unit / kUnits * kPChunkBytes),
                    words[0], words[1], words[2], words[3]);
      }
    }
    if constexpr (Cfg::kPInSmem) {
      fence_proxy_async_shared();
      warp_sync();  // products take the 16 rows of a warp from that warp
    }
  }

  // From raw scores of the tile's first key tile to unpacked P.
  DEVICE void first_softmax(const Item& it) {
    const Score<Cfg> score(p, it.work.batch_idx, it.work.head_idx);
    const i32 n_block = it.own.end - 1;
    if (n_block >= it.own.interior_end ||
        ((Cfg::kLocal || Cfg::kChunk) && n_block < it.own.interior_begin)) {
      finish_scores<true>(it, score, n_block);
    } else {
      finish_scores<false>(it, score, n_block);
    }
    f32 rescale[2];
    softmax.update<true>(rS, rescale, score.to_log2());
    apply_dropout(it, n_block);
  }

  // Begins a tile by itself: nothing of the one before is left to do. Afterwards P of the first key
  // tile is packed. Without keys for this warpgroup: lets all of the CTA's key tiles pass.
  DEVICE void start(const Item& it, const QSlot& q) {
    has_output = false;
    if (!it.has_keys()) {
      release_stored_slice();
      const i32 count = it.cta.end - it.cta.begin;
      skip_right(count);
      if (count > 0) {
        skip_v();
      }
      wait_phase(q.full(smem), q.parity);
      release_q(q);
      acquire_p();
      softmax.clear();
      return;
    }
    skip_right(it.num_right_skipped);
    wait_phase(q.full(smem), q.parity);
    keys.wait();
    begin_turn();
    wgmma_fence();
    issue_scores(q.slice(smem));
    end_turn();
    release_stored_slice();
    wgmma_wait_group<0>();
    wgmma_hold(rS);
    keys.release(leads_warp());
    if (it.own.end - it.own.begin == 1) {
      release_q(q);
    }
    first_softmax(it);
    acquire_p();
    pack_p();
    if (it.num_right_skipped > 0) {
      skip_v();
    }
  }

  // One key tile: its scores are computed while P V of the one before is.
  template <bool kMasked>
  DEVICE void step(const Item& it, const Score<Cfg>& score, const QSlot& q, i32 n_block) {
    keys.wait();
    begin_turn();
    wgmma_fence();
    issue_scores(q.slice(smem));
    values.wait();
    issue_output();
    end_turn();
    release_stored_slice();
    wgmma_wait_group<1>();
    wgmma_hold(rS);
    keys.release(leads_warp());
    if (n_block == it.own.begin) {
      release_q(q);
    }
    finish_scores<kMasked>(it, score, n_block);
    f32 rescale[2];
    const bool moved = softmax.update<false>(rS, rescale, score.to_log2());
    apply_dropout(it, n_block);
    wgmma_wait_group<0>();
    wgmma_hold(rO);
    values.release(leads_warp());
    pack_p();
    if (moved) {
#pragma unroll
      for (i32 i = 0; i < kRegsO; ++i) {
        rO[i] *= rescale[row_of(i)];
      }
    }
  }

  // All key tiles but the first. Afterwards P of the last one is packed.
  DEVICE void run_steps(const Item& it, const QSlot& q) {
    const Score<Cfg> score(p, it.work.batch_idx, it.work.head_idx);
    i32 n_block = it.own.end - 2;
    if constexpr (Cfg::kCausal || Cfg::kLocal || Cfg::kChunk) {
#pragma unroll 1
      for (; n_block >= it.own.interior_end; --n_block) {  // right edge
        step<true>(it, score, q, n_block);
      }
    }
#pragma unroll 1
    for (; n_block >= it.own.interior_begin; --n_block) {
      step<false>(it, score, q, n_block);
    }
    if constexpr (Cfg::kLocal || Cfg::kChunk) {
#pragma unroll 1
      for (; n_block >= it.own.begin; --n_block) {  // left edge of the window
        step<true>(it, score, q, n_block);
      }
    }
  }

  // The last product of a tile by itself, and the key tiles left of the own ones.
  DEVICE void finish(const Item& it) {
    release_stored_slice();  // else the producer may be waiting for it, in front of this V
    values.wait();
    wgmma_fence();
    issue_output();
    wgmma_wait_group<0>();
    wgmma_hold(rO);
    values.release(leads_warp());
    if constexpr (Cfg::kLocal || Cfg::kChunk) {
#pragma unroll 1
      for (i32 i = 0; i < it.num_left_skipped; ++i) {
        skip_k();
        skip_v();
      }
    }
  }

  // Whether the last product of `it` may be issued together with the first scores of `next`. Not if
  // more tiles must pass in between than the loads' order allows.
  DEVICE bool may_overlap(const Item& it, const Item& next) const {
    return kOverlapTiles && it.num_left_skipped == 0 && next.work.valid() && next.has_keys() &&
           next.num_right_skipped <= 1;
  }

  // finish(it) and start(next) in one. `done` receives the softmax of `it`.
  DEVICE void finish_and_start(const Item& next, const QSlot& q, RowSoftmax& done) {
    release_stored_slice();
    wait_phase(q.full(smem), q.parity);
    skip_right(next.num_right_skipped);
    keys.wait();
    begin_turn();
    wgmma_fence();
    issue_scores(q.slice(smem));
    values.wait();
    issue_output();
    end_turn();
    wgmma_wait_group<1>();
    wgmma_hold(rS);
    keys.release(leads_warp());
    done = softmax;
    first_softmax(next);
    wgmma_wait_group<0>();
    wgmma_hold(rO);
    values.release(leads_warp());
    pack_p();
    has_output = false;
    if (next.num_right_skipped > 0) {
      skip_v();
    }
  }

  DEVICE void store_output(const Work& work, RowSoftmax& done, const QSlot& q) {
    const i32 row = first_row(work);
    const u32 stage = kStageOInP ? p_tile() : q.slice(smem);
    Epilogue{p, wg_idx, warp_idx, lane_idx, is_leader}.store(work, row, done, rO, stage);
    if constexpr (kStageOInP) {
      return;
    }
    if constexpr (kGqaGroup > 1) {
      if (is_leader) {
        mbarrier_arrive(q.empty(smem));
      }
      return;
    }
    bar_q_release = q.empty(smem);
    if constexpr (!kOverlapTiles) {
      release_stored_slice();
    }
  }

  DEVICE void run() {
    if (Cfg::kPingPong && wg_idx == kNumWgs - 1) {
      end_turn();  // warpgroup 0 begins
    }
    const Queue queue(smem);
    Item it = item(queue, 0);
    bool started = false;
#pragma unroll 1
    for (i32 i = 0; it.work.valid(); ++i) {
      const QSlot q(i, wg_idx);
      if (!started) {
        start(it, q);
      }
      if (it.has_keys()) {
        run_steps(it, q);
      }
      bool finished = !it.has_keys();
      if constexpr (Cfg::kLocal || Cfg::kChunk) {
        // The next tile may not be drawn before this warpgroup has let key tiles pass.
        if (!finished && it.num_left_skipped > 0) {
          finish(it);
          finished = true;
        }
      }
      const Item next = item(queue, i + 1);
      RowSoftmax done;
      started = !finished && may_overlap(it, next);
      if (started) {
        finish_and_start(next, QSlot(i + 1, wg_idx), done);
      } else {
        if (!finished) {
          finish(it);
        }
        done = softmax;
      }
      store_output(read_work(queue.record(i)), done, q);
      it = next;
    }
    if (Cfg::kPingPong && wg_idx == 0) {
      begin_turn();
    }
    if (is_leader) {
      tma_store_wait_group<0>();
    }
  }
};

DEVICE void init_barriers(u32 smem) {
  KRing(smem).init(4 * kNumWgs);
  VRing(smem).init(4 * kNumWgs);
  Queue(smem).init();
  for (i32 i = 0; i < Cfg::kNumQBuffers * kNumWgs; ++i) {
    mbarrier_init(smem + Smem::kBarQFull + u32(8 * i), 1);
    mbarrier_init(smem + Smem::kBarQEmpty + u32(8 * i), kStageOInP ? 4 : 1);
  }
  fence_mbarrier_init();
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) hopper_fwd(GRID_CONSTANT HopperFwdParams p) {
  const u32 smem = smem_base();
  const i32 wg_idx = i32(shfl_idx_u32(u32(thread_idx() / 128), 0));  // uniform, and known to be
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.q_map);
    prefetch_tensor_map(&p.k_map);
    prefetch_tensor_map(&p.v_map);
    prefetch_tensor_map(&p.out_map);
    init_barriers(smem);
  }
  cta_sync();
  if (wg_idx == 0) {
    setmaxnreg_dec<Cfg::kProducerRegisters>();
    const i32 warp_idx = i32(shfl_idx_u32(u32(thread_idx() / 32), 0));
    if (warp_idx == 0 && thread_idx() % 32 == 0) {
      Producer(p, smem).run();
    } else if (warp_idx == 1) {
      Queue(smem).schedule<Cfg>(p, thread_idx() % 32);
    }
  } else {
    setmaxnreg_inc<Cfg::kConsumerRegisters>();
    Consumer(p, smem, wg_idx - 1).run();
  }
}
