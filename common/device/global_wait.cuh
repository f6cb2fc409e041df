// Waiting for other CTAs: counters in global memory that say how far they are. For sums whose order
// is fixed. The CTAs that are waited for must be running or have run: on a GPU, one that has not
// started does not get its turn because of a wait.
#pragma once
#include "common/ptx/memory.cuh"

// One thread; the others meet it at a barrier of the CTA or of its warp. Afterwards they see what
// the CTAs that counted up to `value` had stored before they released it:
// red_release_global_add_u32() by one thread, behind a barrier.
DEVICE void wait_global_at_least(const u32* counter, u32 value) {
  while (ld_acquire_global_u32(counter) < value) {
    nanosleep(20);  // little beside the look itself, and it leaves issue slots to other warps
  }
}
