// Twin of common/ptx/setmaxnreg.cuh for the simulator, which counts no registers.
#pragma once
#include "common/ptx/base.cuh"

template <int kRegisters>
DEVICE void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

template <int kRegisters>
DEVICE void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
