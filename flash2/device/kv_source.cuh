// Where keys and values lie in a cache: behind left padding, in a slot of another index than the
// sequence's, or in pages. Called by flash2/fwd.cu. Whatever lengths, indices and tables hold, no
// address outside of the cache is formed from them.
#pragma once
#include "common/device/seqlen.cuh"
#include "flash2/device/tile_copy.cuh"

DEVICE i32 clamp(i32 x, i32 low, i32 high) { return imax(imin(x, high), low); }

// Row of a sequence in the caches or, paged, in the page table.
template <class Cfg, class Params>
DEVICE i32 cache_row(const Params& p, i32 batch_idx) {
  if constexpr (Cfg::kCacheBatchIdx) {
    const i32 last = Cfg::kPaged ? p.last_table_row : p.last_slot;
    return clamp(ld_global_i32(p.cache_batch_idx + batch_idx), 0, last);
  } else {
    return batch_idx;
  }
}

// Makes key 0 of a sequence its first one behind the left padding: masks, tiles and with them the
// order of all sums are those of contiguous keys. seq.k_row becomes the position of key 0.
template <class Cfg, class Params>
DEVICE void enter_cache(SeqlenInfo& seq, const Params& p, i32 batch_idx) {
  if constexpr (Cfg::kPaged && Cfg::kVarlenK) {  // cu_seqlens_k: lengths only
    seq.k_row = 0;
    seq.seqlen_k = clamp(seq.seqlen_k, 0, p.seqlen_k);
    seq.diagonal = seq.seqlen_k - seq.seqlen_q;
  }
  if constexpr (Cfg::kLeftpadK) {
    const i32 leftpad = clamp(ld_global_i32(p.leftpad_k + batch_idx), 0, seq.seqlen_k);
    seq.k_row += leftpad;
    seq.seqlen_k -= leftpad;
    seq.diagonal -= leftpad;
  }
}

// The pages of one sequence.
struct PageTable {
  const i32* pages;  // page -> slot, of all sequences
  i32 first_page;    // of this sequence
  i32 first;         // position of key 0
  i32 last_slot;
  i32 page_size, shift;
  u32 magic;

  template <class Params>
  DEVICE PageTable(const Params& p, i64 row, i64 first_position)
      : pages(p.page_table),
        first_page(i32(row * p.page_table_stride)),
        first(i32(first_position)),
        last_slot(p.last_slot),
        page_size(p.page_size),
        shift(p.page_shift),
        magic(p.page_magic) {}

  struct Place {
    i32 slot, row;  // row of the slot
  };
  // Any position below 2^31: 2 * position * magic / 2^(32 + shift) is position / page_size, as
  // page_division in common/features/kv.py chooses magic and shift.
  DEVICE i32 page_of(i32 position) const {
    return i32(u32(u64(2u * u32(position)) * magic >> 32) >> shift);
  }
  // What the table has for a page: the slot, or anything if the sequence does not use the page.
  DEVICE i32 entry(i32 page) const { return ld_global_i32(pages + (first_page + page)); }
  DEVICE Place place(i32 position) const {
    const i32 page = page_of(position);
    return {clamp(entry(page), 0, last_slot), position - page * page_size};
  }
};

// TileCopy of keys that lie in pages: same calls, each row is looked up.
template <class Copy>
struct PagedCopy : Copy {
  PageTable table;
  i64 slot_stride_bytes;

  // base: row 0 of slot 0 of one head.
  DEVICE PagedCopy(const void* base, i64 slot_stride, i64 row_stride, const PageTable& pages,
                   i32 thread_idx)
      : Copy(base, row_stride, thread_idx),
        table(pages),
        slot_stride_bytes(slot_stride * kElemBytes) {}

  DEVICE void load(u32 s_tile, i32 first_row, i32 num_rows) const {
    load_part<1>(s_tile, first_row, num_rows, 0);
  }
  template <i32 kParts, i32 kChunks = 1>
  DEVICE void load_part(u32 s_tile, i32 first_row, i32 num_rows, i32 part, i32 chunk = 0) const {
    const i32 thread_row = first_row + this->row;
    const auto address = [&](i32 pass) {
      const i32 key = thread_row + pass * Copy::kRowsPerPass;
      // A key that does not exist is not read; looking up position 0 keeps within the table, which
      // has a page: problems without one are answered by the host.
      const PageTable::Place at = table.place(key < num_rows ? table.first + key : 0);
      return this->g_column + at.slot * slot_stride_bytes + this->row_stride.offset(at.row);
    };
    Copy::template load_rows<kParts, kChunks>(s_tile, thread_row, num_rows, part, address, chunk);
  }
};
