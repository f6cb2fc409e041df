// Dropout's keep mask for transposed score tiles, S^T with keys as rows: what bwd.cu has in its
// accumulators. dropout.cuh hands out random bytes in the order of S; here the lanes of a warp
// exchange them.
#pragma once
#include "common/device/dropout.cuh"
#include "common/ptx/shuffle.cuh"

// Which elements of a kMTiles * 16 key x 16 query strip are kept.
template <i32 kMTiles>
struct KeepStrip {
  // [16-key tile][8-key half][query parity]: four random bytes, this lane's among them
  u32 word[kMTiles][2][2];
  u32 threshold;
  u32 shift;  // of the byte for an even 8-query tile; the odd one's is 16 higher

  // query: multiple of 16. key: multiple of 16, of 32 if kMTiles is even.
  DEVICE KeepStrip(const Dropout& dropout, i32 query, i32 key, i32 lane_idx)
      : threshold(dropout.keep_threshold), shift(u32(lane_idx / 4 % 2) * 8) {
    if constexpr (kMTiles % 2 == 0) {
#pragma unroll
      for (i32 m = 0; m < kMTiles; m += 2) {
        const Philox random = dropout.patch(query, key + m * 16, lane_idx);
        exchange(word[m], random.word[0], random.word[1], lane_idx);
        exchange(word[m + 1], random.word[2], random.word[3], lane_idx);
      }
    } else {  // a tile may be either half of its patch
#pragma unroll
      for (i32 m = 0; m < kMTiles; ++m) {
        const i32 tile = key / 16 + m;
        const Philox random = dropout.patch(query, tile / 2 * 32, lane_idx);
        exchange(word[m], tile % 2 == 0 ? random.word[0] : random.word[2],
                 tile % 2 == 0 ? random.word[1] : random.word[3], lane_idx);
      }
    }
  }

  // Element e of the fragment of 16-key tile m and 8-query tile n.
  DEVICE bool keep(i32 m, i32 n, i32 e) const {
    return ((word[m][e / 2][e % 2] >> (shift + n % 2 * 16)) & 0xffu) <= threshold;
  }

 private:
  // Key lane / 4 and queries 2 * (lane % 4), + 1 of a transposed fragment lie with two lanes of a
  // plain one.
  DEVICE static void exchange(u32 (&mine)[2][2], u32 low_keys, u32 high_keys, i32 lane_idx) {
    const i32 even_query_lane = lane_idx % 4 * 8 + lane_idx / 8;
    mine[0][0] = shfl_idx_u32(low_keys, even_query_lane);
    mine[0][1] = shfl_idx_u32(low_keys, even_query_lane + 4);
    mine[1][0] = shfl_idx_u32(high_keys, even_query_lane);
    mine[1][1] = shfl_idx_u32(high_keys, even_query_lane + 4);
  }
};

// Where dropout is off.
struct KeepAll {
  DEVICE bool keep(i32, i32, i32) const { return true; }
};

// Keep masks of one (batch, query head) pair.
template <bool kDropout>
struct TransposedDropout {
  Dropout dropout;
  template <class Params>
  DEVICE TransposedDropout(const Params& p, i32 batch_idx, i32 head_idx)
      : dropout(p, batch_idx, head_idx) {}
  template <i32 kMTiles>
  DEVICE KeepStrip<kMTiles> strip(i32 query, i32 key, i32 lane_idx) const {
    return KeepStrip<kMTiles>(dropout, query, key, lane_idx);
  }
};
template <>
struct TransposedDropout<false> {
  template <class Params>
  DEVICE TransposedDropout(const Params&, i32, i32) {}
  template <i32 kMTiles>
  DEVICE KeepAll strip(i32, i32, i32) const {
    return {};
  }
};
