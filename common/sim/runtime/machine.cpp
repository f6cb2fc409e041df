// Fibers of a CTA: who runs next, rendezvous of a warp's lanes, barriers, deadlocks. See
// machine.h.
#include "machine.h"

#include <bit>
#include <cstdio>
#include <cstring>

#include "cluster.h"

namespace flash_sim {

namespace {

thread_local Cta* t_cta = nullptr;

void fiber_main() {
  Cta& cta = this_cta();
  cta.launch->run_thread(cta.launch->params);
  cta.exit_lane();
}

}  // namespace

Cta& this_cta() { return *t_cta; }

void set_this_cta(Cta* cta) { t_cta = cta; }

std::string describe(const Site& site) {
  const char* file = site.file_name();
  if (file[0] == '.' && file[1] == '/') {
    file += 2;
  }
  return std::string(file) + ":" + std::to_string(site.line());
}

std::string lane_list(u32 mask) {
  if (mask == kAllLanes) {
    return "all lanes";
  }
  std::string text = std::popcount(mask) == 1 ? "lane " : "lanes ";
  for (i32 first = 0; first < 32; ++first) {
    if ((mask >> first & 1u) == 0) {
      continue;
    }
    i32 last = first;
    while (last < 31 && (mask >> (last + 1) & 1u) != 0) {
      ++last;
    }
    text += std::to_string(first) + (last > first ? "-" + std::to_string(last) : "") + ",";
    first = last;
  }
  text.pop_back();
  return text;
}

Cta::Cta(Cluster& its_cluster, i32 its_rank)
    : cluster(its_cluster), rank(its_rank), races(its_cluster.races) {}

bool Cta::start(const Launch& request, i32 block) {
  launch = &request;
  block_idx = block;
  if (!stacks_.reserve(request.num_threads)) {
    return false;
  }
  reset();
  return true;
}

void Cta::reset() {
  const i32 num_warps = launch->num_threads / 32;
  if (static_cast<i32>(warps_.size()) != num_warps) {
    warps_ = std::vector<Warp>(num_warps);
  }
  for (i32 w = 0; w < num_warps; ++w) {
    Warp& warp = warps_[w];
    warp.cta = this;
    warp.warp_idx = w;
    warp.actor = rank * num_warps + w;
    warp.runnable = kAllLanes;
    warp.arrived = warp.exited = 0;
    warp.barrier = -1;
    warp.cluster_arrivals = warp.cluster_waits = 0;
    warp.at_cluster_barrier = false;
    for (i32 l = 0; l < 32; ++l) {
      Lane& lane = warp.lanes[l];
      lane.warp = &warp;
      lane.thread_idx = w * 32 + l;
      lane.lane_idx = static_cast<u32>(l);
      lane.open_group = 0;
      lane.copies.clear();
      lane.open_store_group = 0;
      lane.stores.clear();
      lane.watch = Watch{};
      fiber_prepare(lane.fiber, stacks_.begin(lane.thread_idx), stacks_.end(lane.thread_idx),
                    fiber_main);
    }
  }
  smem_.assign(launch->smem_bytes + 16, 0xff);  // NaN in every format
  smem_begin_ =
      reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(smem_.data()) + 15) & ~uintptr_t{15});
  for (Barrier& barrier : barriers_) {
    barrier = Barrier{};
  }
  mbarriers.reset();
  tma.reset();
  wgmma.reset(num_warps);
  hot_range_ = Range{};
  grid_waits_.clear();
  live_warps_ = num_warps;
  random_state_ = launch->seed * 0x9e3779b97f4a7c15ull + static_cast<u64>(block_idx) + 1;
  current = &warps_[0].lanes[0];
}

u64 Cta::random() {  // xorshift64*
  random_state_ ^= random_state_ >> 12;
  random_state_ ^= random_state_ << 25;
  random_state_ ^= random_state_ >> 27;
  return random_state_ * 0x2545f4914f6cdd1dull >> 16;
}

Lane* Cta::pick() {
  const i32 num_warps = static_cast<i32>(warps_.size());
  const bool shuffled = launch->seed != 0;
  const i32 first = shuffled ? static_cast<i32>(random() % num_warps) : current->warp->warp_idx;
  for (i32 i = 0; i < num_warps; ++i) {
    Warp& warp = warps_[(first + i) % num_warps];
    if (warp.runnable != 0) {
      const i32 start = shuffled ? static_cast<i32>(random() % 32) : 0;
      return &warp.lanes[(std::countr_zero(std::rotr(warp.runnable, start)) + start) % 32];
    }
  }
  return nullptr;
}

void Cta::switch_to(Fiber& from, Lane* next) {
  Cta* other = next->warp->cta;
  other->current = next;
  if (other != this) {
    set_this_cta(other);
  }
  fiber_switch(from, next->fiber);
}

