// One mistake per value of p.which, and its corrected form where the order is the point, as in
// probe_misuse.cu: run by tests/sim/test_sim_checker_hopper.py, on the simulator only; lines that
// the error may name end in "BAD" and the value. Two warpgroups.
//   map_a, map_b: (64, 64) bf16, boxes of all of it with a swizzle of 128 bytes, to load and store.
//   map_c: reaches past its tensor.  map_d: not encoded.  map_e: of 60 columns.
#include "prelude.cuh"

#include "common/device/wgmma_desc.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/stmatrix.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

using Chunk = SwizzledChunk<128>;
constexpr u32 kTileBytes = 64 * 128;

DEVICE u32 tile(i32 i) { return smem_base() + kTileBytes * u32(i); }
DEVICE u32 bar(i32 i) { return tile(2) + 8u * u32(i); }

DEVICE void wait(u32 bar, u32 parity) {
  while (!mbarrier_try_wait_parity(bar, parity)) {  // BAD 5 BAD 9 BAD 10 BAD 11 BAD 29
  }
}

DEVICE void load(const HopperProbeParams& p, u32 dst, u32 bar) {
  mbarrier_arrive_expect_tx(bar, kTileBytes);
  tma_load_4d(dst, &p.map_a, bar, 0, 0, 0, 0);
}

// clang-format off
DEVICE void mbarriers(const HopperProbeParams& p, i32 thread) {
  switch (p.which) {
    case 0: mbarrier_arrive(bar(7)); break;  // BAD 0: never initialised
    case 1: mbarrier_init(bar(4), 0); break;  // BAD 1: no thread would arrive
    case 2: mbarrier_init(bar(0), 1); break;  // BAD 2: again
    case 3: case 4:
      if (thread == 0) { mbarrier_init(bar(4), 1); fence_mbarrier_init(); }
      if (p.which == 4) { cta_sync(); }
      if (thread == 255) { mbarrier_arrive(bar(4)); }  // BAD 3: when was it initialised?
      break;
    case 5: wait(bar(0), 2); break;  // no such parity
    case 6: ld_shared_u32(bar(0)); break;  // BAD 6: not for ordinary loads
    case 7: st_shared_u32(bar(0), 0); break;  // BAD 7: nor stores
    case 8:
      if (thread < 2) { mbarrier_arrive_expect_tx(bar(0), 16); }  // BAD 8: two arrivals, count 1
      break;
    case 9: if (thread == 64) { wait(bar(0), 0); } break;  // forever
    case 10: if (thread == 64) { mbarrier_arrive_expect_tx(bar(0), 100); wait(bar(0), 0); } break;
    case 11:  // two phases end while others still wait for the first
      if (thread < 32) { wait(bar(0), 0); }
      if (thread == 32) { mbarrier_arrive(bar(0)); mbarrier_arrive(bar(0)); }
      break;
    case 12: case 13:  // an mbarrier orders what came before the arrival, not what follows
      if (thread == 0) {
        if (p.which == 13) { st_shared_u32(tile(0), 1); }
        mbarrier_arrive(bar(0));
        if (p.which == 12) { st_shared_u32(tile(0), 1); }  // BAD 12
      } else if (thread == 32) {
        wait(bar(0), 0);
        ld_shared_u32(tile(0));  // BAD 12
      }
      break;
    case 14: stmatrix_x4(tile(0) + 8, 0, 0, 0, 0); break;  // BAD 14: misaligned
    case 15: case 16:
      stmatrix_x4(tile(0) + 16u * u32(thread), 0, 0, 0, 0);
      if (p.which == 16) { warp_sync(); }
      ld_shared_u32(tile(0) + 16u * u32(thread ^ 1));  // BAD 15
      break;
    default: break;
  }
}

