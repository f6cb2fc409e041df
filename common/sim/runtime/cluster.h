// The CTAs of a cluster, which run as one machine: their fibers take turns on one OS thread, and
// one race detector knows all their warps. A kernel without clusters has clusters of one CTA.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace flash_sim {

class Cluster {
 public:
  enum class State { kReturned, kFailed, kParked };
  // Runs the CTAs first_block.. of one cluster until all their threads have returned, or one
  // failed: error() says how; or until none can run, and some wait for other CTAs to change global
  // memory.
  State run(const Launch& launch, i32 first_block);
  // Goes on with a parked one, on any OS thread. can_resume: whether that memory has changed.
  State resume();
  bool can_resume() const;
  i32 first_block() const { return ctas_[0]->block_idx; }
  const std::string& error() const { return error_; }
  bool waited_for_earlier_launches() const;

  i32 size() const { return size_; }
  Cta& cta(i32 rank) { return *ctas_[rank]; }
  // The lane to run after one of this CTA has gone to sleep. Null: none can run.
  Lane* pick(Cta& running) { return size_ == 1 ? running.pick() : pick_of_any(running); }
  // Lets one load or copy land, if one is in flight, preferably one of this CTA.
  bool land_one(Cta& running);
  std::string waiting_list() const;
  // Threads that sleep until global memory changes.
  void watch(Lane& lane) { watchers_.push_back(&lane); }
  bool watches() const { return !watchers_.empty(); }
  bool wake_watchers();    // true: one can run now
  void park(Fiber& from);  // comes back when resumed
  // Ends the cluster, from the fiber `from`; its fibers are abandoned as they stand.
  void leave(Fiber& from) { fiber_switch(from, scheduler_); }
  void leave_with_error(Fiber& from, std::string&& error);

  // The barrier of the cluster. wait: false if the warp has to sleep.
  void arrive(Cta& cta, Warp& warp);
  bool wait(Cta& cta, Warp& warp);
  void release_barrier_if_complete();

  // What a CTA does with another one's memory; the other one may not return before it knows.
  struct Peer {
    Cta* cta;
    u32 address;  // there
  };
  Peer find_peer(Cta& cta, u32 cluster_address, const char* what, const Site& site);
  void note_access(const Cta& owner, i32 actor, u32 epoch, const Site& site);
  void last_thread_returns(Cta& cta);
  bool all_returned() const;

  Races races;
  i32 num_mbarriers = 0;

 private:
  struct Accesses {  // to one CTA, by one warp or by the copies of one mbarrier
    u32 last_epoch = 0;
    Site site;
  };
  std::vector<std::unique_ptr<Cta>> ctas_;  // at least size_
  i32 size_ = 0;
  Lane* pick_of_any(Cta& running);
  State enter(Cta& cta, Fiber& fiber);

  Fiber scheduler_;
  Fiber* parked_ = nullptr;
  Cta* parked_cta_ = nullptr;
  std::vector<Lane*> watchers_;
  std::string error_;
  u32 barrier_phase_ = 0;  // phases completed
  Races::Clock arrived_, completed_;
  std::vector<std::vector<Accesses>> accesses_;  // [CTA][actor]
};

}  // namespace flash_sim
