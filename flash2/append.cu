// flash2/append.cu: what comes before attention over a cache. Writes the new keys (rotated) and
// values behind the cached ones, rotates the queries into a tensor of their own and counts the keys
// that there are then. Launched by flash2/append.py. CTA: kRowsPerCta rows of one head, of K, then
// V, then Q. Change elsewhere: pages -> kv_source.cuh.
#include "prelude.cuh"  // generated for this problem: struct Cfg

#include "flash2/device/kv_source.cuh"
#include "common/device/params.cuh"
#include "common/device/row_io.cuh"

constexpr i32 kElems = Cfg::kVectorBytes / kElemBytes;  // of a vector; divides both head dims
constexpr i32 kRowsPerCta = Cfg::kNumThreads / Cfg::kThreadsPerRow;
using Vector = u32[kVectorWords<Cfg::kVectorBytes>];

// The token at a row of a tensor.
struct Token {
  i32 batch_idx, row;  // row: within its sequence
  bool exists;         // false behind the last sequence of a packed tensor
};
DEVICE Token find_token(const i32* cu_seqlens, i32 batch, i32 seqlen, i32 index) {
  if (cu_seqlens == nullptr) {
    return {index / seqlen, index % seqlen, true};
  }
  i32 low = 0, high = batch;  // low <= the last sequence that begins at or before index < high
  while (high - low > 1) {
    const i32 middle = (low + high) / 2;
    (ld_global_i32(cu_seqlens + middle) <= index ? low : high) = middle;
  }
  return {low, index - ld_global_i32(cu_seqlens + low),
          index < ld_global_i32(cu_seqlens + low + 1)};
}

// Keys of a sequence before the append.
DEVICE i32 cached_keys(const AppendParams& p, i32 batch_idx) {
  return p.cache_seqlens == nullptr
             ? p.cached_keys
             : clamp(ld_global_i32(p.cache_seqlens + batch_idx), 0, p.seqlen_k);
}

// After it.
DEVICE i32 keys_with_new(const AppendParams& p, i32 batch_idx) {
  i32 added = p.seqlen_new;
  if (p.cu_seqlens_k_new != nullptr) {
    added = ld_global_i32(p.cu_seqlens_k_new + batch_idx + 1) -
            ld_global_i32(p.cu_seqlens_k_new + batch_idx);
  }
  return imin(cached_keys(p, batch_idx) + clamp(added, 0, p.seqlen_k), p.seqlen_k);
}

// Row of the rotary tables for the first token of a sequence.
DEVICE u32 rotary_base(const AppendParams& p, i32 batch_idx) {
  return u32(p.rotary_seqlens == nullptr ? cached_keys(p, batch_idx)
                                         : ld_global_i32(p.rotary_seqlens + batch_idx));
}

DEVICE const char* element(const void* base, i64 offset) {
  return static_cast<const char*>(base) + offset * kElemBytes;
}

template <i32 kWords>
DEVICE f32 component(const u32 (&x)[kWords], i32 e) {
  return e % 2 == 0 ? low_as_f32<Cfg::kBf16>(x[e / 2]) : high_as_f32<Cfg::kBf16>(x[e / 2]);
}

// Pairs (x0, x1) become (x0 cos - x1 sin, x0 sin + x1 cos). x: the components of `row` from
// `column` on. Positions without a row in the tables are left alone.
DEVICE void rotate(Vector& x, const char* row, i32 column, const AppendParams& p, u32 position) {
  const i32 half = p.rotary_dim / 2;
  if (column >= p.rotary_dim || position >= u32(p.rotary_rows)) {
    return;
  }
  const char* cos = element(p.rotary_cos, i64(position) * half);
  const char* sin = element(p.rotary_sin, i64(position) * half);
  f32 turned[kElems + kElems % 2] = {};
  if constexpr (Cfg::kRotaryInterleaved && kElems > 1) {  // a vector holds whole pairs
    constexpr i32 kTableBytes = Cfg::kVectorBytes / 2;
    u32 cos_t[kVectorWords<kTableBytes>], sin_t[kVectorWords<kTableBytes>];
    load_vector<kTableBytes>(cos_t, element(cos, column / 2));
    load_vector<kTableBytes>(sin_t, element(sin, column / 2));
#pragma unroll
    for (i32 t = 0; t < kElems / 2; ++t) {
      const f32 c = component(cos_t, t), s = component(sin_t, t);
      const f32 x0 = component(x, 2 * t), x1 = component(x, 2 * t + 1);
      turned[2 * t] = x0 * c - x1 * s;
      turned[2 * t + 1] = x0 * s + x1 * c;
    }
  } else {  // the other components of the pairs lie in another vector
    const bool is_first = Cfg::kRotaryInterleaved ? column % 2 == 0 : column < half;
    const i32 distance = Cfg::kRotaryInterleaved ? 1 : half;
    const i32 first = is_first ? column : column - distance;
    const i32 t = Cfg::kRotaryInterleaved ? first / 2 : first;
    Vector other, cos_t, sin_t;
    load_vector<Cfg::kVectorBytes>(other, element(row, is_first ? first + distance : first));
    load_vector<Cfg::kVectorBytes>(cos_t, element(cos, t));
    load_vector<Cfg::kVectorBytes>(sin_t, element(sin, t));
#pragma unroll
    for (i32 e = 0; e < kElems; ++e) {
      const f32 c = component(cos_t, e), s = component(sin_t, e);
      const f32 own = component(x, e), its = component(other, e);
      turned[e] = is_first ? own * c - its * s : its * s + own * c;
    }
  }
#pragma unroll
  for (i32 e = 0; e < kElems; e += 2) {
    x[e / 2] = pack2<Cfg::kBf16>(turned[e], turned[e + 1]);
  }
}

