// Checked accesses to global and shared memory, asynchronous copies. See machine.h.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "additions.h"
#include "cluster.h"

namespace flash_sim {

namespace {

std::string hex(u64 value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", value);
  return text;
}

// Where an illegal address lies relative to the nearest tensor.
std::string nearest_tensor(const Launch& launch, uintptr_t address, u32 bytes) {
  std::string text = "; the kernel was given no tensor";
  uintptr_t nearest = UINTPTR_MAX;
  for (i32 i = 0; i < launch.num_ranges; ++i) {
    const Range& range = launch.ranges[i];
    const bool below = address < range.begin;
    const uintptr_t distance = below ? range.begin - address : address + bytes - range.end;
    if (range.begin != range.end && distance < nearest) {
      nearest = distance;
      text = std::string("; nearest is tensor ") + std::to_string(i) + ", " +
             (below ? "which begins " + std::to_string(distance) + " bytes later"
                    : "passed by " + std::to_string(distance) + " bytes");
    }
  }
  return text;
}

}  // namespace

char* Cta::global(const void* pointer, u32 bytes, Use use, const char* what, const Site& site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address < hot_range_.begin || address + bytes > hot_range_.end) {
    const Range* ranges = launch->ranges;
    const Range* found = std::find_if(ranges, ranges + launch->num_ranges, [&](const Range& range) {
      return address >= range.begin && address < range.end && address + bytes <= range.end;
    });
    if (found == ranges + launch->num_ranges) {
      fail(std::string("global ") + what + " of " + std::to_string(bytes) +
               " bytes out of bounds, address " + hex(address) +
               nearest_tensor(*launch, address, bytes),
           site);
    }
    hot_range_ = *found;
    hot_written_ = &launch->written[found - ranges];
  }
  if (use == Use::kWrite) {
    const std::atomic_ref<u8> written(*hot_written_);
    if (written.load(std::memory_order_relaxed) == 0) {  // else CTAs would fight for its cache line
      written.store(1, std::memory_order_relaxed);
    }
  }
  if (launch->num_earlier != 0) {
    check_against_earlier_launches(address, bytes, use, what, site);
  }
  return const_cast<char*>(static_cast<const char*>(pointer));
}

void Cta::check_against_earlier_launches(uintptr_t address, u32 bytes, Use use, const char* what,
                                         const Site& site) {
  for (i32 i = 0; i < launch->num_earlier; ++i) {
    const Earlier& earlier = launch->earlier[i];
    const bool conflict = use == Use::kWrite || earlier.written != 0;
    if (conflict && address < earlier.end && earlier.begin < address + bytes) {
      if (ordered_after_grid_wait()) {
        return;
      }
      fail(std::string("global ") + what +
               " is not ordered after a griddepcontrol_wait(), and an " + "earlier launch " +
               (earlier.written != 0 ? "writes" : "may read") + " that tensor",
           site);
    }
  }
}

bool Cta::ordered_after_grid_wait() const {
  const i32 warp = current->warp->actor;
  return std::any_of(grid_waits_.begin(), grid_waits_.end(), [&](const GridWait& wait) {
    const bool own = wait.warp == warp && (wait.lanes >> current->lane_idx & 1u) != 0;
    return own || !races.enabled() || races.knows(warp, wait.warp, wait.epoch);
  });
}

void Cta::wait_for_earlier_launches() {
  const i32 warp = current->warp->actor;
  const u32 lane = 1u << current->lane_idx;
  for (GridWait& wait : grid_waits_) {
    if (wait.warp == warp) {
      wait.lanes |= lane;
      return;
    }
  }
  grid_waits_.push_back({warp, lane, races.enabled() ? races.epoch(warp) : 0});
}

u8* Cta::shared(u32 address, u32 bytes, const char* what, const Site& site) {
  return shared_range(address, bytes, bytes, what, site);
}

u8* Cta::shared_range(u32 address, u32 bytes, u32 alignment, const char* what, const Site& site) {
  const u32 offset = address - kSmemBase;
  const u32 size = static_cast<u32>(launch->smem_bytes);
  if (offset >= size || bytes > size - offset) {
    fail(std::string("shared memory ") + what + " of " + std::to_string(bytes) +
             " bytes out of bounds: smem_base() + " + std::to_string(static_cast<i32>(offset)) +
             ", the CTA has " + std::to_string(size) + " bytes" +
             (address >> 24 != 0 ? "; this is an address of mapa, for other instructions" : ""),
         site);
  }
  if (address % alignment != 0) {
    fail(std::string("shared memory ") + what + " of " + std::to_string(bytes) +
             " bytes misaligned: smem_base() + " + std::to_string(offset),
         site);
  }
  return smem_begin_ + offset;
}

namespace {

// The thread that `actor` and a lane stand for, as seen from a CTA.
std::string name_of_thread(Cta& cta, i32 actor, i32 lane_idx) {
  const i32 num_warps = static_cast<i32>(cta.warps().size());
  const i32 rank = actor / num_warps;
  return " by thread " + std::to_string(actor % num_warps * 32 + lane_idx) +
         (rank == cta.rank ? "" : " of CTA " + std::to_string(cta.cluster.cta(rank).block_idx));
}

}  // namespace

