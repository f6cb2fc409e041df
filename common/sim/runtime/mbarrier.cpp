// mbarriers: arrivals, bytes, phases, and the lanes that wait for them. See async.h.
#include <algorithm>

#include "cluster.h"

namespace flash_sim {

namespace {

constexpr u32 kBytes = 8;
constexpr u32 kMaxCount = (1u << 20) - 1;
constexpr i64 kMaxBytes = (1 << 20) - 1;

std::string place_of(u32 offset) { return "mbarrier at smem_base() + " + std::to_string(offset); }

}  // namespace

void Mbarriers::init(Cta& cta, u32 bar, u32 count, const Site& site) {
  u8* bytes = cta.shared(bar, kBytes, "mbarrier_init", site);
  if (count < 1 || count > kMaxCount) {
    cta.fail("mbarrier_init with count = " + std::to_string(count), site);
  }
  const u32 offset = bar - kSmemBase;
  const auto same = [&](const Mbarrier& barrier) { return barrier.offset == offset; };
  if (std::any_of(barriers_.begin(), barriers_.end(), same)) {
    cta.fail(place_of(offset) + " is initialised twice", site);
  }
  if (cta.cluster.num_mbarriers == Races::kMaxMbarriers) {
    cta.fail("more than " + std::to_string(Races::kMaxMbarriers) + " mbarriers in a cluster", site);
  }
  cta.check_race(offset, kBytes, Access::kMbarrierInit, site);
  std::fill_n(bytes, kBytes, u8{0xff});
  Mbarrier& barrier = barriers_.emplace_back();
  barrier.idx = cta.cluster.num_mbarriers++;
  barrier.offset = offset;
  barrier.count = barrier.missing_arrivals = count;
  barrier.init_lane = cta.current;
  if (cta.races.enabled()) {
    barrier.init_epoch = cta.races.epoch(cta.current->warp->actor);
  }
}

void Mbarriers::fence_init(Cta& cta) {
  for (Mbarrier& barrier : barriers_) {
    barrier.visible_to_tma |= barrier.init_lane == cta.current;
  }
}

Mbarrier& Mbarriers::find(Cta& cta, u32 bar, const char* what, const Site& site) {
  cta.shared(bar, kBytes, what, site);
  const u32 offset = bar - kSmemBase;
  const auto found = std::find_if(barriers_.begin(), barriers_.end(),
                                  [&](const Mbarrier& b) { return b.offset == offset; });
  if (found == barriers_.end()) {
    cta.fail(std::string(what) + " on smem_base() + " + std::to_string(offset) +
                 ", where no mbarrier was initialised",
             site);
  }
  if (cta.races.enabled() && cta.current != found->init_lane &&
      !cta.races.knows(cta.current->warp->actor, found->init_lane->warp->actor,
                       found->init_epoch)) {
    cta.fail(std::string(what) + " on the " + place_of(offset) +
                 " is not ordered after its mbarrier_init by thread " +
                 std::to_string(found->init_lane->thread_idx),
             site);
  }
  return *found;
}

// One that not only threads of its own CTA use.
Mbarrier& Mbarriers::find_for_async(Cta& cta, u32 bar, const char* what, const Site& site) {
  Mbarrier& barrier = find(cta, bar, what, site);
  if (!barrier.visible_to_tma) {
    cta.fail(
        std::string(what) + " on an mbarrier whose thread has not called fence_mbarrier_init()",
        site);
  }
  return barrier;
}

namespace {

void check_arrival_is_missing(Cta& cta, const Mbarrier& barrier, const Site& site) {
  if (barrier.missing_arrivals == 0) {
    cta.fail(place_of(barrier.offset) + " gets more than its " + std::to_string(barrier.count) +
                 " arrivals in a phase that still waits for " +
                 std::to_string(barrier.missing_bytes) + " bytes",
             site);
  }
}

}  // namespace

void Mbarriers::arrive(Cta& cta, u32 bar, u32 expected_bytes, const Site& site) {
  Mbarrier& barrier = find(cta, bar, "mbarrier_arrive", site);
  check_arrival_is_missing(cta, barrier, site);
  barrier.missing_bytes += expected_bytes;
  if (barrier.missing_bytes > kMaxBytes) {
    cta.fail(place_of(barrier.offset) + " expects " + std::to_string(barrier.missing_bytes) +
                 " bytes; a phase can count " + std::to_string(kMaxBytes),
             site);
  }
  if (cta.races.enabled()) {
    cta.races.release(cta.current->warp->actor, barrier.arrived);
  }
  --barrier.missing_arrivals;
  complete_phase_if_due(cta.races, barrier);
}

void Mbarriers::arrive_at_peer(Cta& cta, u32 cluster_bar, const Site& site) {
  constexpr const char* kWhat = "mbarrier_arrive_cluster";
  const Cluster::Peer peer = cta.cluster.find_peer(cta, cluster_bar, kWhat, site);
  Mbarrier& barrier = peer.cta->mbarriers.find_for_async(cta, peer.address, kWhat, site);
  check_arrival_is_missing(cta, barrier, site);
  if (cta.races.enabled()) {
    const i32 actor = cta.current->warp->actor;
    if (peer.cta != &cta) {
      cta.cluster.note_access(*peer.cta, actor, cta.races.epoch(actor), site);
    }
    cta.races.release(actor, peer.cta == &cta ? barrier.arrived : barrier.arrived_from_peers);
  }
  --barrier.missing_arrivals;
  complete_phase_if_due(cta.races, barrier);
}

void Mbarriers::bytes_arrived(Races& races, Mbarrier& barrier, u32 bytes) {
  barrier.missing_bytes -= bytes;
  complete_phase_if_due(races, barrier);
}

void Mbarriers::complete_phase_if_due(Races& races, Mbarrier& barrier) {
  if (barrier.missing_arrivals != 0 || barrier.missing_bytes != 0) {
    return;
  }
  for (Mbarrier::Waiter& waiter : barrier.waiters) {
    if (waiter.woken) {
      Cta& cta = *waiter.lane->warp->cta;
      cta.current = waiter.lane;
      cta.fail("the " + place_of(barrier.offset) + " completes phase " +
                   std::to_string(barrier.phase) +
                   " before this thread has seen the end of phase " + std::to_string(waiter.phase) +
                   ", for which it waits",
               waiter.site);
    }
    waiter.woken = true;
    waiter.lane->warp->cta->wake(*waiter.lane);
  }
  barrier.completed = barrier.arrived;
  barrier.completed_from_peers = barrier.arrived_from_peers;
  if (races.enabled()) {
    races.phase_completed(barrier.idx, barrier.phase, barrier.completed);
  }
  ++barrier.phase;
  barrier.missing_arrivals = barrier.count;
}

bool Mbarriers::try_wait(Cta& cta, u32 bar, u32 parity, bool in_cluster, const Site& site) {
  Mbarrier& barrier = find(cta, bar, "mbarrier_try_wait_parity", site);
  if (parity > 1) {
    cta.fail("mbarrier_try_wait_parity with parity = " + std::to_string(parity), site);
  }
  Lane* self = cta.current;
  if ((barrier.phase & 1u) == parity) {
    if (cta.may_pretend()) {
      cta.give_way();
      return false;
    }
    barrier.waiters.push_back({self, barrier.phase, false, site});
    cta.sleep();
    const auto mine = std::find_if(barrier.waiters.begin(), barrier.waiters.end(),
                                   [&](const Mbarrier::Waiter& w) { return w.lane == self; });
    barrier.waiters.erase(mine);
  }
  if (cta.races.enabled()) {
    cta.races.acquire(self->warp->actor, barrier.completed);
    if (in_cluster) {
      cta.races.acquire(self->warp->actor, barrier.completed_from_peers);
    }
  }
  return true;
}

std::string Mbarriers::waits_of(const Warp& warp) const {
  std::string text;
  for (const Mbarrier& barrier : barriers_) {
    u32 lanes = 0;
    const Mbarrier::Waiter* first = nullptr;
    for (const Mbarrier::Waiter& waiter : barrier.waiters) {
      if (waiter.lane->warp == &warp && !waiter.woken) {
        first = first == nullptr ? &waiter : first;
        lanes |= 1u << waiter.lane->lane_idx;
      }
    }
    if (lanes != 0) {
      text += (text.empty() ? "" : "; ") + lane_list(lanes) + " wait for phase " +
              std::to_string(barrier.phase) + " (parity " + std::to_string(barrier.phase & 1u) +
              ") of the " + place_of(barrier.offset) + ": " +
              std::to_string(barrier.missing_arrivals) + " of " + std::to_string(barrier.count) +
              " arrivals and " + std::to_string(barrier.missing_bytes) + " bytes are missing, " +
              describe(first->site);
    }
  }
  return text;
}

void mbarrier_init(u32 bar, u32 count, Site site) {
  this_cta().mbarriers.init(this_cta(), bar, count, site);
}

void mbarrier_arrive(u32 bar, Site site) { this_cta().mbarriers.arrive(this_cta(), bar, 0, site); }

void mbarrier_arrive_expect_tx(u32 bar, u32 bytes, Site site) {
  this_cta().mbarriers.arrive(this_cta(), bar, bytes, site);
}

bool mbarrier_try_wait_parity(u32 bar, u32 parity, Site site) {
  return this_cta().mbarriers.try_wait(this_cta(), bar, parity, false, site);
}

void mbarrier_arrive_cluster(u32 bar, Site site) {
  Mbarriers::arrive_at_peer(this_cta(), bar, site);
}

bool mbarrier_try_wait_parity_cluster(u32 bar, u32 parity, Site site) {
  return this_cta().mbarriers.try_wait(this_cta(), bar, parity, true, site);
}

void fence_mbarrier_init() { this_cta().mbarriers.fence_init(this_cta()); }

}  // namespace flash_sim
