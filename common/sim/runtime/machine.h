// One CTA and what runs it. Internal to the runtime: kernels see calls.h only.
//   machine.cpp   fibers, who runs next, rendezvous of a warp, barriers, deadlocks
//   warp_ops.cpp  what the operations of a whole warp compute
//   memory.cpp    checked accesses to global and shared memory, asynchronous copies
//   races.h       the race detector on shared memory
//   additions.h   the checker of the order of additions to global memory
//   async.h       mbarriers, TMA and wgmma: mbarrier.cpp, tma.cpp, wgmma.cpp
//   cluster.h     the CTAs of a cluster, which take turns
//   launch.cpp    clusters over OS threads, the C interface to launcher.py
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "async.h"
#include "calls.h"
#include "fiber.h"
#include "races.h"

namespace flash_sim {

constexpr i32 kMaxWarps = 32;
constexpr i32 kNumBarriers = 16;
constexpr u32 kAllLanes = 0xffffffffu;

struct Range {  // of legal global addresses
  uintptr_t begin, end;
};

// Memory of a launch that may still run when a programmatic one begins.
struct Earlier {
  uintptr_t begin, end;
  u64 written;  // by that launch; else it may be reading
};

class Additions;

// What launcher.py passes; mirrored there field by field.
struct Launch {
  void (*run_thread)(const void* params);
  const void* params;
  const char* kernel_name;
  const Range* ranges;
  u8* written;             // of each range: set to 1 where the kernel writes
  const Earlier* earlier;  // of the launches that a programmatic one need not wait for
  u64 seed;                // 0: lanes and warps in order; else they are shuffled at each switch
  i32 num_ranges;
  i32 num_earlier;
  i32 programmatic;
  i32 grid;
  i32 cluster_size;
  i32 num_threads;
  i32 smem_bytes;
  i32 num_workers;
  i32 resident_ctas;  // as many start before the first of them end, at most
  i32 racecheck;
  i32 ordered_adds;
  Additions* additions;  // launch.cpp's; null: not checked
};

struct PendingCopy {
  u32 offset, bytes;  // in shared memory
  u32 group;
  Site site;
  u8 data[16];
};

// What a thread has read last with acquire; it may sleep until that changes.
struct Watch {
  const void* address = nullptr;
  u32 bytes = 0;
  u64 value = 0;
  bool sleeps = false;
  Site site;
  u64 present_value() const;
};

struct Warp;

struct Lane {  // a CUDA thread
  Fiber fiber;
  Warp* warp = nullptr;
  i32 thread_idx = 0;
  u32 lane_idx = 0;
  void* args = nullptr;  // of the warp operation where it sleeps
  u32 open_group = 0;
  std::deque<PendingCopy> copies;
  u32 open_store_group = 0;
  std::deque<PendingStore> stores;
  Watch watch;
};

struct Warp {
  Cta* cta = nullptr;
  i32 warp_idx = 0;
  i32 actor = 0;     // its number in the cluster
  u32 runnable = 0;  // bit per lane, likewise the next two
  u32 arrived = 0;   // sleeping in `op` until the others come
  u32 exited = 0;
  i32 barrier = -1;  // the barrier where the whole warp sleeps
  u32 cluster_arrivals = 0, cluster_waits = 0;
  bool at_cluster_barrier = false;  // the whole warp sleeps there
  WarpOp op{};
  Site site;  // of `op`, from the first lane to arrive
  Lane lanes[32];
};

struct Barrier {
  u32 arrived = 0;  // bit per warp
  u32 waiting = 0;  // those of them that sleep here
  i32 threads = 0;  // expected; set by the first to arrive
  Site site;
};

class Cluster;

class Cta {
 public:
  Cta(Cluster& cluster, i32 rank);
  // Makes all threads runnable, at the kernel's begin. False: no memory for their stacks.
  bool start(const Launch& launch, i32 block_idx);
  // The lane to run: the next of the warp that ran last, else of the next warp that has one. Null:
  // none can run.
  Lane* pick();
  // Goes on with `next`, of any CTA of the cluster.
  void switch_to(Fiber& from, Lane* next);
  bool returned() const { return live_warps_ == 0; }  // all its threads
  std::vector<Warp>& warps() { return warps_; }
  std::string waiting_list() const;