void Cta::check_race(u32 offset, u32 bytes, Access access, const Site& site) {
  if (!races.enabled()) {
    return;
  }
  note_race(*this, current->lane_idx, offset, bytes, access, nullptr, site);
}

void Cta::check_race_in(const Cta& owner, u32 offset, u32 bytes, Access access, const Site& site) {
  if (!races.enabled()) {
    return;
  }
  note_race(owner, current->lane_idx, offset, bytes, access, nullptr, site);
}

void Cta::note_race(const Cta& owner, u32 lane_idx, u32 offset, u32 bytes, Access access,
                    const char* what, const Site& site) {
  const Races::Conflict conflict =
      races.note(current->warp->actor, lane_idx, owner.rank, offset, bytes, access, site);
  if (!conflict.found) {
    return;
  }
  what = what == nullptr ? name_of(access) : what;
  const std::string whose = &owner == this ? "" : " of CTA " + std::to_string(owner.block_idx);
  const std::string by =
      conflict.actor < 0 ? "" : name_of_thread(*this, conflict.actor, conflict.lane_idx);
  fail("race in shared memory" + whose + " at smem_base() + " + std::to_string(conflict.offset) +
           ": this " + what + " is not ordered after the " + conflict.what + by + " at " +
           describe(conflict.site),
       site);
}

void Cta::check_race_ldmatrix(u32 offset, const Site& site) {
  check_race_of_warp(offset, 16, Access::kRead, "ldmatrix", site);
}

void Cta::check_race_of_warp(u32 offset, u32 bytes, Access access, const char* what,
                             const Site& site) {
  if (!races.enabled()) {
    return;
  }
  note_race(*this, Races::kAnyLane, offset, bytes, access, what, site);
}

void Cta::issue_copy(u32 dst, const void* src, u32 bytes, i32 valid_bytes, const Site& site) {
  if (valid_bytes < 0 || valid_bytes > static_cast<i32>(bytes)) {
    fail("cp_async_" + std::to_string(bytes) + " with valid_bytes = " + std::to_string(valid_bytes),
         site);
  }
  if (reinterpret_cast<uintptr_t>(src) % bytes != 0) {
    fail("cp_async_" + std::to_string(bytes) + " from a misaligned global address " +
             hex(reinterpret_cast<uintptr_t>(src)),
         site);
  }
  PendingCopy copy{dst - kSmemBase, bytes, current->open_group, site, {}};
  u8* destination = shared(dst, bytes, "write by cp.async", site);
  if (valid_bytes > 0) {
    memcpy(copy.data,
           global(src, static_cast<u32>(valid_bytes), Use::kRead, "read by cp.async", site),
           valid_bytes);
  }
  check_race(copy.offset, bytes, Access::kCopyIssued, site);
  memset(destination, 0xff, bytes);
  current->copies.push_back(copy);
}

void Cta::complete_copies(i32 pending) {
  Lane& lane = *current;
  while (!lane.copies.empty() && lane.copies.front().group + pending < lane.open_group) {
    const PendingCopy& copy = lane.copies.front();
    memcpy(smem_begin_ + copy.offset, copy.data, copy.bytes);
    check_race(copy.offset, copy.bytes, Access::kCopyDone, copy.site);
    lane.copies.pop_front();
  }
}

namespace {

using Use = Cta::Use;

char* aligned_global(const void* pointer, u32 bytes, Use use, const char* what, const Site& site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    this_cta().fail(std::string("global ") + what + " of " + std::to_string(bytes) +
                        " bytes misaligned, address " + hex(reinterpret_cast<uintptr_t>(pointer)),
                    site);
  }
  return this_cta().global(pointer, bytes, use, what, site);
}

// Of the launch, if it asks for that check.
Additions* additions() { return this_cta().launch->additions; }

// Around an access to a counter, see Additions::mutex.
std::unique_lock<std::mutex> counting() {
  return additions() == nullptr ? std::unique_lock<std::mutex>()
                                : std::unique_lock<std::mutex>(additions()->mutex);
}

void check_order(const f32* words, i32 count, const Site& site) {
  std::string before;
  for (i32 i = 0; i < count && before.empty() && additions() != nullptr; ++i) {
    const std::lock_guard<std::mutex> lock(additions()->mutex);
    before = additions()->add(this_cta(), words + i, site);
  }
  if (!before.empty()) {
    this_cta().fail("this addition is not ordered after " + before, site);
  }
}

}  // namespace

void load_global(void* value, const void* src, u32 bytes, Site site) {
  memcpy(value, aligned_global(src, bytes, Use::kRead, "read", site), bytes);
}

void store_global(void* dst, const void* value, u32 bytes, Site site) {
  memcpy(aligned_global(dst, bytes, Use::kWrite, "write", site), value, bytes);
}

// CTAs run on several OS threads, so these are atomic here too.
void add_global_f32(f32* dst, f32 value, Site site) {
  aligned_global(dst, sizeof(f32), Use::kWrite, "reduction", site);
  check_order(dst, 1, site);
  std::atomic_ref<f32>(*dst).fetch_add(value, std::memory_order_relaxed);
}

