// Twin of common/ptx/mbarrier.cuh for the simulator. The state lives in the runtime; the bytes in
// shared memory belong to it alone.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

DEVICE void mbarrier_init(u32 bar, u32 count, SITE) { flash_sim::mbarrier_init(bar, count, site); }

DEVICE void fence_mbarrier_init() { flash_sim::fence_mbarrier_init(); }

DEVICE void mbarrier_arrive(u32 bar, SITE) { flash_sim::mbarrier_arrive(bar, site); }

DEVICE void mbarrier_arrive_expect_tx(u32 bar, u32 bytes, SITE) {
  flash_sim::mbarrier_arrive_expect_tx(bar, bytes, site);
}

DEVICE bool mbarrier_try_wait_parity(u32 bar, u32 parity, SITE) {
  return flash_sim::mbarrier_try_wait_parity(bar, parity, site);
}