DEVICE void loads(const HopperProbeParams& p, i32 thread) {
  switch (p.which) {
    case 20:
      if (thread == 0) {
        mbarrier_init(bar(4), 1);
        load(p, tile(0), bar(4));  // the error names tma_load_4d's line in load()
      }
      break;
    case 21: if (thread == 0) { tma_load_4d(tile(0) + 64, &p.map_a, bar(0), 0, 0, 0, 0); } break;  // BAD 21
    case 22: if (thread == 0) { tma_load_4d(tile(1) + 1024, &p.map_a, bar(0), 0, 0, 0, 0); } break;  // BAD 22
    case 23: if (thread == 0) { tma_load_4d(tile(0), &p.map_c, bar(0), 0, 0, 0, 0); } break;  // BAD 23
    case 24: if (thread == 0) { tma_load_5d(tile(0), &p.map_a, bar(0), 0, 0, 0, 0, 0); } break;  // BAD 24
    case 25: prefetch_tensor_map(&p.map_d); break;  // BAD 25
    case 26: case 27:  // read without waiting
      if (thread == 0) {
        load(p, tile(0), bar(0));
        if (p.which == 27) { wait(bar(0), 0); }
        ld_shared_u32(tile(0));  // BAD 26
        wait(bar(0), 0);
      }
      break;
    case 28:  // the phase does not wait for the bytes
      if (thread == 0) { mbarrier_arrive(bar(0)); tma_load_4d(tile(0), &p.map_a, bar(0), 0, 0, 0, 0); }
      if (thread == 32) { wait(bar(0), 0); ld_shared_u32(tile(0)); }  // BAD 28
      break;
    case 29:  // the phase waits for other bytes than come
      if (thread == 0) {
        mbarrier_arrive_expect_tx(bar(0), kTileBytes / 2);
        tma_load_4d(tile(0), &p.map_a, bar(0), 0, 0, 0, 0);
        wait(bar(0), 0);
      }
      break;
    case 30: case 31:  // a second load into the slot, before and after its reader has left it
      if (thread == 0) {
        load(p, tile(0), bar(0));
        if (p.which == 31) { wait(bar(1), 0); } else { wait(bar(0), 0); }
        tma_load_4d(tile(0), &p.map_a, bar(2), 0, 0, 0, 0);  // BAD 30
        mbarrier_arrive_expect_tx(bar(2), kTileBytes);
        wait(bar(2), 0);
      } else if (thread == 32) {
        wait(bar(0), 0);
        ld_shared_u32(tile(0));  // BAD 30
        mbarrier_arrive(bar(1));
      }
      break;
    case 32: if (thread == 0) { load(p, tile(0), bar(0)); } break;  // no thread waits for it
    case 33: case 34:  // ordinary stores before
      if (thread < 32) {
        st_shared_u32(tile(0) + 4u * u32(thread), 0);
        if (p.which == 34) { fence_proxy_async_shared(); }
        warp_sync();
      }
      if (thread == 0) {
        tma_load_4d(tile(0), &p.map_a, bar(0), 0, 0, 0, 0);  // BAD 33
        mbarrier_arrive_expect_tx(bar(0), kTileBytes);
        wait(bar(0), 0);
      }
      break;
    default: break;
  }
}

DEVICE void store(const HopperProbeParams& p, u32 src) {
  tma_store_4d(&p.map_b, src, 0, 0, 0, 0);
  tma_store_commit_group();
}

DEVICE void stores(const HopperProbeParams& p, i32 thread) {
  if (p.which < 40 || p.which >= 60) {
    return;
  }
  for (u32 i = u32(thread); i < kTileBytes / 4; i += 256) {
    st_shared_u32(tile(0) + 4u * i, 0x3f803f80);
  }
  switch (p.which) {
    case 40: case 41: case 42: case 43:  // fence by the writers, or by who issues, and a barrier
      if (p.which == 41) { fence_proxy_async_shared(); }
      if (p.which != 43) { cta_sync(); }
      if (p.which == 42 || p.which == 43) { fence_proxy_async_shared(); }
      if (thread == 0) {
        tma_store_4d(&p.map_b, tile(0), 0, 0, 0, 0);  // BAD 40 BAD 43
        tma_store_commit_group();
        tma_store_wait_group<0>();
      }
      break;
    default: {
      fence_proxy_async_shared();
      cta_sync();
      if (thread != 0) { break; }
      if (p.which == 44 || p.which == 45) {
        store(p, tile(0));
        if (p.which == 45) { tma_store_wait_group_read<0>(); }
        st_shared_u32(tile(0), 0);  // BAD 44: the store still reads it
        tma_store_wait_group<0>();
      } else if (p.which == 46) {
        store(p, tile(0));  // no thread waits for it
      } else if (p.which == 47) {
        tma_store_4d(&p.map_b, tile(0), 0, 0, 0, 0);
        tma_store_wait_group<0>();  // covers committed groups only
        st_shared_u32(tile(0), 0);  // BAD 47
      } else if (p.which == 48) {
        tma_store_4d(&p.map_c, tile(0), 0, 0, 0, 0);  // BAD 48: past the tensor
      } else if (p.which == 50) {
        tma_store_4d(&p.map_b, tile(0), 0, -8, 0, 0);  // BAD 50
      } else if (p.which == 51) {
        tma_store_4d(&p.map_e, tile(0), 0, 0, 0, 0);  // BAD 51
      } else if (p.which == 49) {  // fine: only the reading was waited for
        store(p, tile(0));
        tma_store_wait_group_read<0>();
      }
    }
  }
}

