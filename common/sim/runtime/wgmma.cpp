// Warpgroup products: computed when waited for, from what shared memory holds then. See async.h.
#include <algorithm>
#include <bit>
#include <cstring>

#include "half.h"
#include "machine.h"

namespace flash_sim {

namespace {

constexpr i32 kRows = 64;
constexpr i32 kDepth = 16;
constexpr i32 kUnitElements = 8;     // of 16 bits, in 16 bytes
constexpr u32 kPoison = 0x7fa5a5a5;  // a signalling NaN: arithmetic changes it
constexpr u32 kAllWarps = 0xf;

using Vec = f32 __attribute__((vector_size(16), aligned(16), may_alias));
constexpr i32 kVec = 4;

i32 row_of(i32 thread, i32 i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2); }
i32 col_of(i32 thread, i32 i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// A swizzled matrix in shared memory, by the "canonical layouts" of the PTX manual: lines of
// 16-byte units, 8 elements each. K-major: a line is a row of m or n, its 2 units the 16 of k.
// MN-major: a line is one of k, its units lie along m or n.
struct SharedMatrix {
  u32 address, leading_bytes, stride_bytes, swizzle_bytes;
  bool mn_major;

  SharedMatrix(u64 desc, bool mn_major)
      : address(static_cast<u32>(desc & 0x3fff) << 4),
        leading_bytes(static_cast<u32>(desc >> 16 & 0x3fff) << 4),
        stride_bytes(static_cast<u32>(desc >> 32 & 0x3fff) << 4),
        swizzle_bytes(desc >> 62 == 0 ? 0 : 256u >> (desc >> 62)),
        mn_major(mn_major) {}

  u32 unit(i32 line, i32 unit) const {
    const u32 chunk_units = mn_major ? swizzle_bytes / 16 : 2;
    const u32 u = static_cast<u32>(unit);
    const u32 across = u / chunk_units * leading_bytes + u % chunk_units * 16;
    const u32 down =
        static_cast<u32>(line / 8) * stride_bytes + static_cast<u32>(line % 8) * swizzle_bytes;
    const u32 plain = address + down + across;
    return plain ^ (plain >> 3 & (swizzle_bytes - 16));
  }
};

void check_descriptor(Cta& cta, u64 desc, const SharedMatrix& matrix, const char* name,
                      const Site& site) {
  const auto fail = [&](const std::string& what) {
    cta.fail(std::string("wgmma: descriptor of ") + name + " " + what, site);
  };
  const u32 swizzle = matrix.swizzle_bytes;
  if (swizzle == 0 || (desc >> 49 & 7) != 0) {
    fail("without swizzle, or with a base offset: not simulated");
  }
  const u32 in_atom = matrix.address % (8 * swizzle);
  const u32 last_start = matrix.mn_major ? 0 : swizzle - 2 * kDepth;
  if (in_atom > last_start) {
    fail("begins at byte " + std::to_string(in_atom) + " of an atom of 8 rows of " +
         std::to_string(swizzle) + " bytes, at most " + std::to_string(last_start) +
         " is possible; smem_base() + " + std::to_string(matrix.address - kSmemBase));
  }
}

// Calls visit(line, unit, address) for each 16-byte unit; lines: n or m if K-major.
template <class Visit>
void for_each_unit(const SharedMatrix& matrix, i32 extent, Visit visit) {
  const i32 lines = matrix.mn_major ? kDepth : extent;
  const i32 units = (matrix.mn_major ? extent : kDepth) / kUnitElements;
  for (i32 line = 0; line < lines; ++line) {
    for (i32 unit = 0; unit < units; ++unit) {
      visit(line, unit, matrix.unit(line, unit));
    }
  }
}

const WgmmaArgs& args_of(const Lane& lane) { return *static_cast<const WgmmaArgs*>(lane.args); }

bool same_product(const WgmmaArgs& a, const WgmmaArgs& b) {
  return (a.a == nullptr) == (b.a == nullptr) && a.desc_a == b.desc_a && a.desc_b == b.desc_b &&
         a.n == b.n && a.bf16 == b.bf16 && a.trans_b == b.trans_b && a.accumulate == b.accumulate;
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

void Wgmma::reset(i32 num_warps) {
  groups_.clear();
  groups_.resize((num_warps + 3) / 4);
}

bool Wgmma::waits(const Warp& warp) const {
  return (groups_[warp.warp_idx / 4].waiting >> (warp.warp_idx % 4) & 1u) != 0;
}

bool Wgmma::step(Cta& cta, Warp& warp) {
  const i32 first_warp = warp.warp_idx / 4 * 4;
  const i32 w = warp.warp_idx % 4;
  Group& group = groups_[warp.warp_idx / 4];
  if (first_warp + 4 > cta.launch->num_threads / 32) {
    cta.fail(std::string(name_of(warp.op)) + " by warps that are no whole warpgroup", warp.site);
  }
  const u32 pending =
      warp.op == WarpOp::kWgmmaWaitGroup ? static_cast<LaneArgs*>(warp.lanes[0].args)->value : 0;
  const size_t index = group.executed[w]++ - group.num_forgotten;
  const bool first = index == group.operations.size();
  if (first) {
    group.operations.push_back({warp.op, pending, warp.site, nullptr});
  }
  Operation& operation = group.operations[index];
  if (operation.op != warp.op || operation.pending != pending ||
      !same_place(operation.site, warp.site)) {
    cta.fail("the warps of a warpgroup must execute the same operations: this one is at " +
                 std::string(name_of(warp.op)) + ", another was at " + name_of(operation.op) +
                 " (" + describe(operation.site) + ")",
             warp.site);
  }
  switch (warp.op) {
    case WarpOp::kWgmmaFence:
      group.fenced[w] = true;
      break;
    case WarpOp::kWgmma:
      issue(cta, group, warp, operation, first);
      break;
    case WarpOp::kWgmmaCommitGroup:
      ++group.open_group[w];
      break;
    default:  // kWgmmaWaitGroup
      group.fenced[w] = false;
      group.waiting |= 1u << w;
      if (group.waiting != kAllWarps) {
        return false;
      }
      retire(cta, group, first_warp, pending);
      group.waiting = 0;
      for (i32 i = 0; i < 4; ++i) {
        Warp& other = *cta.lane_at((first_warp + i) * 32).warp;
        other.runnable = kAllLanes;
      }
      group.num_forgotten += group.operations.size();
      group.operations.clear();
  }
  return true;
}

// This warp's part of a product: its fragments of A, its accumulators' present values.
void Wgmma::issue(Cta& cta, Group& group, Warp& warp, Operation& operation, bool first) {
  const i32 w = warp.warp_idx % 4;
  const WgmmaArgs& args = args_of(warp.lanes[0]);
  if (!group.fenced[w]) {
    cta.fail("wgmma without a wgmma_fence() since the last wgmma_wait_group(), or since the start",
             warp.site);
  }
  if (first) {
    group.products.push_back({});
    operation.product = &group.products.back();
    operation.product->args = args;
    operation.product->group = group.open_group[w];
    operation.product->site = warp.site;
    for (Accumulator& accumulator : group.accumulators) {
      if (accumulator.d[w * 32] == args.d && accumulator.n == args.n) {
        operation.product->accumulator = &accumulator;
      }
    }
    if (operation.product->accumulator == nullptr) {
      Accumulator& fresh = group.accumulators.emplace_back();
      fresh.n = args.n;
      fresh.values.resize(kRows * args.n);
      operation.product->accumulator = &fresh;
    }
    ++operation.product->accumulator->products;
  }
  Product& product = *operation.product;
  Accumulator& accumulator = *product.accumulator;
  for (const Lane& lane : warp.lanes) {
    const i32 thread = w * 32 + static_cast<i32>(lane.lane_idx);
    const WgmmaArgs& own = args_of(lane);
    if (!same_product(own, product.args)) {
      cta.fail("threads of a warpgroup disagree on the operands of a wgmma", warp.site);
    }
    f32*& d = accumulator.d[thread];
    if (d == nullptr) {
      d = own.d;
      for (const Accumulator& other : group.accumulators) {
        const f32* begin = other.d[thread];
        if (&other != &accumulator && begin != nullptr && d < begin + other.n / 2 &&
            begin < d + own.n / 2) {
          cta.fail("the accumulator of this wgmma overlaps one of another shape in flight",
                   warp.site);
        }
      }
      for (i32 i = 0; i < own.n / 2; ++i) {
        accumulator.values[row_of(thread, i) * own.n + col_of(thread, i)] = d[i];
        d[i] = std::bit_cast<f32>(kPoison);
      }
    } else if (d != own.d) {
      cta.fail("threads of a warpgroup disagree on the accumulator of a wgmma", warp.site);
    }
    if (own.a != nullptr) {
      std::copy_n(own.a, 4, product.a[thread].begin());
    }
  }
  note(cta, warp, product, Access::kWgmmaIssued);
}

void Wgmma::note(Cta& cta, Warp& warp, const Product& product, Access access) {
  Lane* running = cta.current;
  cta.current = &warp.lanes[0];
  const auto check = [&](u64 desc, bool mn_major, i32 extent, i32 first_line, i32 end_line,
                         const char* name) {
    const SharedMatrix matrix(desc, mn_major);
    check_descriptor(cta, desc, matrix, name, product.site);
    for_each_unit(matrix, extent, [&](i32 line, i32, u32 address) {
      if (line >= first_line && line < end_line) {
        cta.shared(address, 16, "read by wgmma", product.site);
        cta.check_race_of_warp(address - kSmemBase, 16, access, name_of(access), product.site);
      }
    });
  };
  if (product.args.a == nullptr) {
    const i32 first_row = warp.warp_idx % 4 * 16;
    check(product.args.desc_a, false, kRows, first_row, first_row + 16, "A");
  }
  const i32 n = product.args.n;
  check(product.args.desc_b, product.args.trans_b, n, 0, std::max(n, kDepth), "B");
  cta.current = running;
}

void Wgmma::retire(Cta& cta, Group& group, i32 first_warp, u32 pending) {
  while (!group.products.empty() && group.products.front().group + pending < group.open_group[0]) {
    Product& product = group.products.front();
    for (i32 w = 0; w < 4; ++w) {
      note(cta, *cta.lane_at((first_warp + w) * 32).warp, product, Access::kWgmmaDone);
    }
    compute(cta, product);
    Accumulator* accumulator = product.accumulator;
    if (--accumulator->products == 0) {
      write_back(cta, first_warp, *accumulator, product.site);
      group.accumulators.remove_if([&](const Accumulator& a) { return &a == accumulator; });
    }
    group.products.pop_front();
  }
}

void Wgmma::compute(Cta& cta, const Product& product) {
  const WgmmaArgs& args = product.args;
  const i32 n = args.n;
  alignas(16) f32 a[kRows][kDepth];
  alignas(16) static thread_local f32 b[kDepth][256];
  const auto to_f32 = args.bf16 ? bf16_as_f32 : f16_as_f32;
  const auto read = [&](const SharedMatrix& matrix, i32 extent, auto store) {
    for_each_unit(matrix, extent, [&](i32 line, i32 unit, u32 address) {
      u16 bits[kUnitElements];
      memcpy(bits, cta.shared(address, 16, "read by wgmma", product.site), sizeof bits);
      for (i32 i = 0; i < kUnitElements; ++i) {
        store(line, unit * kUnitElements + i, to_f32(bits[i]));
      }
    });
  };
  if (args.a == nullptr) {
    read(SharedMatrix(args.desc_a, false), kRows, [&](i32 m, i32 k, f32 x) { a[m][k] = x; });
  } else {
    for (i32 thread = 0; thread < 128; ++thread) {
      for (i32 i = 0; i < 8; ++i) {  // element i of the fragments, as accumulator elements go
        const u32 pair = product.a[thread][i / 2];
        a[row_of(thread, i)][col_of(thread, i)] = to_f32(static_cast<u16>(pair >> (16 * (i % 2))));
      }
    }
  }
  if (args.trans_b) {
    read(SharedMatrix(args.desc_b, true), n, [&](i32 k, i32 j, f32 x) { b[k][j] = x; });
  } else {
    read(SharedMatrix(args.desc_b, false), n, [&](i32 j, i32 k, f32 x) { b[k][j] = x; });
  }
  f32* values = product.accumulator->values.data();
  for (i32 m = 0; m < kRows; ++m) {
    for (i32 j = 0; j < n; j += kVec) {
      Vec sum{};
      for (i32 k = 0; k < kDepth; ++k) {
        Vec column;
        memcpy(&column, &b[k][j], sizeof column);
        sum += a[m][k] * column;
      }
      Vec value{};
      if (args.accumulate) {
        memcpy(&value, &values[m * n + j], sizeof value);
      }
      value += sum;
      memcpy(&values[m * n + j], &value, sizeof value);
    }
  }
}

// Hands the registers back, provided that no thread has written to them meanwhile.
void Wgmma::write_back(Cta& cta, i32 first_warp, const Accumulator& accumulator, const Site& site) {
  const i32 n = accumulator.n;
  for (i32 thread = 0; thread < 128; ++thread) {
    f32* d = accumulator.d[thread];
    for (i32 i = 0; i < n / 2; ++i) {
      u32 bits;
      memcpy(&bits, &d[i], sizeof bits);
      if (bits != kPoison) {
        cta.current = &cta.lane_at(first_warp * 32 + thread);
        cta.fail("element " + std::to_string(i) +
                     " of this wgmma's accumulator was written before its wgmma_wait_group()",
                 site);
      }
      d[i] = accumulator.values[row_of(thread, i) * n + col_of(thread, i)];
    }
  }
}

void Wgmma::hold(Cta& cta, const f32* d, i32 count, const Site& site) {
  const Lane& lane = *cta.current;
  const i32 thread = lane.thread_idx % 128;
  for (const Accumulator& accumulator : groups_[lane.thread_idx / 128].accumulators) {
    const f32* begin = accumulator.d[thread];
    if (begin != nullptr && d < begin + accumulator.n / 2 && begin < d + count) {
      cta.fail("wgmma_hold on an accumulator in flight: no wgmma_wait_group() covers it", site);
    }
  }
}

void Wgmma::warp_returns(Cta& cta, Warp& warp) {
  Group& group = groups_[warp.warp_idx / 4];
  if (group.executed[warp.warp_idx % 4] != group.num_forgotten + group.operations.size()) {
    cta.fail("this warp returns from the kernel, others of its warpgroup went on to " +
                 std::string(name_of(group.operations.back().op)),
             group.operations.back().site);
  }
  if (!group.products.empty()) {
    cta.fail("this warp returns from the kernel while its wgmma is in flight",
             group.products.front().site);
  }
}

void wgmma_hold(const f32* d, i32 count, Site site) {
  this_cta().wgmma.hold(this_cta(), d, count, site);
}

}  // namespace flash_sim
