// See additions.h.
#include "additions.h"

#include <algorithm>

#include "cluster.h"

namespace flash_sim {

namespace {

i32 warps_per_cta(const Cta& cta) { return cta.launch->num_threads / 32; }
i32 first_block(const Cta& cta) { return cta.block_idx - cta.rank; }
// Warps of a cluster are numbered through, and so are those of a launch.
i32 first_warp(const Cta& cta) { return first_block(cta) * warps_per_cta(cta); }

void join(std::vector<u32>& into, const std::vector<u32>& from) {
  into.resize(std::max(into.size(), from.size()), 0);
  for (size_t i = 0; i < from.size(); ++i) {
    into[i] = std::max(into[i], from[i]);
  }
}

}  // namespace

std::string Additions::add(const Cta& cta, const f32* word, const Site& site) {
  const Lane& lane = *cta.current;
  const i32 actor = lane.warp->actor;
  const Place now{cta.block_idx, first_warp(cta) + actor, lane.lane_idx, cta.races.epoch(actor),
                  site};
  const auto [found, is_first] = last_.try_emplace(word, now);
  if (is_first) {
    return "";
  }
  const Place before = found->second;
  found->second = now;
  if (ordered(cta, before)) {
    return "";
  }
  return "the addition by CTA " + std::to_string(before.block) + ", warp " +
         std::to_string(before.warp % warps_per_cta(cta)) + ", lane " +
         std::to_string(before.lane) + " at " + describe(before.site);
}

bool Additions::ordered(const Cta& cta, const Place& before) {
  const Lane& lane = *cta.current;
  const i32 actor = lane.warp->actor;
  const i32 other = before.warp - first_warp(cta);
  if (other == actor && before.lane == lane.lane_idx) {
    return true;
  }
  if (other >= 0 && other < warps_per_cta(cta) * cta.launch->cluster_size) {
    return cta.races.knows(actor, other, before.epoch);
  }
  const std::vector<Look>& looks = looks_[first_block(cta)];
  return std::any_of(looks.rbegin(), looks.rend(), [&](const Look& look) {
    return static_cast<size_t>(before.warp) < look.clock.size() &&
           look.clock[before.warp] >= before.epoch && learnt(cta, look);
  });
}

bool Additions::learnt(const Cta& cta, const Look& look) {
  const Lane& lane = *cta.current;
  const bool own = look.actor == lane.warp->actor && look.lane == lane.lane_idx;
  return own || cta.races.knows(lane.warp->actor, look.actor, look.epoch);
}

Additions::Clock Additions::known(const Cta& cta) {
  const i32 actor = cta.current->warp->actor, first = first_warp(cta);
  const i32 num_warps = warps_per_cta(cta) * cta.launch->cluster_size;
  const Races::Clock of_cluster = cta.races.clock_of(actor);
  Clock clock(first + num_warps, 0);
  std::copy_n(of_cluster.begin(), num_warps, clock.begin() + first);
  clock[first + actor] = cta.races.epoch(actor) - 1;
  for (const Look& look : looks_[first_block(cta)]) {
    if (learnt(cta, look)) {
      join(clock, look.clock);
    }
  }
  return clock;
}

void Additions::release(const Cta& cta, const void* counter) {
  join(counters_[counter], known(cta));
}

void Additions::change(const Cta& cta, const void* counter) {
  const i64 thread = i64{cta.block_idx} * cta.launch->num_threads + cta.current->thread_idx;
  join(counters_[counter], fences_[thread]);
}

void Additions::acquire(const Cta& cta, const void* counter) {
  const Lane& lane = *cta.current;
  const i32 actor = lane.warp->actor;
  looks_[first_block(cta)].push_back(
      {actor, lane.lane_idx, cta.races.epoch(actor), counters_[counter]});
}

void Additions::fence(const Cta& cta) {
  const i64 thread = i64{cta.block_idx} * cta.launch->num_threads + cta.current->thread_idx;
  fences_[thread] = known(cta);
}

}  // namespace flash_sim
