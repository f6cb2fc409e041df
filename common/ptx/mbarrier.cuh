// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies.
// Called by hopper/pipeline.cuh, which decides who waits for what.
//   bar: shared address of a u64, 8-byte aligned, that nothing else touches.
// A phase is complete when `count` arrivals and all expected bytes have come; the next one starts
// at once. Waiting names the parity of a phase: 0 for the first, then 1, 0, ... On a fresh barrier
// a wait for parity 1 (the phase "before the first") passes.
// Arriving releases what this thread has done before; a wait that returned true acquires it.
#pragma once
#include "common/ptx/base.cuh"

// One thread. Others, and TMA, may use the barrier after fence_mbarrier_init() by this thread and a
// cta_sync(). PTX: mbarrier.init.shared::cta.b64 (sm_80+).
//   count: arrivals that complete a phase; mbarrier_arrive_expect_tx is one of them.
DEVICE void mbarrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Makes mbarrier_init visible to TMA. PTX: fence.mbarrier_init.release.cluster (sm_90+).
DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// PTX: mbarrier.arrive.shared::cta.b64 (sm_80+).
DEVICE void mbarrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Makes the phase wait for `bytes` more bytes of TMA loads, then arrives. A load counts with its
// whole box, whatever part of that lies in the tensor.
// PTX: mbarrier.arrive.expect_tx.shared::cta.b64 (sm_90+).
DEVICE void mbarrier_arrive_expect_tx(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity is complete. Sleeps for a while if not, so call it in a loop.
// PTX: mbarrier.try_wait.parity.shared::cta.b64 (sm_90+).
DEVICE bool mbarrier_try_wait_parity(u32 bar, u32 parity) {
  u32 complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(complete)
      : "r"(bar), "r"(parity)
      : "memory");
  return complete != 0;
}
