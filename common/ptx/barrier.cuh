// Barriers within a CTA. Each orders the shared and global memory accesses of the threads that meet
// there. All 32 lanes of a warp reach the same call together.
#pragma once
#include "common/ptx/base.cuh"

// Waits for all threads of the CTA that have not exited. PTX: barrier.sync.aligned 0.
DEVICE void cta_sync() { asm volatile("barrier.sync.aligned 0;" ::: "memory"); }

// Waits for the lanes of this warp. PTX: bar.warp.sync.
DEVICE void warp_sync() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// Arrives at barrier id and waits until `threads` threads have arrived. PTX: barrier.sync.aligned.
//   id: 1..15 (0 is cta_sync()).  threads: those that arrive and those that wait, a multiple of 32.
DEVICE void named_barrier_sync(i32 id, i32 threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at barrier id without waiting; arguments as above. PTX: barrier.arrive.aligned.
DEVICE void named_barrier_arrive(i32 id, i32 threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
