// Checker of the order in which CTAs add floats to global memory, a happens-before checker as
// races.h. On request (launcher.checks(ordered_adds=True)): most kernels leave that order open.
//
// Additions to the same word by different threads need an order: within a CTA as in races.h,
// between CTAs one that goes through a counter in global memory. What a thread releases by it is
// what its warp knows to be over: its own accesses before its last barrier or warp_sync(), those of
// others that it has learnt of at barriers, and what CTAs ahead released to it. An addition without
// release publishes what its thread's last fence_acq_rel_gpu() did. Who looks at the counter with
// acquire learns all that was released to it, as do others that meet that thread at a barrier or
// warp_sync() afterwards. Counters have 32 bits; bulk additions are not checked.
#pragma once
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "calls.h"

namespace flash_sim {

class Cta;

class Additions {
 public:
  // Held while a counter changes or is looked at, so that its value and what it orders agree.
  std::mutex mutex;

  // Notes an addition of the running thread. Not empty: what the one before it was, by a thread
  // that is not known to have made it.
  std::string add(const Cta& cta, const f32* word, const Site& site);
  // The running thread has changed a counter, or looked at it with acquire.
  void release(const Cta& cta, const void* counter);
  void change(const Cta& cta, const void* counter);  // without release
  void acquire(const Cta& cta, const void* counter);
  void fence(const Cta& cta);

 private:
  using Clock = std::vector<u32>;  // [warp of the launch]: the last epoch that is over
  struct Place {
    i32 block, warp;  // warp: of the launch
    u32 lane, epoch;
    Site site;
  };
  struct Look {
    i32 actor;  // in the cluster
    u32 lane, epoch;
    Clock clock;
  };
  Clock known(const Cta& cta);
  static bool learnt(const Cta& cta, const Look& look);
  bool ordered(const Cta& cta, const Place& before);

  std::unordered_map<const f32*, Place> last_;
  std::unordered_map<const void*, Clock> counters_;
  std::unordered_map<i32, std::vector<Look>> looks_;  // [first block of the cluster]
  std::unordered_map<i64, Clock> fences_;             // [thread of the launch]
};

}  // namespace flash_sim
