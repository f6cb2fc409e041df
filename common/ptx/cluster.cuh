// CTAs of a cluster, which run at the same time and reach each other's shared memory. A kernel
// whose entry is a CLUSTER_KERNEL has neighbouring CTAs in one: ranks 0, 1, ... are block_idx() in
// order.
//   address in the cluster: what mapa_shared_cluster() makes of an address of the own CTA; only
//   parameters that say so take one.
// A CTA's shared memory is gone when its threads are: one that a peer has still to reach meets
// that peer at the cluster's barrier before it returns.
#pragma once
#include "common/ptx/base.cuh"

// Rank of this CTA in its cluster. PTX: mov of %cluster_ctarank (sm_90+).
DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in the cluster of what CTA `rank` has at the shared address addr.
// PTX: mapa.shared::cluster.u32 (sm_90+).
DEVICE u32 mapa_shared_cluster(u32 addr, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(addr), "r"(rank));
  return mapped;
}

// The barrier of all threads of the cluster that have not returned: arrive, which releases what the
// thread has done before, and later wait, which acquires what all have released. Alternately, all
// 32 lanes together. PTX: barrier.cluster.arrive.release.aligned (sm_90+).
DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// PTX: barrier.cluster.wait.acquire.aligned (sm_90+).
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Arrives at an mbarrier of any CTA of the cluster, which has been initialised before a barrier of
// the cluster, by a thread that called fence_mbarrier_init(). The thread that waits learns what
// this one has done before if it waits with mbarrier_try_wait_parity_cluster().
//   bar: address in the cluster.
// PTX: mbarrier.arrive.release.cluster.shared::cluster.b64 (sm_90+).
DEVICE void mbarrier_arrive_cluster(u32 bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar)
               : "memory");
}

// As mbarrier_try_wait_parity (common/ptx/mbarrier.cuh), of an mbarrier of the own CTA where others
// arrive. PTX: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 (sm_90+).
DEVICE bool mbarrier_try_wait_parity_cluster(u32 bar, u32 parity) {
  u32 complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(complete)
      : "r"(bar), "r"(parity)
      : "memory");
  return complete != 0;
}

// Copies shared memory of this CTA to a CTA of the cluster, past the threads. The bytes count
// towards the phase of the mbarrier there, which says that they have landed, and in whose wait
// either CTA learns that src has been read. What threads wrote to src needs
// fence_proxy_async_shared() by each writer and a barrier before this.
//   dst, bar: addresses in the cluster, of one CTA.  src: shared address.  dst, src: 16-byte
//   aligned. bytes: a multiple of 16, not 0.
// PTX: cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes (sm_90+).
DEVICE void bulk_copy_to_cluster(u32 dst, u32 src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(dst),
      "r"(src), "r"(bytes), "r"(bar)
      : "memory");
}