// Gives way to another lane. Comes back once another lane has made this one runnable and its turn
// is there.
void Cta::run_next() {
  Lane* self = current;
  if (tma.loads_in_flight() && may_pretend()) {
    tma.land_one(*this);
  }
  Lane* next = cluster.pick(*this);
  while (next == nullptr) {
    if (!cluster.wake_watchers() && !cluster.land_one(*this)) {
      if (!cluster.watches()) {
        stop("deadlock: no thread can run\n" + cluster.waiting_list());
      }
      cluster.park(self->fiber);
    }
    next = cluster.pick(*this);
  }
  if (next != self) {
    switch_to(self->fiber, next);
  }
}

void Cta::sleep() {
  current->warp->runnable &= ~(1u << current->lane_idx);
  run_next();
}

void Cta::sleep_until_global_change(const Site& site) {
  Lane* self = current;
  if (self->watch.address == nullptr) {
    fail(
        "nanosleep() without an acquiring load of global memory before it: in the simulator it "
        "sleeps until that changes",
        site);
  }
  if (self->watch.value != self->watch.present_value()) {
    return;
  }
  if (may_pretend()) {
    give_way();
    return;
  }
  self->watch.sleeps = true;
  self->watch.site = site;
  cluster.watch(*self);
  sleep();
}

bool Cta::may_pretend() { return launch->seed != 0 && random() % 4 == 0; }

void Cta::warp_op(WarpOp op, void* args, const Site& site) {
  Lane* self = current;
  Warp& warp = *self->warp;
  const u32 bit = 1u << self->lane_idx;
  if (warp.exited != 0) {
    fail(std::string(name_of(op)) + " needs all lanes of the warp, but " + lane_list(warp.exited) +
             " already returned from the kernel",
         site);
  }
  if (warp.arrived == 0) {
    warp.op = op;
    warp.site = site;
  } else if (warp.op != op || warp.site.line() != site.line() ||
             warp.site.column() != site.column() ||
             (warp.site.file_name() != site.file_name() &&
              strcmp(warp.site.file_name(), site.file_name()) != 0)) {
    fail("lanes of a warp arrived at different operations: this one at " +
             std::string(name_of(op)) + ", " + lane_list(warp.arrived) + " at " + name_of(warp.op) +
             " (" + describe(warp.site) + ")",
         site);
  }
  self->args = args;
  warp.arrived |= bit;
  warp.runnable &= ~bit;
  if (warp.arrived == kAllLanes) {
    complete_warp_op(warp);
    if ((warp.runnable & bit) != 0 && launch->seed == 0) {
      return;  // go on at once: saves a switch
    }
  }
  run_next();
}

void Cta::complete_warp_op(Warp& warp) {
  if (is_barrier(warp.op)) {
    arrive_at_barrier(warp);
    return;
  }
  if (is_wgmma(warp.op)) {
    const bool goes_on = wgmma.step(*this, warp);
    warp.arrived = 0;
    warp.runnable = goes_on ? kAllLanes : 0;
    return;
  }
  if (warp.op == WarpOp::kClusterWait && !cluster.wait(*this, warp)) {
    warp.arrived = 0;
    return;
  }
  if (warp.op == WarpOp::kClusterArrive) {
    cluster.arrive(*this, warp);
  } else if (warp.op == WarpOp::kWarpSync) {
    if (races.enabled()) {
      races.warp_synced(warp.actor);
    }
  } else {
    compute_warp_op(*this, warp);
  }
  warp.arrived = 0;
  warp.runnable = kAllLanes;
}

void Cta::arrive_at_barrier(Warp& warp) {
  const LaneArgs& args = *static_cast<LaneArgs*>(warp.lanes[0].args);
  for (const Lane& lane : warp.lanes) {
    const LaneArgs& other = *static_cast<LaneArgs*>(lane.args);
    if (other.value != args.value || other.operand != args.operand) {
      fail("lanes of a warp name different barriers or numbers of threads", warp.site);
    }
  }
  const i32 id = static_cast<i32>(args.value);
  const i32 threads = args.operand;
  const bool is_cta_sync = warp.op == WarpOp::kCtaSync;
  if (!is_cta_sync) {
    if (id < 1 || id >= kNumBarriers) {
      fail("barrier id " + std::to_string(id) + " is not in 1..15", warp.site);
    }
    if (threads <= 0 || threads % 32 != 0 || threads > launch->num_threads) {
      fail("barrier " + std::to_string(id) + " for " + std::to_string(threads) +
               " threads, in a CTA of " + std::to_string(launch->num_threads) +
               "; it must be a multiple of 32",
           warp.site);
    }
  }
  Barrier& barrier = barriers_[id];
  const u32 bit = 1u << warp.warp_idx;
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.site = warp.site;
  } else if (barrier.threads != threads) {
    fail("barrier " + std::to_string(id) + " for " + std::to_string(threads) +
             " threads, but the first warp (" + describe(barrier.site) + ") said " +
             std::to_string(barrier.threads),
         warp.site);
  }
  if ((barrier.arrived & bit) != 0) {
    fail("this warp arrives at barrier " + std::to_string(id) + " twice before it is complete",
         warp.site);
  }
  if (races.enabled()) {
    races.barrier_arrived(rank * kNumBarriers + id, warp.actor);
  }
  barrier.arrived |= bit;
  warp.arrived = 0;
  if (warp.op == WarpOp::kNamedBarrierArrive) {
    warp.runnable = kAllLanes;
  } else {
    barrier.waiting |= bit;
    warp.barrier = id;
  }
  release_barrier_if_complete(id);
}

