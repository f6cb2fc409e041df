// A ring of the CTAs of a cluster: warp 0 of each sends rows to the next rank, whose warp 1
// receives them. Two slots at either end; the receiver tells the sender when one is free again.
//   in: (grid, rounds = which, Cfg::kRow) words.  out: the rows that each CTA has received, in that
//   shape, then the rank of each CTA.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

constexpr u32 kRowBytes = Cfg::kRow * 4;
constexpr u32 kRanks = Cfg::kClusterSize;
static_assert(Cfg::kSmemBytes == 4 * kRowBytes + 32 && Cfg::kNumThreads == 64);

DEVICE u32 outgoing(i32 slot) { return smem_base() + u32(slot) * kRowBytes; }
DEVICE u32 incoming(i32 slot) { return smem_base() + u32(2 + slot) * kRowBytes; }
DEVICE u32 full(i32 slot) { return smem_base() + 4 * kRowBytes + 8u * u32(slot); }
DEVICE u32 empty(i32 slot) { return full(2 + slot); }

DEVICE void send(const u32* row, i32 slot, u32 parity, u32 to) {
  const i32 lane = thread_idx() % 32;
  while (!mbarrier_try_wait_parity_cluster(empty(slot), parity ^ 1)) {
  }
  for (i32 i = lane; i < Cfg::kRow; i += 32) {
    st_shared_u32(outgoing(slot) + 4u * u32(i), ld_global_u32(row + i));
  }
  fence_proxy_async_shared();
  warp_sync();
  if (lane == 0) {
    bulk_copy_to_cluster(mapa_shared_cluster(incoming(slot), to), outgoing(slot), kRowBytes,
                         mapa_shared_cluster(full(slot), to));
  }
}

DEVICE void receive(u32* row, i32 slot, u32 parity, u32 from) {
  const i32 lane = thread_idx() % 32;
  if (lane == 0) {
    mbarrier_arrive_expect_tx(full(slot), kRowBytes);
  }
  while (!mbarrier_try_wait_parity(full(slot), parity)) {
  }
  for (i32 i = lane; i < Cfg::kRow; i += 32) {
    st_global_u32(row + i, ld_shared_u32(incoming(slot) + 4u * u32(i)));
  }
  warp_sync();
  if (lane == 0) {
    mbarrier_arrive_cluster(mapa_shared_cluster(empty(slot), from));
  }
}

CLUSTER_KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm, Cfg::kClusterSize)
probe_cluster(GRID_CONSTANT HopperProbeParams p) {
  const u32 rank = cluster_ctarank();
  if (thread_idx() == 0) {
    for (i32 slot = 0; slot < 2; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), 1);
    }
    fence_mbarrier_init();
    st_global_u32(p.out + grid_dim() * p.which * Cfg::kRow + block_idx(), rank);
  }
  cluster_arrive();
  cluster_wait();
  for (i32 round = 0; round < p.which; ++round) {
    const i32 at = (block_idx() * p.which + round) * Cfg::kRow;
    const u32 parity = u32(round / 2 % 2);
    if (thread_idx() < 32) {
      send(p.in + at, round % 2, parity, (rank + 1) % kRanks);
    } else {
      receive(p.out + at, round % 2, parity, (rank + kRanks - 1) % kRanks);
    }
  }
  cluster_arrive();
  cluster_wait();  // no CTA returns while a peer may still send to it
}
