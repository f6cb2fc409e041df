// The order in which key tiles add to dQ, if Cfg::kOrdered: each query tile is added to by one key
// tile after the other, those with the first keys first, so that sums are bitwise reproducible.
// Reads Cfg: include "prelude.cuh" first. Change elsewhere: which CTA has which key tile ->
// bwd_work.cuh, how many run together -> flash2/bwd_schedule.py.
//
// Each query tile of a head has a counter in memory, of the key tiles that have been added to it.
// Counting and looking take a trip to L2, so one thread does either right behind the barrier that
// begins a step, for the whole CTA, while the other warps begin the step's products:
//   it looks for the query tile of this step, whose dQ is added behind the next barrier;
//   it counts for the last query tile whose additions lie before this barrier.
// A CTA waits only for CTAs ahead of it in the launch, which have started, since key_work() gives
// them the key tiles before its own; so whatever runs together, the first of them goes on.
// All CTAs walk from their last query tile to their first. Under a window the CTAs ahead have then
// been where one begins; without a window they all begin together, and each follows the one ahead.
#pragma once
#include "flash2/device/bwd_warps.cuh"
#include "common/device/global_wait.cuh"
#include "common/ptx/barrier.cuh"

// dQ of a step is added in that step, behind a barrier in its middle, or in the next one.
constexpr i32 kDqDelay = kDelayedDq || Cfg::kSplitRoles ? 1 : 0;

// The query tile that a run begins with.
DEVICE i32 first_step(const TileRange& tiles, i32 first_key) {
  if constexpr (Cfg::kOrdered) {
    return tiles.end - 1;
  } else {
    return first_query_tile<Cfg>(tiles, first_key);
  }
}

// To the next query tile of a run, in the order that all CTAs walk.
DEVICE void advance(Cursor& at, const TileRange& tiles, i32 start) {
  if constexpr (Cfg::kOrdered) {
    const bool last = at.m_block == tiles.begin;
    at.m_block = last ? start : at.m_block - 1;
    at.head_idx += last ? 1 : 0;
  } else {
    at.advance(tiles, start);
  }
}

// One run's turns; all threads call. Nothing unless Cfg::kOrdered.
struct Turns {
  // Of two warps, whose waits then overlap; with split roles of those that wait for P^T anyway.
  static constexpr i32 kCounts = Cfg::kSplitRoles ? 32 * kRoleWarps : 0;
  static constexpr i32 kLooks = kCounts + (kRoleWarps > 1 ? 32 : 0);
  const BwdParams& p;
  const KeyWork& work;
  const TileRange& tiles;
  i32 thread_idx, n_block;

  // Behind the barrier that begins step `step` of num_steps, at the query tile `at`; num_steps: of
  // the barrier behind the last one. Additions of this step lie behind another barrier.
  DEVICE void step(const Cursor& at, i32 step, i32 num_steps) const {
    if constexpr (Cfg::kOrdered) {
      if (thread_idx == kCounts && step > kDqDelay) {
        count(back<kDqDelay + 1>(at));
      }
      if (thread_idx == kLooks && step < num_steps) {
        const i32 ahead = n_block - first_key_tile<Cfg>(p, work.seq, at.m_block, Cfg::kBlockN);
        wait_global_at_least(counter(at), u32(ahead));
      }
      warp_sync();
    }
  }
  // Behind all additions of the run. end: the query tile behind the last one.
  DEVICE void finish(const Cursor& end) const {
    if constexpr (Cfg::kOrdered) {
      cta_sync();
      if (thread_idx == kCounts) {
        count(back<1>(end));
      }
      warp_sync();
    }
  }

 private:
  DEVICE u32* counter(const Cursor& at) const {
    return strip_counter<Cfg>(
        p, accum_rows<Cfg>(p, work.seq, work.batch_idx, at.head_idx, 0, at.m_block * Cfg::kBlockM));
  }
  // Releases what all threads have added before the barrier.
  DEVICE void count(const Cursor& at) const { red_release_global_add_u32(counter(at), 1); }
  // So many steps earlier.
  template <i32 kSteps>
  DEVICE Cursor back(Cursor at) const {
#pragma unroll
    for (i32 i = 0; i < kSteps; ++i) {
      const bool first = at.m_block == tiles.end - 1;
      at.m_block = first ? tiles.begin : at.m_block + 1;
      at.head_idx -= first ? 1 : 0;
    }
    return at;
  }
};
