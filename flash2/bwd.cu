// flash2/bwd.cu: dK, dV and the fp32 sums of dQ, for sm_80 and up (mma.sync, cp.async).
// Launched by flash2/bwd.py between bwd_preprocess.cu, which prepares softmax_d and lse_log2, and
// bwd_convert.cu, which rounds dQ.
// CTA: one tile of kBlockN keys and query heads that share them (GQA). dK and dV stay in registers
// while it walks over the query tiles that see these keys, kBlockM queries a step. Where CTAs share
// a K or V head, bwd_sum.cu adds up what they leave.
// All tiles of scores are transposed, with keys as rows:
//   S^T = K Q^T      P^T = exp(S^T - lse)            dV += P^T dO
//   dP^T = V dO^T    dS^T = P^T * (dP^T - D)         dK += dS^T Q      dQ += dS K
// Every warp does all of it (bwd_joint.cuh), or half of the warps the upper line and half the lower
// one (Cfg::kSplitRoles: bwd_roles.cuh).
// Change here: which gradients a CTA sums up and stores.
// Change elsewhere: loop order, pipeline -> the two schedules, shared memory and division among
// warps -> bwd_warps.cuh, copies -> bwd_loads.cuh, elementwise part -> bwd_scores.cuh, sums of
// gradients -> bwd_products.cuh, mask rules -> mask.cuh, what a CTA works on -> bwd_work.cuh, in
// which order key tiles add to dQ -> bwd_turns.cuh, tile sizes -> bwd_tiles.py.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "flash2/device/bwd_joint.cuh"
#include "flash2/device/bwd_products.cuh"
#include "flash2/device/bwd_roles.cuh"
#include "flash2/device/bwd_warps.cuh"
#include "common/device/bwd_work.cuh"
#include "common/device/mask.cuh"
#include "common/device/params.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/shuffle.cuh"

// dK and dV of one key tile: sums over the CTA's query heads of each K and V head. kHasDk, kHasDv:
// what this warp computes of them.
template <bool kHasDk, bool kHasDv>
DEVICE void key_tile(const BwdParams& p, const KeyWork& work, Lane lane, u32 smem, i32 n_block) {
  const i32 first_key = n_block * Cfg::kBlockN;
  const TileRange tiles = query_tiles<Cfg>(p, work.seq, first_key, Cfg::kBlockN);
  Gradients gradients;
  clear(gradients.rDk);
  clear(gradients.rDv);
  for (i32 head = work.first_head; head < work.end_head;) {
    if constexpr (Cfg::kUnequalHeads) {  // all that follows from it is computed anew for each run:
      lane = Lane(shfl_idx_u32(u32(lane.thread_idx), lane.lane_idx));  // else it takes registers
    }
    const i32 head_k = head / p.qhead_per_khead;
    const i32 head_v = Cfg::kUnequalHeads ? head / p.qhead_per_vhead : head_k;
    i32 end_k = work.end_head, end_v = end_k, end = end_k;
    if constexpr (Cfg::kUnequalHeads) {
      end_k = imin(end_k, (head_k + 1) * p.qhead_per_khead);
      end_v = imin(end_v, (head_v + 1) * p.qhead_per_vhead);
      end = imin(end_k, end_v);
    }
    if (tiles.begin < tiles.end) {
      if constexpr (kHasDk && kHasDv) {
        run(gradients, p, work, lane, smem, n_block, tiles, head, end);
      } else if constexpr (kHasDv) {
        run_role<true>(gradients.rDv, p, work, lane, smem, n_block, tiles, head, end);
      } else {
        run_role<false>(gradients.rDk, p, work, lane, smem, n_block, tiles, head, end);
      }
    }
    if constexpr (Cfg::kGradVectorBytes == 16) {
      cta_sync();  // all warps are done with K and V
    }
    if constexpr (kHasDk) {
      if (end == end_k) {
        store<Cfg::kHeadDimQk, LayoutK>(gradients.rDk, p, work, lane, smem + Smem::kK, first_key,
                                        head_k, p.qhead_per_khead, p.dk, p.dk_batch_stride,
                                        p.dk_head_stride, p.dk_row_stride, p.dk_accum, p.dqk_scale);
        clear(gradients.rDk);
      }
    }
    if constexpr (kHasDv) {
      if (end == end_v) {
        store<Cfg::kHeadDimV, LayoutV>(gradients.rDv, p, work, lane, smem + Smem::kV, first_key,
                                       head_v, p.qhead_per_vhead, p.dv, p.dv_batch_stride,
                                       p.dv_head_stride, p.dv_row_stride, p.dv_accum, p.dv_scale);
        clear(gradients.rDv);
      }
    }
    if constexpr (!Cfg::kUnequalHeads) {
      break;  // one K and one V head
    }
    head = end;
  }
}

// A key tile by all warps of the CTA.
DEVICE void divide_key_tile(const BwdParams& p, const KeyWork& work, const Lane& lane, u32 smem,
                            i32 n_block) {
  if constexpr (!Cfg::kSplitRoles) {
    key_tile<true, true>(p, work, lane, smem, n_block);
  } else if (lane.thread_idx < 32 * kRoleWarps) {
    key_tile<false, true>(p, work, lane, smem, n_block);
  } else {
    key_tile<true, false>(p, work, lane, smem, n_block);
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_bwd(GRID_CONSTANT BwdParams p) {
  const Lane lane(thread_idx());
  const KeyWork work = key_work<Cfg, Cfg::kBlockN>(p, block_idx(), lane.lane_idx);
  const u32 smem = smem_base();
  if constexpr (Cfg::kDeterministic) {
    // dq_accum[split] belongs to this CTA for its heads, which adds to it in one order.
    for (i32 n_block = work.n_block; n_block * Cfg::kBlockN < work.slot_k;
         n_block += p.num_splits) {
      divide_key_tile(p, work, lane, smem, n_block);
    }
  } else if (work.n_block * Cfg::kBlockN < work.slot_k) {
    divide_key_tile(p, work, lane, smem, work.n_block);
  }
}
