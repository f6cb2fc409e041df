// Race detector on shared memory, a happens-before checker.
//
// Two accesses to the same bytes, at least one a write, need an order. Threads of different warps
// get it from a barrier that both warps reach in between; lanes of one warp from a barrier or
// warp_sync(). Nothing else counts: shuffles, votes, mma and ldmatrix do not order memory. Every
// warp has an epoch, which advances at each of its barriers and warp_sync()s, and a clock: for each
// warp, the last epoch known to be over. A barrier joins the clocks of those who arrive into the
// clocks of those who wait. Every 2 bytes of shared memory remember their last write and the last
// read of each warp.
//
// sm_90 adds: arriving at an mbarrier releases, a successful wait acquires. Each mbarrier has a
// column in the clocks besides the warps, whose epochs are its phases: they stand for the TMA loads
// that complete on it. TMA and wgmma access shared memory through the async proxy, from issue to
// wait; ordinary writes before that also need fence_proxy_async_shared(), by the writer or by the
// issuer.
#pragma once
#include <string>
#include <vector>

#include "calls.h"

namespace flash_sim {

enum class Access : u8 {
  kRead,
  kWrite,
  kCopyIssued,
  kCopyDone,
  kTmaLoadIssued,
  kTmaStoreIssued,
  kTmaStoreDone,  // it has read its source
  kWgmmaIssued,
  kWgmmaDone,
  kMbarrierInit,
};

const char* name_of(Access access);

class Races {
 public:
  static constexpr u32 kAnyLane = 255;  // a read by all lanes of a warp

  // Starts a CTA. What earlier ones did counts as ordered before.
  void start(bool enabled, u32 smem_bytes, i32 num_warps);
  bool enabled() const { return enabled_; }

  // Checks and notes an access to [offset, offset + bytes). On a race, returns the other side's
  // description. lane_idx: kAnyLane for ldmatrix and wgmma, which read for every lane.
  struct Conflict {
    bool found = false;
    const char* what = "";
    i32 thread_idx = 0;  // the first thread of its warp if all lanes took part; -1: a TMA load
    u32 offset = 0;
    Site site;
  };
  Conflict note(i32 warp, u32 lane_idx, u32 offset, u32 bytes, Access access, const Site& site);

  void warp_synced(i32 warp) { ++epoch_[warp]; }
  void barrier_arrived(i32 barrier, i32 warp);
  void barrier_released(i32 barrier, u32 waiting_warps);

  // mbarriers, numbered from 0. A clock has one element per warp, then one per mbarrier.
  using Clock = std::vector<u32>;
  u32 epoch(i32 warp) const { return epoch_[warp]; }
  bool knows(i32 warp, i32 other, u32 epoch) const {
    return warp == other ? epoch < epoch_[warp] : epoch <= clock_[warp * num_actors_ + other];
  }
  Clock clock_of(i32 warp) const;  // with its own present epoch
  void release(i32 warp, Clock& into);
  void acquire(i32 warp, const Clock& from);
  void phase_completed(i32 mbarrier, u32 phase, Clock& clock);
  // A TMA load has landed, in this phase of its mbarrier.
  void tma_landed(u32 offset, u32 bytes, i32 mbarrier, u32 phase, const Site& site);
  void fence_proxy_async(i32 warp, u32 lane_idx);

  static constexpr i32 kMaxMbarriers = 128;

 private:
  enum class InFlight : u8 { kNo, kCpAsync, kTmaLoad, kTmaStore, kWgmma, kMbarrier };
  struct Record {
    u32 epoch = 0;
    u8 actor = 0;  // warp, or number of warps + mbarrier
    u8 lane = 0;
    InFlight in_flight = InFlight::kNo;  // asynchronous and not yet waited for
    u8 fences = 0;                       // proxy fences of this thread before it, modulo 256
    Site site;
  };
  bool ordered(const Record& before, i32 warp, u32 lane_idx) const;
  bool proxy_fenced(const Record& write, i32 warp) const;
  u32& known(i32 warp, i32 actor) { return clock_[warp * num_actors_ + actor]; }

  bool enabled_ = false;
  i32 num_warps_ = 0;
  i32 num_actors_ = 0;
  u32 base_epoch_ = 0;          // all epochs up to here belong to earlier CTAs
  u32 last_phase_epoch_ = 0;    // of any mbarrier
  std::vector<Record> writes_;  // [granule]
  std::vector<Record> reads_;   // [granule][warp]
  std::vector<u32> epoch_;      // [warp]
  std::vector<u32> clock_;      // [warp][actor]
  std::vector<u32> fenced_;     // [warp][actor]: its clock at its last proxy fence
  std::vector<u8> fences_;      // [thread]: proxy fences so far, modulo 256
  std::vector<u32> joined_;     // [barrier][actor]: clocks of those that have arrived
};

}  // namespace flash_sim
