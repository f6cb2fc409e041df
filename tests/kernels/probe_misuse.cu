// One mistake per value of p.which, and its corrected form where the order of accesses is the
// point. Run by tests/sim/test_sim_checker.py, on the simulator only. Lines that the error may name
// end in "BAD" and that value. Two warps, 1024 bytes of shared memory.
//   in, out: (64,) words, with memory of others right before and after.  aux: as the case says.
#include "prelude.cuh"

#include "common/ptx/barrier.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/ldmatrix.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/mma.cuh"
#include "common/ptx/shuffle.cuh"
#include "tests/kernels/probe_params.cuh"

DEVICE u32 slot(i32 i) { return smem_base() + 4u * u32(i); }

// clang-format off
DEVICE void bounds(const ProbeParams& p, i32 thread) {
  u32 r[4] = {};
  switch (p.which) {
    case 0: st_global_u32(p.out, ld_global_u32(p.in + 1 + thread)); break;  // BAD 0: past the end
    case 1: st_global_u32(p.out - 1, 0); break;  // BAD 1: before the beginning
    case 2: ld_global_v4(r, p.in + 1); break;  // BAD 2: misaligned
    case 3: st_global_v4(p.aux + 4, r); break;  // BAD 3: half of it past the end
    case 4: st_shared_u32(slot(256), 0); break;  // BAD 4: past the end
    case 5: st_shared_u32(4u * u32(thread), 0); break;  // BAD 5: without smem_base()
    case 6: st_shared_u64(slot(1), 0); break;  // BAD 6: misaligned
    case 7: ldmatrix_x4(r[0], r[1], r[2], r[3], slot(thread)); break;  // BAD 7: rows of 4 bytes
    case 8: ldmatrix_x2(r[0], r[1], slot(252 + 4 * (thread % 32))); break;  // BAD 8: past the end
    case 9: cp_async_16(slot(4 * thread), p.in + 4, 17); break;  // BAD 9: more than 16
    case 10: cp_async_8(slot(2 * thread), p.in + 64, 8); break;  // BAD 10: source past the end
    case 11: cp_async_16(slot(2), p.in, 16); break;  // BAD 11: destination misaligned
    case 12: cp_async_8(slot(2), p.in + 1, 8); break;  // BAD 12: source misaligned
    case 13: red_global_add_f32(reinterpret_cast<f32*>(p.out + 64), 1.0f); break;  // BAD 13
    case 14: atomic_add_global_u32(p.out + 64, 1); break;  // BAD 14
    case 15: ld_global_u32(p.aux); break;  // BAD 15: null
    case 16: atomic_add_acq_rel_global_u64(reinterpret_cast<u64*>(p.out + 64), 1); break;  // BAD 16
    case 17: ld_acquire_global_u64(p.in + 1); break;  // BAD 17
    default: break;
  }
}

DEVICE void collectives(const ProbeParams& p, i32 thread) {
  const i32 lane = thread % 32;
  f32 d[4] = {};
  u32 a[4] = {};
  switch (p.which) {
    case 20: if (lane < 16) { warp_sync(); } break;  // BAD 20: the other lanes have returned
    case 21: if (lane < 16) { shfl_xor_u32(1, 1); } else { vote_any(true); } break;  // BAD 21
    case 22: if (lane == 3) { return; } mma_m16n8k16_f16(d, a, 0, 0); break;  // BAD 22
    case 23: if (thread < 16) { cta_sync(); } else { warp_sync(); } break;  // BAD 23
    case 24: shfl_idx_u32(1, 32); break;  // BAD 24: no such lane
    case 25:
      if (lane < 16) {
        vote_ballot(true);
      } else {
        vote_ballot(false);  // BAD 25: the same operation elsewhere
      }
      break;
    case 26: named_barrier_sync(0, 64); break;  // BAD 26: 0 is cta_sync()
    case 27: named_barrier_sync(1, 40); break;  // BAD 27: not whole warps
    case 28: named_barrier_sync(1, thread < 32 ? 32 * 2 : 32); break;  // BAD 28: warps disagree
    case 29: named_barrier_sync(1 + lane / 16, 64); break;  // BAD 29: lanes disagree
    case 30:
      named_barrier_arrive(3 + thread / 32, 64);
      named_barrier_arrive(3 + thread / 32, 64);  // BAD 30
      break;
    case 31: if (thread < 32) { named_barrier_sync(2, 64); } else { cta_sync(); } break;  // stuck
    case 32: if (thread < 32) { cta_sync(); } break;  // fine: the other warp has returned
    default: break;
  }
}

