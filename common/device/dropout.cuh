// Dropout's keep mask: a pure function of (seed, offset, batch, query head, row, column),
// independent of tiles, kernel and arch, so that any backward replays any forward.
// common/launch/philox.py is its twin for the reference.
//
// One Philox4x32-10 call gives the 16 random bytes of one lane in a 16-row x 32-column patch, in
// the order in which the lane holds these elements in its mma accumulators: no element's byte is
// computed twice.
#pragma once
#include "common/device/elem.cuh"
#include "common/ptx/memory.cuh"

struct Philox {
  u32 word[4];
};

DEVICE Philox philox4x32_10(u32 c0, u32 c1, u32 c2, u32 c3, u32 key0, u32 key1) {
#pragma unroll
  for (i32 round = 0; round < 10; ++round) {
    const u64 product0 = u64(0xD2511F53u) * c0;
    const u64 product1 = u64(0xCD9E8D57u) * c2;
    c0 = u32(product1 >> 32) ^ c1 ^ key0;
    c2 = u32(product0 >> 32) ^ c3 ^ key1;
    c1 = u32(product1);
    c3 = u32(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Which elements of a lane's 16 in a patch are kept.
struct KeepBits {
  u32 word[4];  // [n tile]: the highest bit of byte e belongs to element e

  DEVICE bool keep(i32 n_tile, i32 e) const { return (word[n_tile] & (0x80u << (8 * e))) != 0; }
};

struct Dropout {
  u32 key0, key1, offset, batch_head, keep_threshold;

  Dropout() = default;  // nothing: where dropout is off

  // Waits for memory: not once per tile.
  template <class Params>
  DEVICE Dropout(const Params& p, i32 batch_idx, i32 head_idx) {
    const u64 seed = u64(ld_global_i64(p.rng_state));
    const u64 offset64 = u64(ld_global_i64(p.rng_state + 1));
    key0 = u32(seed);
    key1 = u32(seed >> 32) ^ u32(offset64 >> 32);
    offset = u32(offset64);
    keep_threshold = p.keep_threshold;
    set_head(p, batch_idx, head_idx);
  }
  template <class Params>
  DEVICE void set_head(const Params& p, i32 batch_idx, i32 head_idx) {
    batch_head = u32(batch_idx) * u32(p.num_heads_q) + u32(head_idx);
  }

  // Random bytes of this lane in the patch at (row, col), multiples of 16 and 32.
  DEVICE Philox patch(i32 row, i32 col, i32 lane_idx) const {
    return philox4x32_10(u32(col + lane_idx), u32(row / 16), batch_head, offset, key0, key1);
  }

  // Of the patch: byte <= keep_threshold, four bytes at a time.
  DEVICE KeepBits keep_bits(i32 row, i32 col, i32 lane_idx) const {
    constexpr u32 kHigh = 0x80808080u;
    const Philox random = patch(row, col, lane_idx);
    const u32 limit = keep_threshold * 0x01010101u;
    KeepBits bits;
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      const u32 x = random.word[i];
      const u32 low_fits = (limit | kHigh) - (x & ~kHigh);  // no borrow leaves its byte
      bits.word[i] = (limit & ~x) | (~(limit ^ x) & low_fits);
    }
    return bits;
  }
};
