// Overlap of a launch with the one before it on its stream ("programmatic dependent launch"). It
// takes place where the later kernel is launched with `programmatic` (common/launch/kernels.py); in
// any other launch these do nothing. sm_90+: leave them out (`if constexpr`) for older
// architectures.
#pragma once
#include "common/ptx/base.cuh"

// Waits until the launches before this one are complete and their writes visible to this grid;
// other threads of the CTA need a barrier after it. Before it no thread may read what an earlier
// launch writes, nor write what it touches. At least one thread of the grid calls it, since a
// launch that follows relies on this one to end last. PTX: griddepcontrol.wait (sm_90+).
DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next launch start once all CTAs of this one have called it or are gone: its prologue
// then runs on SMs that become free. What this grid writes afterwards is still waited for.
// PTX: griddepcontrol.launch_dependents (sm_90+).
DEVICE void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