// Copies one row of one head, rotated if kRotate.
template <bool kRotate>
DEVICE void copy_row(const AppendParams& p, void* dst, const char* src, i32 head_dim, u32 position,
                     i32 lane) {
  for (i32 column = lane * kElems; column < head_dim; column += Cfg::kThreadsPerRow * kElems) {
    Vector x;
    load_vector<Cfg::kVectorBytes>(x, element(src, column));
    if constexpr (kRotate) {
      rotate(x, src, column, p, position);
    }
    store_words<Cfg::kVectorBytes>(static_cast<char*>(dst) + column * kElemBytes, x);
  }
}

// One tensor of new rows and the cache that takes them.
struct Append {
  const void* rows;
  void* cache;
  i64 new_batch_stride, new_row_stride, new_head_stride;
  i64 batch_stride, row_stride, head_stride;
  i32 num_heads, head_dim;
};

// item: row * num_heads + head. Rows without a place in the cache are dropped.
template <bool kRotate>
DEVICE void append_row(const AppendParams& p, const Append& a, i32 item, i32 lane) {
  if (item >= p.new_rows * a.num_heads) {
    return;
  }
  const i32 index = item / a.num_heads, head = item % a.num_heads;
  const Token token = find_token(p.cu_seqlens_k_new, p.batch, p.seqlen_new, index);
  if (!token.exists) {
    return;
  }
  const i32 b = token.batch_idx;
  i32 row = cached_keys(p, b) + token.row;
  i32 slot = p.cache_batch_idx == nullptr ? b : ld_global_i32(p.cache_batch_idx + b);
  if (row < 0 || row >= p.seqlen_k ||
      u32(slot) > u32(p.page_table == nullptr ? p.last_slot : p.last_table_row)) {
    return;
  }
  if (p.page_table != nullptr) {
    const PageTable table(p, slot, 0);
    const i32 page = table.page_of(row);
    slot = table.entry(page);
    row -= page * p.page_size;
    if (u32(slot) > u32(p.last_slot)) {
      return;
    }
  }
  const bool packed = p.cu_seqlens_k_new != nullptr;
  const char* src = element(a.rows, (packed ? 0 : b * a.new_batch_stride) +
                                        (packed ? index : token.row) * a.new_row_stride +
                                        head * a.new_head_stride);
  void* dst = static_cast<char*>(a.cache) +
              (slot * a.batch_stride + row * a.row_stride + head * a.head_stride) * kElemBytes;
  const u32 position = kRotate ? rotary_base(p, b) + u32(token.row) : 0;
  copy_row<kRotate>(p, dst, src, a.head_dim, position, lane);
}

DEVICE void rotate_query(const AppendParams& p, i32 item, i32 lane) {
  if (item >= p.q_rows * p.num_heads_q) {
    return;
  }
  const i32 index = item / p.num_heads_q, head = item % p.num_heads_q;
  const Token token = find_token(p.cu_seqlens_q, p.batch, p.seqlen_q, index);
  if (!token.exists) {
    return;  // attention does not read it
  }
  const bool packed = p.cu_seqlens_q != nullptr;
  const char* src =
      element(p.q, (packed ? 0 : token.batch_idx * p.q_batch_stride) +
                       (packed ? index : token.row) * p.q_row_stride + head * p.q_head_stride);
  void* dst = static_cast<char*>(p.q_rotated) + i64(item) * p.head_dim_qk * kElemBytes;
  const u32 position = rotary_base(p, token.batch_idx) + u32(p.rotary_per_row != 0 ? token.row : 0);
  copy_row<true>(p, dst, src, p.head_dim_qk, position, lane);
}

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) flash2_append(GRID_CONSTANT AppendParams p) {
  const i32 cta = block_idx();
  if (cta < ceil_div(p.batch, Cfg::kNumThreads)) {
    const i32 b = cta * Cfg::kNumThreads + thread_idx();
    if (b < p.batch) {
      st_global_u32(p.seqused_k + b, u32(keys_with_new(p, b)));
    }
  }
  const i32 row_of_cta = thread_idx() / Cfg::kThreadsPerRow,
            lane = thread_idx() % Cfg::kThreadsPerRow;
  if (cta < p.k_ctas) {
    append_row<Cfg::kRotary>(
        p,
        {p.k_new, p.k_cache, p.k_new_batch_stride, p.k_new_row_stride, p.k_new_head_stride,
         p.k_batch_stride, p.k_row_stride, p.k_head_stride, p.num_heads_k, p.head_dim_qk},
        cta * kRowsPerCta + row_of_cta, lane);
  } else if (cta < p.k_ctas + p.v_ctas) {
    append_row<false>(
        p,
        {p.v_new, p.v_cache, p.v_new_batch_stride, p.v_new_row_stride, p.v_new_head_stride,
         p.v_batch_stride, p.v_row_stride, p.v_head_stride, p.num_heads_v, p.head_dim_v},
        (cta - p.k_ctas) * kRowsPerCta + row_of_cta, lane);
  } else if constexpr (Cfg::kRotary) {
    rotate_query(p, (cta - p.k_ctas - p.v_ctas) * kRowsPerCta + row_of_cta, lane);
  }
}
