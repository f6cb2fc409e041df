// One mistake per value of p.which, and its corrected form where the order is the point, as in
// probe_hopper_misuse.cu, with what CTAs of a cluster do to each other. Two CTAs of two warps.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

constexpr u32 kBytes = 256;

DEVICE u32 tile(i32 i) { return smem_base() + kBytes * u32(i); }
DEVICE u32 bar(i32 i) { return tile(2) + 8u * u32(i); }
DEVICE u32 of_peer(u32 addr) { return mapa_shared_cluster(addr, cluster_ctarank() ^ 1); }

DEVICE void wait(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity(bar, parity)) {
  }
}
DEVICE void wait_for_peer(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity_cluster(bar, parity)) {
  }
}
DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// clang-format off
DEVICE void mistakes(i32 which, i32 thread, u32 rank) {
  const bool first = thread == 0 && rank == 0;
  switch (which) {
    case 0: mapa_shared_cluster(tile(0), 2); break;  // BAD 0: no such rank
    case 1: mapa_shared_cluster(of_peer(tile(0)), 0); break;  // BAD 1: mapped already
    case 2: ld_shared_u32(of_peer(tile(0))); break;  // BAD 2: for instructions of the cluster only
    case 3:
      if (thread == 0) { mbarrier_init(bar(4), 1); }
      cluster_sync();
      if (first) { mbarrier_arrive_cluster(of_peer(bar(4))); }  // BAD 3: no fence_mbarrier_init()
      break;
    case 4:
      if (thread == 0 && rank == 1) { mbarrier_init(bar(4), 1); fence_mbarrier_init(); }
      if (thread == 32 && rank == 0) { mbarrier_arrive_cluster(of_peer(bar(4))); }  // BAD 4: when was it initialised?
      cluster_sync();
      break;
    case 5: case 6:  // the peer returns
      if (first) { mbarrier_arrive_cluster(of_peer(bar(0))); }  // BAD 5
      if (which == 6) { cluster_sync(); }
      break;
    case 7: cluster_wait(); break;  // BAD 7: without having arrived
    case 8: cluster_arrive(); cluster_arrive(); break;  // BAD 8: twice
    case 9: if (rank == 0 || thread < 32) { cluster_sync(); } else { wait(bar(1), 0); } break;
    case 10: if (thread == 0) { bulk_copy_to_cluster(of_peer(tile(0)), tile(1), kBytes, bar(0)); } break;  // BAD 10
    case 11: if (thread == 0) { bulk_copy_to_cluster(of_peer(tile(0)), tile(1), 24, of_peer(bar(0))); } break;  // BAD 11
    case 12: if (thread == 0) { bulk_copy_to_cluster(of_peer(tile(0)), tile(1) + 8, 64, of_peer(bar(0))); } break;  // BAD 12
    case 13: if (thread == 0) { bulk_copy_to_cluster(of_peer(tile(2)), tile(0), 2 * kBytes, of_peer(bar(0))); } break;  // BAD 13
    case 14: if (first) { bulk_copy_to_cluster(of_peer(tile(0)), tile(1), kBytes, of_peer(bar(0))); } break;  // BAD 14: in flight
    case 15:
      if (thread == 0 && rank == 1) { mbarrier_arrive_cluster(of_peer(bar(0))); }  // BAD 15: gone
      break;
    case 16:
      if (thread == 0) { mbarrier_arrive_cluster(of_peer(bar(0))); mbarrier_arrive_expect_tx(bar(1), 8); }
      if (thread == 32) { mbarrier_arrive_expect_tx(of_peer(bar(1)), 8); }  // BAD 16: not for peers
      break;
    default: break;
  }
}

// Rank 0 copies tile 1 to the peer's tile 0, twice in the cases from 40 on.
DEVICE void copies(i32 which, i32 thread, u32 rank) {
  if (rank == 0) {
    st_shared_u32(tile(1) + 4u * u32(thread), 7);
    if (which != 30) { fence_proxy_async_shared(); }
    cta_sync();
    if (thread == 0) {
      bulk_copy_to_cluster(of_peer(tile(0)), tile(1), kBytes, of_peer(bar(0)));  // BAD 30 BAD 34 BAD 36
      if (which == 32 || which == 33) {
        if (which == 33) { wait_for_peer(bar(1), 0); }
        st_shared_u32(tile(1), 8);  // BAD 32: it may not have been read
      }
      if (which == 40) { wait(bar(1), 0); }  // learns nothing of peers
      if (which == 41) { wait_for_peer(bar(1), 0); }
      if (which >= 40) {
        bulk_copy_to_cluster(of_peer(tile(0)), tile(1), kBytes, of_peer(bar(2)));  // BAD 40
      }
    }
  } else if (thread == 0) {
    if (which == 36) { st_shared_u32(tile(0), 0); }  // BAD 36: the copy may be under way
    mbarrier_arrive_expect_tx(bar(0), kBytes);
    if (which == 34) { ld_shared_u32(tile(0)); }  // BAD 34: it has not landed
    wait(bar(0), 0);
    ld_shared_u32(tile(0));
    mbarrier_arrive_cluster(of_peer(bar(1)));
    if (which >= 40) {
      mbarrier_arrive_expect_tx(bar(2), kBytes);
      wait(bar(2), 0);
    }
  }
  cluster_sync();
}
// clang-format on

CLUSTER_KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm, Cfg::kClusterSize)
probe_cluster_misuse(GRID_CONSTANT HopperProbeParams p) {
  static_assert(Cfg::kNumThreads == 64 && Cfg::kClusterSize == 2);
  static_assert(Cfg::kSmemBytes == 2 * kBytes + 64);
  const i32 thread = thread_idx();
  if (thread == 0) {
    for (i32 i = 0; i < 4; ++i) {
      mbarrier_init(bar(i), 1);
    }
    fence_mbarrier_init();
  }
  cluster_sync();
  if (p.which < 30) {
    mistakes(p.which, thread, cluster_ctarank());
  } else {
    copies(p.which, thread, cluster_ctarank());
  }
}
