// What the twins of the sm_90 wrappers call, as calls.h for the others. Included after calls.h,
// which has different names for the kernel's compiler and for the runtime's.
#pragma once

#pragma GCC visibility push(default)
namespace flash_sim {

void mbarrier_init(u32 bar, u32 count, Site site);
void mbarrier_arrive(u32 bar, Site site);
void mbarrier_arrive_expect_tx(u32 bar, u32 bytes, Site site);
// Sleeps until the phase is complete, so that waiting forever is a deadlock that gets reported.
// False only under a shuffling seed, now and then, as the hardware may.
bool mbarrier_try_wait_parity(u32 bar, u32 parity, Site site);
// Of a peer's barrier, by its address in the cluster; the other one waits for such arrivals too.
void mbarrier_arrive_cluster(u32 bar, Site site);
bool mbarrier_try_wait_parity_cluster(u32 bar, u32 parity, Site site);
void fence_mbarrier_init();
void fence_proxy_async_shared();

// A load lands when no thread can run, the latest moment at which it can; a store reads its source
// when its group is waited for.
void prefetch_tensor_map(const void* map, Site site);
void tma_load(u32 dst, const void* map, u32 bar, const i32* coords, i32 rank, Site site);
void tma_store(const void* map, u32 src, const i32* coords, i32 rank, Site site);
// The same without a map, of a run of bytes.
void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, Site site);
void bulk_reduce_add_f32(f32* dst, u32 src, u32 bytes, Site site);
void tma_store_commit_group();
void tma_store_wait_group_read(i32 pending);
void tma_store_wait_group(i32 pending);

u32 cluster_ctarank();
u32 mapa_shared_cluster(u32 address, u32 rank, Site site);
// Shared memory of this CTA to that of a peer.
void bulk_copy_to_cluster(u32 dst, u32 src, u32 bytes, u32 bar, Site site);

// Earlier launches are complete from here on.
void griddepcontrol_wait();

// Arguments of WarpOp::kWgmma. The products are computed, and d written, when waited for.
struct WgmmaArgs {
  f32* d;
  const u32* a;  // null: A in shared memory, desc_a
  u64 desc_a, desc_b;
  i32 n;
  bool bf16, trans_b, accumulate;
};
void wgmma_hold(const f32* d, i32 count, Site site);

struct StmatrixArgs {
  u32 addr;
  u32 r[4];
};

}  // namespace flash_sim
#pragma GCC visibility pop
