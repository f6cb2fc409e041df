// Moves registers between the warpgroups of a CTA. All warps of a warpgroup execute the same one.
//   kRegisters: per thread, a multiple of 8 from 24 to 256. The sum over all warps may not exceed
//   what the CTA was launched with, or the _inc waits forever.
#pragma once
#include "common/ptx/base.cuh"

// Waits until the registers are there. PTX: setmaxnreg.inc.sync.aligned.u32 (sm_90a).
template <int kRegisters>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Gives up those above kRegisters. PTX: setmaxnreg.dec.sync.aligned.u32 (sm_90a).
template <int kRegisters>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