void Cta::release_barrier_if_complete(i32 id) {
  Barrier& barrier = barriers_[id];
  const i32 expected = id == 0 ? live_warps_ : barrier.threads / 32;
  if (barrier.arrived == 0 || std::popcount(barrier.arrived) < expected) {
    return;
  }
  if (races.enabled()) {
    races.barrier_released(rank * kNumBarriers + id, warps_[0].actor, barrier.waiting);
  }
  for (Warp& warp : warps_) {
    if ((barrier.waiting >> warp.warp_idx & 1u) != 0) {
      warp.barrier = -1;
      warp.runnable = kAllLanes;
    }
  }
  barrier = Barrier{};
}

void Cta::exit_lane() {
  Lane* self = current;
  Warp& warp = *self->warp;
  const u32 bit = 1u << self->lane_idx;
  warp.runnable &= ~bit;
  warp.exited |= bit;
  if (warp.arrived != 0) {
    fail("this thread returns from the kernel while " + lane_list(warp.arrived) +
             " of its warp wait in " + name_of(warp.op),
         warp.site);
  }
  tma.thread_returns(*this, *self);
  if (warp.exited == kAllLanes) {
    wgmma.warp_returns(*this, warp);
    --live_warps_;
    if (live_warps_ == 0) {
      tma.last_thread_returns(*this);
      cluster.last_thread_returns(*this);
      if (cluster.all_returned()) {
        cluster.leave(self->fiber);
      }
    }
    release_barrier_if_complete(0);  // warps that are gone don't count
    cluster.release_barrier_if_complete();
  }
  run_next();
  __builtin_unreachable();
}

std::string Cta::waiting_list() const {
  std::string text;
  for (const Warp& warp : warps_) {
    text += "  warp " + std::to_string(warp.warp_idx) + ": ";
    if (warp.exited == kAllLanes) {
      text += "returned from the kernel";
    } else if (warp.barrier >= 0) {
      const Barrier& barrier = barriers_[warp.barrier];
      const i32 expected = warp.barrier == 0 ? live_warps_ : barrier.threads / 32;
      text += std::string("waits in ") + name_of(warp.op) + " at barrier " +
              std::to_string(warp.barrier) + " (" + std::to_string(std::popcount(barrier.arrived)) +
              " of " + std::to_string(expected) + " warps have arrived), " + describe(warp.site);
    } else if (warp.at_cluster_barrier) {
      text += "waits at the cluster's barrier, " + describe(warp.site);
    } else if (wgmma.waits(warp)) {
      text += std::string("waits in ") + name_of(warp.op) +
              " for the other warps of its warpgroup, " + describe(warp.site);
    } else {
      std::string waits = mbarriers.waits_of(warp);
      const std::string global = global_waits_of(warp);
      waits += (waits.empty() || global.empty() ? "" : "; ") + global;
      if (warp.arrived != 0) {
        text += lane_list(warp.arrived) + " wait in " + name_of(warp.op) + ", " +
                describe(warp.site) + (waits.empty() ? "" : "; ");
      }
      text += waits;
      if (warp.arrived == 0 && waits.empty()) {
        text += "can run";
      }
    }
    text += "\n";
  }
  return text;
}

void Cta::fail(const std::string& what, const Site& site) {
  const Lane& lane = *current;
  const std::string function = site.function_name();
  stop(what + "\n  at " + describe(site) + " in " + function.substr(0, function.find(" [with ")) +
       "\n  thread " + std::to_string(lane.thread_idx) + " (warp " +
       std::to_string(lane.warp->warp_idx) + ", lane " + std::to_string(lane.lane_idx) + ")\n");
}

void Cta::stop(std::string text) {
  std::string error =
      std::string(launch->kernel_name) + ", CTA " + std::to_string(block_idx) + ": " + text;
  std::string().swap(text);  // this stack is never unwound
  cluster.leave_with_error(current->fiber, std::move(error));
  __builtin_unreachable();
}

i32 thread_idx() { return this_cta().current->thread_idx; }

i32 block_idx() { return this_cta().block_idx; }

i32 grid_dim() { return this_cta().launch->grid; }

void nanosleep(Site site) { this_cta().sleep_until_global_change(site); }

void warp_op(WarpOp op, void* args, Site site) { this_cta().warp_op(op, args, site); }

}  // namespace flash_sim
