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
  // Runs the CTAs first_block.. of one cluster to their ends. False: error() says what went wrong.
  bool run(const Launch& launch, i32 first_block);
  const std::string& error() const { return error_; }
  bool waited_for_earlier_launches() const;

  i32 size() const { return size_; }
  Cta& cta(i32 rank) { return *ctas_[rank]; }
  // The lane to run after one of this CTA has gone to sleep. Null: none can run.
  Lane* pick(Cta& running);
  // Lets one load or copy land, if one is in flight, preferably one of this CTA.
  bool land_one(Cta& running);
  std::string waiting_list() const;
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
  Fiber scheduler_;
  std::string error_;
  u32 barrier_phase_ = 0;  // phases completed
  Races::Clock arrived_, completed_;
  std::vector<std::vector<Accesses>> accesses_;  // [CTA][actor]
};

}  // namespace flash_sim