DEVICE void races(const ProbeParams& p, i32 thread) {
  const i32 lane = thread % 32;
  u32 r[4];
  switch (p.which) {
    case 40: case 41:  // between warps: write, then read
      st_shared_u32(slot(thread), 1);  // BAD 40
      if (p.which == 41) { cta_sync(); }
      ld_shared_u32(slot(63 - thread));  // BAD 40
      break;
    case 42: case 43:  // between warps: read, then write
      if (thread < 32) { ld_shared_u32(slot(lane)); }  // BAD 42
      if (p.which == 43) { cta_sync(); }
      if (thread >= 32) { st_shared_u32(slot(lane), 1); }  // BAD 42
      break;
    case 44: case 45:  // inside a warp; shuffles don't order memory
      st_shared_u32(slot(thread), 1);
      shfl_xor_u32(1, 1);
      if (p.which == 45) { warp_sync(); }
      ld_shared_u32(slot(thread ^ 1));  // BAD 44
      break;
    case 46: case 47:  // ldmatrix reads for all lanes
      st_shared_u32(slot(64 * (thread / 32) + lane), 1);
      if (p.which == 47) { warp_sync(); }
      ldmatrix_x2(r[0], r[1], slot(64 * (thread / 32) + 4 * (lane % 8)));  // BAD 46
      break;
    case 48: case 49:  // an asynchronous copy, read by the thread that issued it
      cp_async_4(slot(thread), p.in + thread, 4);
      cp_async_commit_group();
      if (p.which == 49) { cp_async_wait_group<0>(); }
      st_global_u32(p.out + thread, ld_shared_u32(slot(thread)));  // BAD 48
      break;
    case 50: case 51:  // waited for by its thread, read by another: that takes a barrier too
      cp_async_4(slot(thread), p.in + thread, 4);  // BAD 50
      cp_async_commit_group();
      cp_async_wait_group<0>();
      if (p.which == 51) { cta_sync(); }
      ld_shared_u32(slot(63 - thread));  // BAD 50
      break;
    case 52:  // a wait covers committed groups only
      cp_async_4(slot(thread), p.in + thread, 4);
      cp_async_wait_group<0>();
      ld_shared_u32(slot(thread));  // BAD 52
      break;
    case 53: case 54:  // the older group is done, the younger isn't
      cp_async_4(slot(thread), p.in + thread, 4);
      cp_async_commit_group();
      cp_async_4(slot(64 + thread), p.in + thread, 4);
      cp_async_commit_group();
      cp_async_wait_group<1>();
      ld_shared_u32(slot((p.which == 53 ? 64 : 0) + thread));  // BAD 53
      break;
    case 55:  // two copies into the same bytes
      cp_async_4(slot(thread), p.in + thread, 4);
      cp_async_4(slot(thread), p.in + thread, 4);  // BAD 55
      break;
    case 56: case 57:  // a copy over what another warp may still read
      ld_shared_u32(slot(63 - thread));  // BAD 56
      if (p.which == 57) { cta_sync(); }
      cp_async_4(slot(thread), p.in + thread, 4);  // BAD 56
      break;
    case 58: case 59:  // arriving releases what came before, not what comes after
      if (thread < 32) {
        if (p.which == 59) { st_shared_u32(slot(lane), 1); }
        named_barrier_arrive(1, 64);
        if (p.which == 58) { st_shared_u32(slot(lane), 1); }  // BAD 58
      } else {
        named_barrier_sync(1, 64);
        ld_shared_u32(slot(lane));  // BAD 58
      }
      break;
    case 60:  // neighbouring halves of a word are different places
      st_shared_u16(smem_base() + 2u * u32(thread), 1);
      ld_shared_u16(smem_base() + 2u * u32(thread));
      break;
    case 61:  // a warp that only arrives learns nothing of the others
      if (thread < 32) {
        named_barrier_arrive(1, 64);
        ld_shared_u32(slot(lane));  // BAD 61
      } else {
        st_shared_u32(slot(lane), 1);  // BAD 61
        named_barrier_sync(1, 64);
      }
      break;
    default: break;
  }
}
// clang-format on

// Shared memory as a CTA finds it, and an asynchronous copy before and after its wait.
DEVICE void lateness(const ProbeParams& p, i32 thread) {
  if (p.which == 70) {
    st_global_u32(p.out + thread, ld_shared_u32(slot(thread)));
  } else if (p.which == 71) {
    st_shared_u32(slot(thread), 0);
    cp_async_4(slot(thread), p.in + thread, 4);
    cp_async_commit_group();
    st_global_u32(p.out + thread, ld_shared_u32(slot(thread)));
  } else if (p.which == 72) {  // the order in which warps get here is the scheduler's
    warp_sync();
    if (thread % 32 == 0) {
      st_global_u32(p.out + atomic_add_global_u32(p.aux, 1), u32(thread / 32));
    }
  } else if (p.which == 73 && block_idx() >= 5) {
    ld_global_u32(p.in + 64 + block_idx());
  }
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_misuse(GRID_CONSTANT ProbeParams p) {
  bounds(p, thread_idx());
  collectives(p, thread_idx());
  races(p, thread_idx());
  lateness(p, thread_idx());
}