DEVICE void bulk(const HopperProbeParams& p, i32 thread) {
  if (p.which < 80) {
    return;
  }
  f32* out = reinterpret_cast<f32*>(p.out);  // 256 floats
  if (p.which >= 91) {
    if (thread < 64) {
      st_shared_f32(tile(0) + 4u * u32(thread), 1.0f);
      if (p.which != 91) { fence_proxy_async_shared(); }
    }
    cta_sync();
  }
  if (thread != 0) { return; }
  if (p.which == 86) { mbarrier_init(bar(4), 1); }
  switch (p.which) {
    case 80: bulk_load(tile(0), out, 24, bar(0)); break;  // BAD 80
    case 81: bulk_load(tile(0), out + 1, 64, bar(0)); break;  // BAD 81
    case 82: bulk_load(tile(0), out + 192, 512, bar(0)); break;  // BAD 82
    case 83: bulk_load(tile(0) + 8, out, 64, bar(0)); break;  // BAD 83
    case 84: case 85:  // read without waiting
      mbarrier_arrive_expect_tx(bar(0), 64);
      bulk_load(tile(0), out, 64, bar(0));
      if (p.which == 85) { wait(bar(0), 0); }
      ld_shared_u32(tile(0));  // BAD 84
      break;
    case 86: bulk_load(tile(0), out, 64, bar(4)); break;  // BAD 86: no fence_mbarrier_init()
    case 87: bulk_reduce_add_f32(out, tile(0), 0); break;  // BAD 87
    case 88: bulk_reduce_add_f32(out + 2, tile(0), 64); break;  // BAD 88
    case 89: bulk_reduce_add_f32(out + 192, tile(0), 512); break;  // BAD 89
    case 90: bulk_reduce_add_f32(out, tile(1) + 128, kTileBytes); break;  // BAD 90
    default:
      bulk_reduce_add_f32(out, tile(0), 256);  // BAD 91 BAD 95
      tma_store_commit_group();
      if (p.which == 95) { break; }  // no thread waits for it
      if (p.which != 93) { tma_store_wait_group_read<0>(); }
      if (p.which >= 93) {
        for (u32 i = 0; i < 64; ++i) {
          st_shared_f32(tile(0) + 4 * i, 0);  // BAD 93: the addition still reads it
          st_global_f32(out + 64 + i, ld_global_f32(out + i));  // not added yet
        }
        tma_store_wait_group<0>();
        for (u32 i = 0; i < 64; ++i) {
          st_global_f32(out + 128 + i, ld_global_f32(out + i));
        }
      }
  }
}

DEVICE void products(const HopperProbeParams& p, i32 thread) {
  if (p.which < 60 || p.which >= 80) {
    return;
  }
  const i32 which = p.which;
  if (which != 60) { st_shared_u32(tile(0) + 4u * u32(thread), 0); }  // BAD 61
  if (which == 60 || which == 61) {
    if (thread == 0) { st_shared_u32(tile(0), 0); }
  } else {
    fence_proxy_async_shared();
  }
  if (thread == 0) { load(p, tile(1), bar(0)); }
  cta_sync();
  if (which != 62) { wait(bar(0), 0); }
  if (thread >= 128) {
    if (which == 62) { wait(bar(0), 0); }
    if (which == 72 || which == 73) {  // writes B once the first warpgroup says so
      named_barrier_sync(2, 256);
      st_shared_u32(tile(1) + 4u * u32(thread), 0);  // BAD 72
    }
    return;
  }
  u64 a = Chunk::k_major(tile(1));
  u64 b = Chunk::k_major(tile(which == 61 ? 0 : 1));
  f32 d[4] = {};
  bool accumulate = true;
  if (which == 63) { a += 7; }
  if (which == 64 && thread >= 64) { b += 2; }
  if (which == 65 && thread == 7) { accumulate = false; }
  if (which == 66 && thread >= 96) { return; }
  if (which != 67) { wgmma_fence(); }
  wgmma_ss<true, false>(d, a, b, accumulate);  // BAD 61 BAD 62 BAD 63 BAD 64 BAD 65 BAD 67 BAD 68 BAD 70 BAD 72
  wgmma_commit_group();
  if (which == 62) { wait(bar(0), 0); }
  if (which == 68) { d[1] = 0; }
  if (which == 69) { wgmma_hold(d); }  // BAD 69
  if (which == 70) { return; }
  if (which == 71) {
    if (thread < 64) { wgmma_fence(); } else { wgmma_commit_group(); }  // BAD 71
  }
  if (which == 72) { named_barrier_arrive(2, 256); }
  wgmma_wait_group<0>();  // BAD 66
  if (which == 73) { named_barrier_arrive(2, 256); }
  wgmma_hold(d);
  if (which == 74) {
    wgmma_ss<true, false>(d, a, b, true);  // BAD 74: d may have been touched since the wait
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
  st_global_f32(reinterpret_cast<f32*>(p.out) + thread, d[0]);
}
// clang-format on

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm)
probe_hopper_misuse(GRID_CONSTANT HopperProbeParams p) {
  static_assert(Cfg::kNumThreads == 256 && Cfg::kSmemBytes == 2 * kTileBytes + 64);
  const i32 thread = thread_idx();
  if (thread == 0) {
    for (i32 i = 0; i < 4; ++i) {
      mbarrier_init(bar(i), 1);
    }
    fence_mbarrier_init();
  }
  cta_sync();
  mbarriers(p, thread);
  loads(p, thread);
  stores(p, thread);
  products(p, thread);
  bulk(p, thread);
}
