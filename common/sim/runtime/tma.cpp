// TMA: boxes and runs of bytes between global and shared memory, as late as the program's waits
// allow. See async.h.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cluster.h"

namespace flash_sim {

namespace {

constexpr u32 kMagic = 0x70616d54;  // of sim/tensor_map.py
constexpr u32 kBoxAlignment = 128;
constexpr u32 kRunAlignment = 16;

// TMA moves the bits of a shared address that number the 128-byte line into those that number the
// 16-byte unit.
u32 swizzled(u32 address, u32 swizzle_bytes) {
  return swizzle_bytes == 0 ? address : address ^ (address >> 3 & (swizzle_bytes - 16));
}

Transfer make_transfer(Cta& cta, const void* encoded, u32 address, const i32* coords, i32 rank,
                       const char* what, const Site& site) {
  Tma::check_map(cta, encoded, site);
  Transfer transfer;
  memcpy(&transfer.map, encoded, sizeof transfer.map);
  const EncodedTensorMap& map = transfer.map;
  if (map.rank != rank) {
    cta.fail(std::string(what) + " of " + std::to_string(rank) + " dims with a tensor map of " +
                 std::to_string(map.rank),
             site);
  }
  std::copy_n(coords, rank, transfer.coords.begin());
  if (coords[0] * map.element_bytes % 16 != 0) {  // an illegal instruction on an H100
    cta.fail(std::string(what) + " at column " + std::to_string(coords[0]) +
                 ": a box begins at a multiple of 16 bytes",
             site);
  }
  transfer.bytes = map.element_bytes;
  for (const u16 extent : map.box) {
    transfer.bytes *= extent;
  }
  transfer.offset = address - kSmemBase;
  transfer.lane = cta.current;
  transfer.site = site;
  cta.shared_range(address, transfer.bytes, kBoxAlignment, what, site);
  return transfer;
}

void check_run(Cta& cta, u32 bytes, const char* what, const Site& site) {
  if (bytes == 0 || bytes % kRunAlignment != 0) {
    cta.fail(std::string(what) + " of " + std::to_string(bytes) +
                 " bytes: a bulk copy moves whole units of 16, at least one",
             site);
  }
}

Transfer make_run(Cta& cta, const void* global, u32 address, u32 bytes, Cta::Use use,
                  const char* what, const Site& site) {
  check_run(cta, bytes, what, site);
  if (reinterpret_cast<uintptr_t>(global) % kRunAlignment != 0) {
    cta.fail(std::string(what) + " misaligned in global memory: a bulk copy begins at a multiple " +
                 "of 16 bytes",
             site);
  }
  cta.shared_range(address, bytes, kRunAlignment, what, site);
  Transfer transfer;
  transfer.run = cta.global(global, bytes, use, what, site);
  transfer.offset = address - kSmemBase;
  transfer.bytes = bytes;
  transfer.lane = cta.current;
  transfer.site = site;
  return transfer;
}

u8* place_of(Cta& cta, const Transfer& transfer) {
  return cta.shared_range(kSmemBase + transfer.offset, transfer.bytes, kRunAlignment, "",
                          transfer.site);
}

// Calls visit(offset in shared memory, global address or 0, bytes) for each piece of the transfer:
// the run, or of the box a 16-byte unit, or the part of one inside the tensor and the parts
// outside, whose address is 0.
template <class Visit>
void for_each_piece(const Transfer& transfer, Visit visit) {
  if (transfer.run != nullptr) {
    visit(transfer.offset, reinterpret_cast<u64>(transfer.run), transfer.bytes);
    return;
  }
  const EncodedTensorMap& map = transfer.map;
  const u32 row_bytes = map.box[0] * map.element_bytes;
  const u32 num_rows = transfer.bytes / row_bytes;
  const i64 tensor_row_bytes = i64{map.dims[0]} * map.element_bytes;
  for (u32 row = 0; row < num_rows; ++row) {
    u64 global_row = map.address;
    bool row_exists = true;
    u32 rest = row;
    for (i32 dim = 1; dim < map.rank; ++dim) {
      const i64 at = i64{transfer.coords[dim]} + rest % map.box[dim];
      rest /= map.box[dim];
      row_exists &= at >= 0 && at < map.dims[dim];
      global_row += static_cast<u64>(at) * map.strides[dim - 1];
    }
    for (u32 byte = 0; byte < row_bytes; byte += 16) {
      const u32 address = kSmemBase + transfer.offset + row * row_bytes + byte;
      const u32 unit = swizzled(address, map.swizzle_bytes) - kSmemBase;
      const i64 at = i64{transfer.coords[0]} * map.element_bytes + byte;
      const i64 begin = std::clamp<i64>(-at, 0, 16);
      const i64 end = row_exists ? std::clamp<i64>(tensor_row_bytes - at, begin, 16) : begin;
      const auto part = [&](i64 from, i64 to, u64 global) {
        if (from < to) {
          visit(unit + static_cast<u32>(from), global, static_cast<u32>(to - from));
        }
      };
      part(0, begin, 0);
      part(begin, end, global_row + static_cast<u64>(at + begin));
      part(end, 16, 0);
    }
  }
}

// What an H100 does not store as it loads: see tests/sim/test_sim_wrappers_hopper.py.
void check_storable(Cta& cta, const Transfer& transfer, const Site& site) {
  const EncodedTensorMap& map = transfer.map;
  for (i32 dim = 0; dim < map.rank; ++dim) {
    if (transfer.coords[dim] < 0) {  // an illegal instruction
      cta.fail("TMA store at " + std::to_string(transfer.coords[dim]) + " in dim " +
                   std::to_string(dim) + ": only boxes to load may begin before the tensor",
               site);
    }
  }
  const u32 row_bytes = map.dims[0] * map.element_bytes;
  if (row_bytes % 16 != 0) {  // the bytes behind the row would be overwritten
    cta.fail(
        "TMA store to rows of " + std::to_string(row_bytes) + " bytes: it writes whole units of 16",
        site);
  }
}

void check_global(Cta& cta, const Transfer& transfer, Cta::Use use, const char* what) {
  for_each_piece(transfer, [&](u32, u64 global, u32 bytes) {
    if (global != 0) {
      cta.global(reinterpret_cast<const void*>(global), bytes, use, what, transfer.site);
    }
  });
}

void add_floats(f32* to, const u8* from, u32 bytes) {
  for (u32 i = 0; i < bytes / sizeof(f32); ++i) {
    f32 value;
    memcpy(&value, from + i * sizeof value, sizeof value);
    std::atomic_ref<f32>(to[i]).fetch_add(value, std::memory_order_relaxed);
  }
}

}  // namespace

void Tma::check_map(Cta& cta, const void* map, const Site& site) {
  EncodedTensorMap decoded;
  memcpy(&decoded, map, sizeof decoded);
  if (decoded.magic != kMagic || decoded.address == 0) {
    cta.fail("the tensor map was not encoded for the simulator, or has no address", site);
  }
}

void Tma::load(Cta& cta, u32 dst, const void* map, u32 bar, const i32* coords, i32 rank,
               const Site& site) {
  Mbarrier& barrier = cta.mbarriers.find_for_async(cta, bar, "TMA load", site);
  const Transfer transfer = make_transfer(cta, map, dst, coords, rank, "write by a TMA load", site);
  check_global(cta, transfer, Cta::Use::kRead, "read by a TMA load");
  issue_load(cta, transfer, barrier);
}

void Tma::load_run(Cta& cta, u32 dst, const void* src, u32 bytes, u32 bar, const Site& site) {
  Mbarrier& barrier = cta.mbarriers.find_for_async(cta, bar, "bulk_load", site);
  issue_load(cta, make_run(cta, src, dst, bytes, Cta::Use::kRead, "bulk_load", site), barrier);
}

void Tma::issue_load(Cta& cta, const Transfer& transfer, Mbarrier& barrier) {
  cta.check_race(transfer.offset, transfer.bytes, Access::kTmaLoadIssued, transfer.site);
  memset(place_of(cta, transfer), 0xff, transfer.bytes);
  loads_.push_back({transfer, &barrier, &cta});
}

void Tma::copy_to_peer(Cta& cta, u32 cluster_dst, u32 src, u32 bytes, u32 cluster_bar,
                       const Site& site) {
  constexpr const char* kWhat = "bulk_copy_to_cluster";
  if (cta.cluster.size() == 1) {
    cta.fail("bulk_copy_to_cluster in a kernel without clusters is not simulated", site);
  }
  const Cluster::Peer peer = cta.cluster.find_peer(cta, cluster_dst, kWhat, site);
  const Cluster::Peer owner = cta.cluster.find_peer(cta, cluster_bar, kWhat, site);
  if (peer.cta != owner.cta) {
    cta.fail("bulk_copy_to_cluster signals an mbarrier of another CTA than it copies to", site);
  }
  Mbarrier& barrier = owner.cta->mbarriers.find_for_async(cta, owner.address, kWhat, site);
  check_run(cta, bytes, kWhat, site);
  Transfer transfer;
  transfer.run = reinterpret_cast<char*>(cta.shared_range(src, bytes, kRunAlignment, kWhat, site));
  cta.shared_range(peer.address, bytes, kRunAlignment, kWhat, site);
  transfer.offset = peer.address - kSmemBase;
  transfer.bytes = bytes;
  transfer.lane = cta.current;
  transfer.site = site;
  const u32 source_offset = src - kSmemBase;
  cta.check_race_in(cta, source_offset, bytes, Access::kPeerCopyIssued, site);
  cta.check_race_in(*peer.cta, transfer.offset, bytes, Access::kTmaLoadIssued, site);
  memset(peer.cta->smem_at(transfer.offset), 0xff, bytes);
  loads_.push_back({transfer, &barrier, peer.cta, true, source_offset});
}

const Site* Tma::copy_in_flight_to(const Cta& owner) const {
  const auto found = std::find_if(loads_.begin(), loads_.end(),
                                  [&](const PendingLoad& load) { return load.owner == &owner; });
  return found == loads_.end() ? nullptr : &found->transfer.site;
}

bool Tma::land_one(Cta& cta) {
  if (loads_.empty()) {
    return false;
  }
  const size_t chosen = cta.launch->seed != 0 ? cta.random() % loads_.size() : 0;
  const PendingLoad load = loads_[chosen];
  loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(chosen));
  const Transfer& transfer = load.transfer;
  u8* place = load.owner->smem_at(transfer.offset);
  for_each_piece(transfer, [&](u32 offset, u64 global, u32 bytes) {
    u8* to = place + (offset - transfer.offset);
    if (global != 0) {
      memcpy(to, reinterpret_cast<const void*>(global), bytes);
    } else {
      memset(to, 0, bytes);
    }
  });
  if (cta.races.enabled()) {
    const Mbarrier& barrier = *load.barrier;
    cta.races.tma_landed(load.owner->rank, transfer.offset, transfer.bytes, barrier.idx,
                         barrier.phase, transfer.site);
    if (load.is_copy) {
      cta.races.peer_copy_read(cta.rank, load.source_offset, transfer.bytes, barrier.idx,
                               barrier.phase, transfer.site);
    }
    if (load.owner != &cta) {
      const i32 actor = cta.races.actor_of_mbarrier(barrier.idx);
      const u32 epoch = cta.races.epoch_of_phase(barrier.phase);
      cta.cluster.note_access(*load.owner, actor, epoch, transfer.site);
      cta.cluster.note_access(cta, actor, epoch, transfer.site);
    }
  }
  Mbarriers::bytes_arrived(cta.races, *load.barrier, transfer.bytes);
  return true;
}

