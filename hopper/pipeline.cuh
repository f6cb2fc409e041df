// How the warpgroups of a Hopper kernel hand tiles to each other: a ring of tiles in shared memory
// with two mbarriers per stage. Used by hopper/fwd.cu, which says who is at which end.
//   full:  signalled by the bytes of TMA loads. Waited on by consumers.
//   empty: signalled by each consumer warp that has read the tile. Waited on by the producer.
#pragma once
#include "common/ptx/mbarrier.cuh"

DEVICE void wait_phase(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity(bar, parity)) {
  }
}

// One end's place in a ring: the stage it comes to next, and the parity of that stage's phase.
// Every end visits every stage in order, whether it uses the tile or not.
//   kTiles, kFull, kEmpty: offsets in shared memory of the tiles and of the two barrier arrays.
template <i32 kNumStages, u32 kTiles, u32 kTileBytes, u32 kFull, u32 kEmpty>
struct TileRing {
  u32 smem;
  u32 stage = 0;
  u32 parity = 0;

  DEVICE explicit TileRing(u32 smem) : smem(smem) {}

  // Before first use, by one thread. num_readers: consumer warps. num_writers: threads that
  // announce bytes, and those that write parts of a tile themselves.
  DEVICE void init(u32 num_readers, u32 num_writers = 1) const {
    for (i32 i = 0; i < kNumStages; ++i) {
      mbarrier_init(smem + kFull + u32(8 * i), num_writers);
      mbarrier_init(smem + kEmpty + u32(8 * i), num_readers);
    }
  }

  DEVICE u32 tile() const { return smem + kTiles + stage * kTileBytes; }
  DEVICE u32 full() const { return smem + kFull + stage * 8; }
  DEVICE void advance() {
    const bool last = stage + 1 == kNumStages;
    stage = last ? 0 : stage + 1;
    parity ^= last ? 1u : 0u;
  }

  // Writer: waits until the stage is free.
  DEVICE void wait_empty() const { wait_phase(smem + kEmpty + stage * 8, parity ^ 1u); }
  // Producer: the same, and announces the bytes of one tile; the caller then loads to tile(),
  // signalling full(), and advances.
  DEVICE void acquire() const {
    wait_empty();
    mbarrier_arrive_expect_tx(full(), kTileBytes);
  }

  // Consumer: waits until the tile has landed.
  DEVICE void wait() const { wait_phase(full(), parity); }
  // Consumer: this warp is done with the tile. leader: one lane of the warp.
  DEVICE void release(bool leader) {
    if (leader) {
      mbarrier_arrive(smem + kEmpty + stage * 8);
    }
    advance();
  }
};