  // Called on fibers, by the functions of calls.h.
  void warp_op(WarpOp op, void* args, const Site& site);
  [[noreturn]] void exit_lane();
  // Ends the cluster with an error of the running thread.
  [[noreturn]] void fail(const std::string& what, const Site& site);
  enum class Use : u8 { kRead, kWrite };
  char* global(const void* address, u32 bytes, Use use, const char* what, const Site& site);
  void wait_for_earlier_launches();
  bool waited_for_earlier_launches() const { return !grid_waits_.empty(); }
  u8* shared(u32 address, u32 bytes, const char* what, const Site& site);
  // As shared(), of a box or an object that is larger than its alignment.
  u8* shared_range(u32 address, u32 bytes, u32 alignment, const char* what, const Site& site);
  u8* smem_at(u32 offset) { return smem_begin_ + offset; }
  void issue_copy(u32 dst, const void* src, u32 bytes, i32 valid_bytes, const Site& site);
  void complete_copies(i32 pending);
  void check_race(u32 offset, u32 bytes, Access access, const Site& site);
  void check_race_ldmatrix(u32 offset, const Site& site);
  void check_race_of_warp(u32 offset, u32 bytes, Access access, const char* what, const Site& site);
  // Of the running thread, in the shared memory of any CTA of the cluster.
  void check_race_in(const Cta& owner, u32 offset, u32 bytes, Access access, const Site& site);
  // For mbarriers and the like, whose lanes sleep and wake alone.
  void sleep();
  void sleep_until_global_change(const Site& site);
  std::string global_waits_of(const Warp& warp) const;
  void give_way() { run_next(); }
  Lane& lane_at(i32 thread_idx) { return warps_[thread_idx / 32].lanes[thread_idx % 32]; }
  void wake(Lane& lane) { lane.warp->runnable |= 1u << lane.lane_idx; }
  bool may_pretend();  // under a shuffling seed, sometimes: to do what the hardware may do too
  u64 random();

  Cluster& cluster;
  const i32 rank;  // in the cluster
  Races& races;    // the cluster's
  const Launch* launch = nullptr;
  i32 block_idx = 0;
  Lane* current = nullptr;
  Mbarriers mbarriers;
  Tma tma;
  Wgmma wgmma;

 private:
  struct GridWait {  // griddepcontrol_wait() by lanes of a warp, at the first one's epoch
    i32 warp;
    u32 lanes, epoch;
  };
  void check_against_earlier_launches(uintptr_t address, u32 bytes, Use use, const char* what,
                                      const Site& site);
  bool ordered_after_grid_wait() const;
  void reset();
  void complete_warp_op(Warp& warp);
  void arrive_at_barrier(Warp& warp);
  void release_barrier_if_complete(i32 id);
  void run_next();
  [[noreturn]] void stop(std::string text);
  void note_race(const Cta& owner, u32 lane_idx, u32 offset, u32 bytes, Access access,
                 const char* what, const Site& site);  // what: null: the access's name

  Stacks stacks_;
  std::vector<Warp> warps_;
  std::vector<u8> smem_;
  u8* smem_begin_ = nullptr;  // 16-byte aligned
  Barrier barriers_[kNumBarriers];
  Range hot_range_{};  // the range of the last global access
  u8* hot_written_ = nullptr;
  std::vector<GridWait> grid_waits_;
  i32 live_warps_ = 0;
  u64 random_state_ = 0;
};

// The CTA whose fiber this OS thread is running.
Cta& this_cta();
void set_this_cta(Cta* cta);

// Runs the operation of a complete warp, except barriers.
void compute_warp_op(Cta& cta, Warp& warp);

const char* name_of(WarpOp op);
bool is_barrier(WarpOp op);
bool is_wgmma(WarpOp op);
std::string describe(const Site& site);
std::string lane_list(u32 mask);

}  // namespace flash_sim