void Tma::store(Cta& cta, const void* map, u32 src, const i32* coords, i32 rank, const Site& site) {
  const Transfer transfer = make_transfer(cta, map, src, coords, rank, "read by a TMA store", site);
  check_storable(cta, transfer, site);
  check_global(cta, transfer, Cta::Use::kWrite, "write by a TMA store");
  issue_store(cta, transfer, false);
}

void Tma::add_run(Cta& cta, f32* dst, u32 src, u32 bytes, const Site& site) {
  issue_store(cta, make_run(cta, dst, src, bytes, Cta::Use::kWrite, "bulk_reduce_add_f32", site),
              true);
}

void Tma::issue_store(Cta& cta, const Transfer& transfer, bool adds) {
  cta.check_race(transfer.offset, transfer.bytes, Access::kTmaStoreIssued, transfer.site);
  cta.current->stores.push_back({transfer, cta.current->open_store_group, adds, false, {}});
}

void Tma::wait_stores(Cta& cta, i32 pending, bool read_only) {
  Lane& lane = *cta.current;
  const auto is_due = [&](const PendingStore& store) {
    return store.group + static_cast<u32>(pending) < lane.open_store_group;
  };
  for (PendingStore& store : lane.stores) {
    if (!is_due(store) || store.source_read) {
      continue;
    }
    const Transfer& transfer = store.transfer;
    const u8* from = place_of(cta, transfer);
    store.data.assign(from, from + transfer.bytes);
    store.source_read = true;
    cta.check_race(transfer.offset, transfer.bytes, Access::kTmaStoreDone, transfer.site);
  }
  while (!read_only && !lane.stores.empty() && is_due(lane.stores.front())) {
    const PendingStore& store = lane.stores.front();
    for_each_piece(store.transfer, [&](u32 offset, u64 global, u32 bytes) {
      const u8* from = &store.data[offset - store.transfer.offset];
      if (store.adds) {
        add_floats(reinterpret_cast<f32*>(global), from, bytes);
      } else if (global != 0) {
        memcpy(reinterpret_cast<void*>(global), from, bytes);
      }
    });
    lane.stores.pop_front();
  }
}

