// See cluster.h.
#include "cluster.h"

#include <algorithm>

#include "calls_hopper.h"

namespace flash_sim {

namespace {

// A shared address of the cluster: one more than the CTA's rank above the address there. 0 above:
// an address of the own CTA, which is one of the cluster too.
constexpr u32 kRankShift = 24;

}  // namespace

Cluster::State Cluster::run(const Launch& launch, i32 first_block) {
  size_ = launch.cluster_size;
  error_.clear();
  const i32 warps_per_cta = launch.num_threads / 32;
  if (warps_per_cta * size_ + Races::kMaxMbarriers > Races::kMaxActors) {
    error_ = "clusters of more than " +
             std::to_string((Races::kMaxActors - Races::kMaxMbarriers) / warps_per_cta) +
             " such CTAs are not simulated";
    return State::kFailed;
  }
  while (static_cast<i32>(ctas_.size()) < size_) {
    ctas_.push_back(std::make_unique<Cta>(*this, static_cast<i32>(ctas_.size())));
  }
  races.start(launch.racecheck != 0, size_, static_cast<u32>(launch.smem_bytes), warps_per_cta);
  num_mbarriers = 0;
  barrier_phase_ = 0;
  arrived_.clear();
  completed_.clear();
  accesses_.assign(size_ > 1 && races.enabled() ? size_ : 0,
                   std::vector<Accesses>(races.num_actors()));
  for (i32 rank = 0; rank < size_; ++rank) {
    if (!ctas_[rank]->start(launch, first_block + rank)) {
      error_ = "no memory for " + std::to_string(launch.num_threads) + " fiber stacks";
      return State::kFailed;
    }
  }
  watchers_.clear();
  Lane* first = pick(*ctas_[0]);
  first->warp->cta->current = first;
  return enter(*first->warp->cta, first->fiber);
}

Cluster::State Cluster::enter(Cta& cta, Fiber& fiber) {
  parked_ = nullptr;
  set_this_cta(&cta);
  fiber_switch(scheduler_, fiber);
  set_this_cta(nullptr);
  return parked_ != nullptr ? State::kParked : error_.empty() ? State::kReturned : State::kFailed;
}

Cluster::State Cluster::resume() { return enter(*parked_cta_, *parked_); }

bool Cluster::can_resume() const {
  return std::any_of(watchers_.begin(), watchers_.end(), [](const Lane* lane) {
    return lane->watch.value != lane->watch.present_value();
  });
}

bool Cluster::wake_watchers() {
  const auto changed = [](Lane* lane) {
    if (lane->watch.value == lane->watch.present_value()) {
      return false;
    }
    lane->watch.sleeps = false;
    lane->warp->cta->wake(*lane);
    return true;
  };
  return std::erase_if(watchers_, changed) != 0;
}

void Cluster::park(Fiber& from) {
  parked_ = &from;
  parked_cta_ = &this_cta();
  fiber_switch(from, scheduler_);
}

bool Cluster::waited_for_earlier_launches() const {
  return std::any_of(ctas_.begin(), ctas_.begin() + size_,
                     [](const auto& cta) { return cta->waited_for_earlier_launches(); });
}

Lane* Cluster::pick_of_any(Cta& running) {
  const u32 first = running.launch->seed != 0 ? static_cast<u32>(running.random())
                                              : static_cast<u32>(running.rank);
  for (i32 i = 0; i < size_; ++i) {
    Lane* lane = ctas_[(first % size_ + i) % size_]->pick();
    if (lane != nullptr) {
      return lane;
    }
  }
  return nullptr;
}

bool Cluster::land_one(Cta& running) {
  for (i32 i = 0; i < size_; ++i) {
    Cta& cta = *ctas_[(running.rank + i) % size_];
    if (cta.tma.land_one(cta)) {
      return true;
    }
  }
  return false;
}

std::string Cluster::waiting_list() const {
  std::string text;
  for (i32 rank = 0; rank < size_; ++rank) {
    if (size_ > 1) {
      text += " CTA " + std::to_string(ctas_[rank]->block_idx) + "\n";
    }
    text += ctas_[rank]->waiting_list();
  }
  return text;
}

void Cluster::leave_with_error(Fiber& from, std::string&& error) {
  error_ = error;
  std::string().swap(error);  // the stack that has it is never unwound
  leave(from);
}

void Cluster::arrive(Cta& cta, Warp& warp) {
  if (warp.cluster_arrivals != warp.cluster_waits) {
    cta.fail("this warp arrives at the cluster's barrier twice without waiting in between",
             warp.site);
  }
  ++warp.cluster_arrivals;
  if (races.enabled()) {
    races.release(warp.actor, arrived_);
  }
  release_barrier_if_complete();
}

bool Cluster::wait(Cta& cta, Warp& warp) {
  if (warp.cluster_arrivals == warp.cluster_waits) {
    cta.fail("this warp waits at the cluster's barrier without having arrived there", warp.site);
  }
  ++warp.cluster_waits;
  if (barrier_phase_ < warp.cluster_waits) {
    warp.at_cluster_barrier = true;
    return false;
  }
  if (races.enabled()) {
    races.acquire(warp.actor, completed_);
  }
  return true;
}

// Warps that are gone don't count.
void Cluster::release_barrier_if_complete() {
  bool anyone = false;
  for (i32 rank = 0; rank < size_; ++rank) {
    for (const Warp& warp : ctas_[rank]->warps()) {
      const bool arrived = warp.cluster_arrivals > barrier_phase_;
      anyone |= arrived;
      if (!arrived && warp.exited != kAllLanes) {
        return;
      }
    }
  }
  if (!anyone) {
    return;
  }
  ++barrier_phase_;
  completed_ = std::move(arrived_);
  arrived_.clear();
  for (i32 rank = 0; rank < size_; ++rank) {
    for (Warp& warp : ctas_[rank]->warps()) {
      if (warp.at_cluster_barrier) {
        warp.at_cluster_barrier = false;
        warp.runnable = kAllLanes;
        if (races.enabled()) {
          races.acquire(warp.actor, completed_);
        }
      }
    }
  }
}

Cluster::Peer Cluster::find_peer(Cta& cta, u32 cluster_address, const char* what,
                                 const Site& site) {
  const u32 above = cluster_address >> kRankShift;
  const u32 address = cluster_address & ((1u << kRankShift) - 1);
  Cta* peer = &cta;
  if (above > static_cast<u32>(size_)) {
    cta.fail(std::string(what) + " at an address that is not of this cluster", site);
  } else if (above != 0) {
    peer = ctas_[above - 1].get();
  }
  if (peer->returned()) {
    cta.fail(std::string(what) + " in the shared memory of CTA " + std::to_string(peer->block_idx) +
                 ", whose threads have all returned from the kernel",
             site);
  }
  return {peer, address};
}

void Cluster::note_access(const Cta& owner, i32 actor, u32 epoch, const Site& site) {
  if (!accesses_.empty()) {
    accesses_[owner.rank][actor] = {epoch, site};
  }
}

void Cluster::last_thread_returns(Cta& cta) {
  for (i32 rank = 0; rank < size_; ++rank) {
    if (const Site* site = ctas_[rank]->tma.copy_in_flight_to(cta)) {
      cta.fail("the last thread returns from the kernel while this copy from CTA " +
                   std::to_string(ctas_[rank]->block_idx) + " to its shared memory is in flight",
               *site);
    }
  }
  if (accesses_.empty()) {
    return;
  }
  for (i32 actor = 0; actor < races.num_actors(); ++actor) {
    const Accesses& accesses = accesses_[cta.rank][actor];
    const auto knows = [&](const Warp& warp) {
      return races.knows(warp.actor, actor, accesses.last_epoch);
    };
    if (accesses.last_epoch != 0 && std::none_of(cta.warps().begin(), cta.warps().end(), knows)) {
      cta.fail(
          "the last thread returns from the kernel, and nothing orders that after this access "
          "to its shared memory by another CTA",
          accesses.site);
    }
  }
}

bool Cluster::all_returned() const {
  return std::all_of(ctas_.begin(), ctas_.begin() + size_,
                     [](const auto& cta) { return cta->returned(); });
}

u32 cluster_ctarank() { return static_cast<u32>(this_cta().rank); }

u32 mapa_shared_cluster(u32 address, u32 rank, Site site) {
  Cta& cta = this_cta();
  if (rank >= static_cast<u32>(cta.cluster.size())) {
    cta.fail("mapa to rank " + std::to_string(rank) + " in a cluster of " +
                 std::to_string(cta.cluster.size()),
             site);
  }
  if (address >> kRankShift != 0) {
    cta.fail("mapa of an address of the cluster: it takes one of the own CTA", site);
  }
  return (rank + 1) << kRankShift | address;
}

}  // namespace flash_sim