void add_global_v4_f32(f32* dst, const f32 (&value)[4], Site site) {
  aligned_global(dst, sizeof value, Use::kWrite, "reduction", site);
  check_order(dst, 4, site);
  for (i32 i = 0; i < 4; ++i) {
    std::atomic_ref<f32>(dst[i]).fetch_add(value[i], std::memory_order_relaxed);
  }
}

u32 add_global_u32(u32* dst, u32 value, Site site) {
  aligned_global(dst, sizeof(u32), Use::kWrite, "atomic add", site);
  const auto lock = counting();
  if (lock.owns_lock()) {
    additions()->change(this_cta(), dst);
  }
  return std::atomic_ref<u32>(*dst).fetch_add(value, std::memory_order_relaxed);
}

// These acquire and release for the whole CTA, whose fibers are one OS thread.
u64 add_global_u64(u64* dst, u64 value, Site site) {
  aligned_global(dst, sizeof(u64), Use::kWrite, "atomic add", site);
  return std::atomic_ref<u64>(*dst).fetch_add(value, std::memory_order_acq_rel);
}

u64 load_acquire_global_u64(const void* src, Site site) {
  aligned_global(src, sizeof(u64), Use::kRead, "read", site);
  Watch& watch = this_cta().current->watch;
  watch = {src, sizeof(u64), 0, false, site};
  return watch.value = watch.present_value();
}

u32 load_acquire_global_u32(const void* src, Site site) {
  aligned_global(src, sizeof(u32), Use::kRead, "read", site);
  const auto lock = counting();
  if (lock.owns_lock()) {
    additions()->acquire(this_cta(), src);
  }
  Watch& watch = this_cta().current->watch;
  watch = {src, sizeof(u32), 0, false, site};
  watch.value = watch.present_value();
  return static_cast<u32>(watch.value);
}

void store_release_global_u32(u32* dst, u32 value, Site site) {
  aligned_global(dst, sizeof(u32), Use::kWrite, "write", site);
  const auto lock = counting();
  if (lock.owns_lock()) {
    additions()->release(this_cta(), dst);
  }
  std::atomic_ref<u32>(*dst).store(value, std::memory_order_release);
}

void add_release_global_u32(u32* dst, u32 value, Site site) {
  aligned_global(dst, sizeof(u32), Use::kWrite, "reduction", site);
  const auto lock = counting();
  if (lock.owns_lock()) {
    additions()->release(this_cta(), dst);
  }
  std::atomic_ref<u32>(*dst).fetch_add(value, std::memory_order_release);
}

void fence_acq_rel_gpu() {
  const auto lock = counting();
  if (lock.owns_lock()) {
    additions()->fence(this_cta());
  }
  std::atomic_thread_fence(std::memory_order_acq_rel);
}

u64 Watch::present_value() const {
  void* at = const_cast<void*>(address);
  return bytes == sizeof(u64)
             ? std::atomic_ref<u64>(*static_cast<u64*>(at)).load(std::memory_order_acquire)
             : std::atomic_ref<u32>(*static_cast<u32*>(at)).load(std::memory_order_acquire);
}

// "lanes 0 wait for ... to change": those that sleep until global memory does.
std::string Cta::global_waits_of(const Warp& warp) const {
  std::string text;
  for (const Lane& lane : warp.lanes) {
    const Watch& watch = lane.watch;
    if (!watch.sleeps) {
      continue;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(watch.address);
    i32 tensor = 0;
    while (address < launch->ranges[tensor].begin || address >= launch->ranges[tensor].end) {
      ++tensor;
    }
    text += (text.empty() ? "lane " : "; lane ") + std::to_string(lane.lane_idx) +
            " waits for the " + std::to_string(watch.bytes) + " bytes at " +
            std::to_string(address - launch->ranges[tensor].begin) + " of tensor " +
            std::to_string(tensor) + ", which hold " + std::to_string(watch.value) +
            ", to change, " + describe(watch.site);
  }
  return text;
}

void load_shared(void* value, u32 src, u32 bytes, Site site) {
  Cta& cta = this_cta();
  const u8* from = cta.shared(src, bytes, "read", site);
  cta.check_race(src - kSmemBase, bytes, Access::kRead, site);
  memcpy(value, from, bytes);
}

void store_shared(u32 dst, const void* value, u32 bytes, Site site) {
  Cta& cta = this_cta();
  u8* to = cta.shared(dst, bytes, "write", site);
  cta.check_race(dst - kSmemBase, bytes, Access::kWrite, site);
  memcpy(to, value, bytes);
}

void cp_async(u32 dst, const void* src, u32 bytes, i32 valid_bytes, Site site) {
  this_cta().issue_copy(dst, src, bytes, valid_bytes, site);
}

void griddepcontrol_wait() { this_cta().wait_for_earlier_launches(); }

void cp_async_commit_group() { ++this_cta().current->open_group; }

void cp_async_wait_group(i32 pending) { this_cta().complete_copies(pending); }

}  // namespace flash_sim
