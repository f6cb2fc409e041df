// One warpgroup gives registers to two others; the words survive.
//   in, out: (384,) words.
#include "prelude.cuh"

#include "common/ptx/memory.cuh"
#include "common/ptx/setmaxnreg.cuh"
#include "tests/kernels/hopper_probe_params.cuh"

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_setmaxnreg(GRID_CONSTANT HopperProbeParams p) {
  static_assert(Cfg::kNumThreads == 384);  // launched with 168 registers each
  const u32 word = ld_global_u32(p.in + thread_idx());
  if (thread_idx() < 128) {
    setmaxnreg_dec<40>();
    st_global_u32(p.out + thread_idx(), word);
  } else {
    setmaxnreg_inc<232>();
    st_global_u32(p.out + thread_idx(), word);
  }
}
