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
// The CTAs of a cluster share a detector: warps are numbered through, and offsets are of one CTA's
// shared memory, named by its rank. Only its own warps read it, but for copies to other CTAs.
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
  kTmaStoreDone,    // it has read its source
  kPeerCopyIssued,  // reads its source
  kWgmmaIssued,
  kWgmmaDone,
  kMbarrierInit,
};

const char* name_of(Access access);

class Races {
 public:
  static constexpr u32 kAnyLane = 255;  // a read by all lanes of a warp
  static constexpr i32 kMaxActors = 256;

  // Starts a cluster. What earlier ones did counts as ordered before. smem_bytes: of each CTA.
  void start(bool enabled, i32 num_ctas, u32 smem_bytes, i32 warps_per_cta);
  bool enabled() const { return enabled_; }
  i32 num_actors() const { return num_actors_; }  // warps, then mbarriers

  // Checks and notes an access to [offset, offset + bytes). On a race, returns the other side's
  // description. lane_idx: kAnyLane for ldmatrix and wgmma, which read for every lane.
  struct Conflict {
    bool found = false;
    const char* what = "";
    i32 actor = -1;    // the warp; -1: a transfer
    i32 lane_idx = 0;  // the first one if all took part
    u32 offset = 0;
    Site site;
  };
  Conflict note(i32 warp, u32 lane_idx, i32 cta, u32 offset, u32 bytes, Access access,
                const Site& site);

  void warp_synced(i32 warp) { ++epoch_[warp]; }
  // barrier: numbered through, 16 in each CTA. waiting_warps: a bit each, from first_warp on.
  void barrier_arrived(i32 barrier, i32 warp);
  void barrier_released(i32 barrier, i32 first_warp, u32 waiting_warps);

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
  void tma_landed(i32 cta, u32 offset, u32 bytes, i32 mbarrier, u32 phase, const Site& site);
  // A copy to a peer has read its source.
  void peer_copy_read(i32 cta, u32 offset, u32 bytes, i32 mbarrier, u32 phase, const Site& site);
  i32 actor_of_mbarrier(i32 mbarrier) const { return num_warps_ + mbarrier; }
  u32 epoch_of_phase(u32 phase) const { return base_epoch_ + 1 + phase; }
  void fence_proxy_async(i32 warp, u32 lane_idx);

  static constexpr i32 kMaxMbarriers = 128;

 private:
  enum class InFlight : u8 { kNo, kCpAsync, kTmaLoad, kTmaStore, kPeerCopy, kWgmma, kMbarrier };
  struct Record {
    u32 epoch = 0;
    u8 actor = 0;  // warp, or number of warps + mbarrier
    u8 lane = 0;
    InFlight in_flight = InFlight::kNo;  // asynchronous and not yet waited for
    u8 fences = 0;                       // proxy fences of this thread before it, modulo 256
    Site site;
  };
  static bool same(const Record& a, const Record& b);
  bool ordered(const Record& before, i32 warp, u32 lane_idx) const;
  bool proxy_fenced(const Record& write, i32 warp) const;
  size_t first_granule(i32 cta, u32 offset) const;
  u32& known(i32 warp, i32 actor) { return clock_[warp * num_actors_ + actor]; }

  bool enabled_ = false;
  i32 num_warps_ = 0;
  i32 num_actors_ = 0;
  i32 warps_per_cta_ = 0;
  i32 num_readers_ = 0;  // of a CTA's memory: its warps, and in clusters copies to peers
  size_t granules_per_cta_ = 0;
  size_t num_granules_ = 0;
  u32 base_epoch_ = 0;          // all epochs up to here belong to earlier CTAs
  u32 last_phase_epoch_ = 0;    // of any mbarrier
  std::vector<Record> writes_;  // [granule]
  std::vector<Record> reads_;   // [reader][granule]
  std::vector<u32> epoch_;      // [warp]
  std::vector<u32> clock_;      // [warp][actor]
  std::vector<u32> fenced_;     // [warp][actor]: its clock at its last proxy fence
  std::vector<u8> fences_;      // [thread]: proxy fences so far, modulo 256
  std::vector<u32> joined_;     // [barrier][actor]: clocks of those that have arrived
};

}  // namespace flash_sim
