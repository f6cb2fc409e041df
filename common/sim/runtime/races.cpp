// See races.h.
#include "races.h"

#include <algorithm>
#include <cstring>

namespace flash_sim {

namespace {

constexpr u32 kGranuleBytes = 2;
constexpr i32 kBarriers = 16;

void join(u32* into, const u32* from, i32 count) {
  for (i32 i = 0; i < count; ++i) {
    into[i] = std::max(into[i], from[i]);
  }
}

}  // namespace

const char* name_of(Access access) {
  switch (access) {
    case Access::kRead:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kCopyIssued:
    case Access::kCopyDone:
      return "cp.async";
    case Access::kTmaLoadIssued:
      return "TMA load";
    case Access::kTmaStoreIssued:
    case Access::kTmaStoreDone:
      return "TMA store";
    case Access::kPeerCopyIssued:
      return "copy to a peer";
    case Access::kWgmmaIssued:
    case Access::kWgmmaDone:
      return "wgmma";
    case Access::kMbarrierInit:
      return "mbarrier_init";
  }
  return "?";
}

void Races::start(bool enabled, i32 num_ctas, u32 smem_bytes, i32 warps_per_cta) {
  enabled_ = enabled;
  if (!enabled) {
    return;
  }
  base_epoch_ = std::max(base_epoch_, last_phase_epoch_);
  for (u32 epoch : epoch_) {
    base_epoch_ = std::max(base_epoch_, epoch);
  }
  const i32 num_warps = num_ctas * warps_per_cta;
  const i32 num_readers = warps_per_cta + (num_ctas > 1 ? 1 : 0);
  granules_per_cta_ = (smem_bytes + kGranuleBytes - 1) / kGranuleBytes;
  num_granules_ = num_ctas * granules_per_cta_;
  if (num_warps != num_warps_ || num_readers != num_readers_) {
    num_warps_ = num_warps;
    num_actors_ = num_warps + kMaxMbarriers;
    warps_per_cta_ = warps_per_cta;
    num_readers_ = num_readers;
    reads_.clear();
  }
  if (writes_.size() < num_granules_) {
    writes_.resize(num_granules_);
  }
  if (reads_.size() < num_granules_ * num_readers) {
    reads_.resize(num_granules_ * num_readers);
  }
  epoch_.assign(num_warps, base_epoch_ + 1);
  clock_.assign(num_warps * num_actors_, base_epoch_);
  fenced_.assign(num_warps * num_actors_, base_epoch_);
  fences_.assign(num_warps * 32, 0);
  joined_.assign(num_ctas * kBarriers * num_actors_, base_epoch_);
}

size_t Races::first_granule(i32 cta, u32 offset) const {
  return cta * granules_per_cta_ + offset / kGranuleBytes;
}

bool Races::same(const Record& a, const Record& b) {
  static_assert(sizeof(Record) == 8 + sizeof(Site));  // no padding
  return memcmp(&a, &b, sizeof a) == 0;
}

bool Races::ordered(const Record& before, i32 warp, u32 lane_idx) const {
  if (before.actor == warp) {
    const bool same_lane = before.lane == lane_idx && lane_idx != kAnyLane;
    return same_lane || before.epoch < epoch_[warp];
  }
  return before.epoch <= clock_[warp * num_actors_ + before.actor];
}

// Whether the async proxy sees an ordinary write that `warp` is ordered after.
bool Races::proxy_fenced(const Record& write, i32 warp) const {
  if (write.actor >= num_warps_) {
    return true;  // TMA's own
  }
  if (fences_[write.actor * 32 + write.lane] != write.fences) {
    return true;  // by the writer
  }
  const u32 fenced = fenced_[warp * num_actors_ + write.actor];
  return write.actor == warp ? write.epoch < fenced : write.epoch <= fenced;
}

Races::Conflict Races::note(i32 warp, u32 lane_idx, i32 cta, u32 offset, u32 bytes, Access access,
                            const Site& site) {
  const size_t first = first_granule(cta, offset);
  const size_t last = first + (offset % kGranuleBytes + bytes - 1) / kGranuleBytes;
  const auto conflict = [&](const Record& other, const char* what, size_t granule) {
    constexpr const char* kPending[] = {
        nullptr,
        "cp.async not yet waited for",
        "TMA load not yet waited for",
        "TMA store not yet waited for",
        "copy to a peer not yet waited for",
        "wgmma not yet waited for",
        "mbarrier_init of the barrier that lives there",
    };
    const bool is_transfer = other.actor >= num_warps_;  // that has landed
    if (is_transfer || other.in_flight != InFlight::kNo) {
      what = kPending[static_cast<i32>(
          is_transfer && other.in_flight == InFlight::kNo ? InFlight::kTmaLoad : other.in_flight)];
    }
    return Conflict{true,
                    what,
                    is_transfer ? -1 : other.actor,
                    other.lane == kAnyLane ? 0 : other.lane,
                    offset + static_cast<u32>(granule - first) * kGranuleBytes,
                    other.site};
  };
  const bool is_peer_copy = access == Access::kPeerCopyIssued;
  const bool is_read = access == Access::kRead || access == Access::kTmaStoreIssued ||
                       access == Access::kTmaStoreDone || access == Access::kWgmmaIssued ||
                       access == Access::kWgmmaDone || is_peer_copy;
  const bool is_async = access == Access::kTmaLoadIssued || access == Access::kTmaStoreIssued ||
                        access == Access::kWgmmaIssued || access == Access::kWgmmaDone ||
                        is_peer_copy;
  const InFlight in_flight = access == Access::kCopyIssued       ? InFlight::kCpAsync
                             : is_peer_copy                      ? InFlight::kPeerCopy
                             : access == Access::kTmaLoadIssued  ? InFlight::kTmaLoad
                             : access == Access::kTmaStoreIssued ? InFlight::kTmaStore
                             : access == Access::kWgmmaIssued    ? InFlight::kWgmma
                             : access == Access::kMbarrierInit   ? InFlight::kMbarrier
                                                                 : InFlight::kNo;
  const u32 epoch = epoch_[warp];
  const u8 actor = static_cast<u8>(warp);
  const u8 fences = lane_idx == kAnyLane ? 0 : fences_[warp * 32 + lane_idx];
  const i32 reader_idx = is_peer_copy ? warps_per_cta_ : warp - cta * warps_per_cta_;
  Record* own_reads = is_read ? &reads_[reader_idx * num_granules_] : nullptr;
  Record last_write;
  for (size_t granule = first; granule <= last; ++granule) {
    Record& write = writes_[granule];
    if (access == Access::kCopyDone) {  // the thread that issued it waited: an ordinary write now
      write = Record{epoch, actor, static_cast<u8>(lane_idx), InFlight::kNo, fences, site};
      continue;
    }
    // Neighbours mostly have one history, and what it says has been looked at.
    const bool checked = granule > first && same(write, last_write);
    last_write = write;
    if (!checked && write.epoch > base_epoch_) {
      if (write.in_flight != InFlight::kNo || !ordered(write, warp, lane_idx)) {
        return conflict(write, "write", granule);
      }
      if (is_async && !proxy_fenced(write, warp)) {
        return conflict(write, "write, without fence_proxy_async_shared() in between,", granule);
      }
    }
    if (is_read) {
      Record& read = own_reads[granule];
      const bool waited = access == Access::kTmaStoreDone || access == Access::kWgmmaDone;
      if (read.epoch > base_epoch_ && read.in_flight != InFlight::kNo && !waited) {
        continue;  // the one in flight ends later
      }
      const bool together = read.epoch == epoch && read.lane != lane_idx;
      read =
          Record{epoch, actor, static_cast<u8>(together ? kAnyLane : lane_idx), in_flight, 0, site};
      continue;
    }
    for (i32 reader = 0; reader < num_readers_; ++reader) {
      const Record& read = reads_[reader * num_granules_ + granule];
      if (read.epoch > base_epoch_ &&
          (read.in_flight != InFlight::kNo || !ordered(read, warp, lane_idx))) {
        return conflict(read, "read", granule);
      }
    }
    write = Record{epoch, actor, static_cast<u8>(lane_idx), in_flight, fences, site};
  }
  return Conflict{};
}

void Races::barrier_arrived(i32 barrier, i32 warp) {
  u32* joined = &joined_[barrier * num_actors_];
  join(joined, &known(warp, 0), num_actors_);
  joined[warp] = std::max(joined[warp], epoch_[warp]);
  ++epoch_[warp];
}

void Races::barrier_released(i32 barrier, i32 first_warp, u32 waiting_warps) {
  u32* joined = &joined_[barrier * num_actors_];
  for (i32 warp = 0; warp < warps_per_cta_; ++warp) {
    if ((waiting_warps >> warp & 1u) != 0) {
      join(&known(first_warp + warp, 0), joined, num_actors_);
    }
  }
  std::fill_n(joined, num_actors_, base_epoch_);
}

Races::Clock Races::clock_of(i32 warp) const {
  const u32* row = &clock_[warp * num_actors_];
  Clock clock(row, row + num_actors_);
  clock[warp] = epoch_[warp];
  return clock;
}

void Races::release(i32 warp, Clock& into) {
  into.resize(num_actors_, base_epoch_);
  join(into.data(), clock_of(warp).data(), num_actors_);
  ++epoch_[warp];
}

void Races::acquire(i32 warp, const Clock& from) {
  join(&known(warp, 0), from.data(), static_cast<i32>(from.size()));
}

void Races::phase_completed(i32 mbarrier, u32 phase, Clock& clock) {
  clock.resize(num_actors_, base_epoch_);
  last_phase_epoch_ = std::max(last_phase_epoch_, epoch_of_phase(phase));
  clock[actor_of_mbarrier(mbarrier)] = epoch_of_phase(phase);
}

void Races::tma_landed(i32 cta, u32 offset, u32 bytes, i32 mbarrier, u32 phase, const Site& site) {
  const u8 actor = static_cast<u8>(actor_of_mbarrier(mbarrier));
  const size_t last = first_granule(cta, offset + bytes - 1);
  for (size_t granule = first_granule(cta, offset); granule <= last; ++granule) {
    writes_[granule] = Record{epoch_of_phase(phase), actor, 0, InFlight::kNo, 0, site};
  }
  last_phase_epoch_ = std::max(last_phase_epoch_, epoch_of_phase(phase));
}

void Races::peer_copy_read(i32 cta, u32 offset, u32 bytes, i32 mbarrier, u32 phase,
                           const Site& site) {
  const u8 actor = static_cast<u8>(actor_of_mbarrier(mbarrier));
  const size_t last = first_granule(cta, offset + bytes - 1);
  for (size_t granule = first_granule(cta, offset); granule <= last; ++granule) {
    reads_[warps_per_cta_ * num_granules_ + granule] =
        Record{epoch_of_phase(phase), actor, 0, InFlight::kNo, 0, site};
  }
}

void Races::fence_proxy_async(i32 warp, u32 lane_idx) {
  ++fences_[warp * 32 + lane_idx];
  const Clock clock = clock_of(warp);
  std::copy(clock.begin(), clock.end(), &fenced_[warp * num_actors_]);
}

}  // namespace flash_sim
