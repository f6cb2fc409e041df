// Twin of common/ptx/griddepcontrol.cuh for the simulator, where a launch ends before the next one
// starts. What a kernel does before its wait is checked as if it had started early.
#pragma once
#include "common/ptx/base.cuh"
#include "common/sim/runtime/calls_hopper.h"

DEVICE void griddepcontrol_wait() { flash_sim::griddepcontrol_wait(); }

DEVICE void griddepcontrol_launch_dependents() {}