void Tma::thread_returns(Cta& cta, Lane& lane) {
  for (const PendingStore& store : lane.stores) {
    if (!store.source_read) {
      cta.fail(
          "this thread returns from the kernel without waiting for its TMA store, which still "
          "reads shared memory",
          store.transfer.site);
    }
  }
  wait_stores(cta, 0, false);
}

void Tma::last_thread_returns(Cta& cta) {
  if (!loads_.empty()) {
    cta.fail("the last thread returns from the kernel while this TMA load is in flight",
             loads_.front().transfer.site);
  }
}

void prefetch_tensor_map(const void* map, Site site) { Tma::check_map(this_cta(), map, site); }

void tma_load(u32 dst, const void* map, u32 bar, const i32* coords, i32 rank, Site site) {
  this_cta().tma.load(this_cta(), dst, map, bar, coords, rank, site);
}

void tma_store(const void* map, u32 src, const i32* coords, i32 rank, Site site) {
  this_cta().tma.store(this_cta(), map, src, coords, rank, site);
}

void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, Site site) {
  this_cta().tma.load_run(this_cta(), dst, src, bytes, bar, site);
}

void bulk_reduce_add_f32(f32* dst, u32 src, u32 bytes, Site site) {
  this_cta().tma.add_run(this_cta(), dst, src, bytes, site);
}

void bulk_copy_to_cluster(u32 dst, u32 src, u32 bytes, u32 bar, Site site) {
  this_cta().tma.copy_to_peer(this_cta(), dst, src, bytes, bar, site);
}

void tma_store_commit_group() { ++this_cta().current->open_store_group; }

void tma_store_wait_group_read(i32 pending) {
  this_cta().tma.wait_stores(this_cta(), pending, true);
}

void tma_store_wait_group(i32 pending) { this_cta().tma.wait_stores(this_cta(), pending, false); }

void fence_proxy_async_shared() {
  Cta& cta = this_cta();
  if (cta.races.enabled()) {
    cta.races.fence_proxy_async(cta.current->warp->actor, cta.current->lane_idx);
  }
}

}  // namespace flash_sim
