// What sm_90 adds to a CTA: barriers and transfers that outlive the instruction that starts them.
// Members of Cta, defined in mbarrier.cpp, tma.cpp and wgmma.cpp.
#pragma once
#include <array>
#include <deque>
#include <list>
#include <string>
#include <vector>

#include "calls.h"
#include "calls_hopper.h"
#include "races.h"

namespace flash_sim {

class Cta;
struct Lane;
struct Warp;

struct Mbarrier {
  struct Waiter {
    Lane* lane;
    u32 phase;  // that it waits for
    bool woken;
    Site site;
  };
  i32 idx = 0;
  u32 offset = 0;  // in shared memory
  u32 count = 0;
  u32 missing_arrivals = 0;
  i64 missing_bytes = 0;  // negative: more have come than were announced so far
  u32 phase = 0;          // phases completed
  Lane* init_lane = nullptr;
  u32 init_epoch = 0;
  bool visible_to_tma = false;
  Races::Clock arrived, completed;  // by arrivals so far; up to the last completed phase
  // Likewise by arrivals of other CTAs, which only waits in the scope of the cluster learn of.
  Races::Clock arrived_from_peers, completed_from_peers;
  std::vector<Waiter> waiters;
};

class Mbarriers {
 public:
  void reset() { barriers_.clear(); }
  void init(Cta& cta, u32 bar, u32 count, const Site& site);
  void fence_init(Cta& cta);
  void arrive(Cta& cta, u32 bar, u32 expected_bytes, const Site& site);
  // At a barrier of a CTA of the cluster.
  static void arrive_at_peer(Cta& cta, u32 cluster_bar, const Site& site);
  bool try_wait(Cta& cta, u32 bar, u32 parity, bool in_cluster, const Site& site);
  // cta: whose thread asks.
  Mbarrier& find(Cta& cta, u32 bar, const char* what, const Site& site);
  Mbarrier& find_for_async(Cta& cta, u32 bar, const char* what, const Site& site);
  static void bytes_arrived(Races& races, Mbarrier& barrier, u32 bytes);
  // What lanes of this warp wait for, one line each. Empty: none does.
  std::string waits_of(const Warp& warp) const;

 private:
  static void complete_phase_if_due(Races& races, Mbarrier& barrier);
  std::list<Mbarrier> barriers_;
};

// The 128 bytes of a map; encoded by sim/tensor_map.py.
struct EncodedTensorMap {
  u64 address;
  u32 magic;
  u16 swizzle_bytes;
  u8 rank, element_bytes;
  u64 strides[4];  // bytes, of dims 1 and up
  u32 dims[5];
  u16 box[5];
};

struct Transfer {  // of a box, or without a map of a run of bytes
  EncodedTensorMap map{};
  std::array<i32, 5> coords{};
  char* run = nullptr;        // in global memory; null: a box
  u32 offset = 0, bytes = 0;  // in shared memory
  Lane* lane = nullptr;       // that issued it
  Site site;
};

struct PendingStore {
  Transfer transfer;
  u32 group = 0;
  bool adds = false;  // floats, instead of storing
  bool source_read = false;
  std::vector<u8> data;
};

class Tma {
 public:
  void reset() { loads_.clear(); }
  void load(Cta& cta, u32 dst, const void* map, u32 bar, const i32* coords, i32 rank,
            const Site& site);
  void store(Cta& cta, const void* map, u32 src, const i32* coords, i32 rank, const Site& site);
  void load_run(Cta& cta, u32 dst, const void* src, u32 bytes, u32 bar, const Site& site);
  void add_run(Cta& cta, f32* dst, u32 src, u32 bytes, const Site& site);
  void copy_to_peer(Cta& cta, u32 cluster_dst, u32 src, u32 bytes, u32 cluster_bar,
                    const Site& site);
  // Where one was issued. Null: none is.
  const Site* copy_in_flight_to(const Cta& owner) const;
  void wait_stores(Cta& cta, i32 pending, bool read_only);
  bool loads_in_flight() const { return !loads_.empty(); }
  // Lets one load land, if one is in flight.
  bool land_one(Cta& cta);
  // A store left over when its thread returns; a load left over when the last one does.
  void thread_returns(Cta& cta, Lane& lane);
  void last_thread_returns(Cta& cta);
  static void check_map(Cta& cta, const void* map, const Site& site);

 private:
  struct PendingLoad {
    Transfer transfer;
    Mbarrier* barrier;
    Cta* owner;             // of the shared memory to which it goes, and of the barrier
    bool is_copy = false;   // from shared memory of the CTA that issued it
    u32 source_offset = 0;  // there
  };
  void issue_load(Cta& cta, const Transfer& transfer, Mbarrier& barrier);
  void issue_store(Cta& cta, const Transfer& transfer, bool adds);
  std::deque<PendingLoad> loads_;
};

// The products of the CTA's warpgroups. The four warps of a warpgroup must execute the same
// operations; each does so in its own time, except that waits bring them together.
class Wgmma {
 public:
  void reset(i32 num_warps);
  // One operation, all lanes of the warp being there. False: the warp sleeps until the others of
  // its warpgroup have come, and is made runnable then.
  bool step(Cta& cta, Warp& warp);
  void hold(Cta& cta, const f32* d, i32 count, const Site& site);
  void warp_returns(Cta& cta, Warp& warp);
  bool waits(const Warp& warp) const;

 private:
  struct Accumulator {
    i32 n = 0;
    i32 products = 0;         // in flight
    f32* d[128] = {};         // of each thread; null until its warp has issued
    std::vector<f32> values;  // [64][n]
  };
  struct Product {
    WgmmaArgs args{};
    u32 group = 0;
    Site site;
    std::array<std::array<u32, 4>, 128> a{};  // fragments of each thread
    Accumulator* accumulator = nullptr;
  };
  struct Operation {
    WarpOp op{};
    u32 pending = 0;  // of a wait
    Site site;
    Product* product = nullptr;
  };
  struct Group {  // a warpgroup
    std::deque<Operation> operations;
    u64 num_forgotten = 0;  // operations that all four have executed
    u64 executed[4] = {};
    u32 open_group[4] = {};
    bool fenced[4] = {};  // since the last wait
    u32 waiting = 0;      // bit per warp
    std::list<Product> products;
    std::list<Accumulator> accumulators;
  };

  void issue(Cta& cta, Group& group, Warp& warp, Operation& operation, bool first);
  void retire(Cta& cta, Group& group, i32 first_warp, u32 pending);
  void compute(Cta& cta, const Product& product);
  void write_back(Cta& cta, i32 first_warp, const Accumulator& accumulator, const Site& site);
  void note(Cta& cta, Warp& warp, const Product& product, Access access);
  std::vector<Group> groups_;
};

}  // namespace flash_sim
