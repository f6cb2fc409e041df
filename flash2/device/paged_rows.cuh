// Copies of scattered rows for flash2/decode.cu: keys and values in pages, looked up well before
// they are copied, and query rows packed from several heads. Thread mapping and tails are
// TileCopy's.
#pragma once
#include "flash2/device/kv_source.cuh"
#include "common/ptx/shuffle.cuh"

// Where the keys of one tile lie, a key (of 64, two) per lane. Each warp that copies looks all of
// them up itself. Nothing waits for the loads before at() is called.
template <i32 kRows>
struct TilePages {
  static_assert(kRows == 16 || kRows % 32 == 0);
  static constexpr i32 kKeys = ceil_div(kRows, 32);  // that a lane looks up
  i32 entry[kKeys];                                  // of the page table
  i32 row[kKeys];                                    // of the page

  // Keys from num_keys on are not looked up: the table need not name a page for them.
  DEVICE void look_up(const PageTable& table, i32 first_key, i32 num_keys, i32 lane_idx) {
#pragma unroll
    for (i32 i = 0; i < kKeys; ++i) {
      const i32 key = first_key + i * 32 + lane_idx % kRows;
      const i32 position = table.first + key;
      const i32 page = table.page_of(position);
      row[i] = position - page * table.page_size;
      entry[i] = 0;
      if (key < num_keys) {
        entry[i] = table.entry(page);
      }
    }
  }

  DEVICE static i32 of_row(const i32 (&keys)[kKeys], i32 tile_row) {
    i32 found = i32(shfl_idx_u32(u32(keys[0]), tile_row % 32));
#pragma unroll
    for (i32 i = 1; i < kKeys; ++i) {
      const i32 other = i32(shfl_idx_u32(u32(keys[i]), tile_row % 32));
      found = tile_row / 32 == i ? other : found;
    }
    return found;
  }

  // Of row `tile_row` of the tile. All lanes call it together.
  DEVICE PageTable::Place at(const PageTable& table, i32 tile_row) const {
    const i32 slot = of_row(entry, tile_row);
    return {clamp(slot, 0, table.last_slot), of_row(row, tile_row)};
  }
};

// TileCopy of keys or values by TilePages.
template <class Copy>
struct LookedUpCopy : Copy {
  decltype(Copy::row_stride) slot_stride;

  // base: row 0 of slot 0 of one head.
  DEVICE LookedUpCopy(const void* base, i64 slot_stride, i64 row_stride, i32 thread_idx)
      : Copy(base, row_stride, thread_idx), slot_stride(slot_stride) {}

  DEVICE void load(u32 s_tile, i32 first_key, i32 num_keys, const PageTable& table,
                   const TilePages<Copy::kRows>& pages) const {
    const auto address = [&](i32 pass) {
      const PageTable::Place at = pages.at(table, this->row + pass * Copy::kRowsPerPass);
      return this->g_column + slot_stride.offset(at.slot) + this->row_stride.offset(at.row);
    };
    const i32 thread_row = first_key + this->row;
    if constexpr (Copy::kRows % Copy::kRowsPerPass == 0) {
      this->template load_rows<1>(s_tile, thread_row, num_keys, 0, address);
    } else {  // one pass, in which some lanes have no row
      const char* g = address(0);
      this->template load_rows<1>(s_tile, thread_row, num_keys, 0, [&](i32) { return g; });
    }
  }
};

// TileCopy of query rows: row r is head r % heads_per_unit of token r / heads_per_unit.
template <class Copy>
struct PackedRowsCopy : Copy {
  i64 head_stride_bytes;
  i32 heads_per_unit;
  u64 by_heads_per_unit;

  // base: the unit's first head in token 0.
  DEVICE PackedRowsCopy(const void* base, i64 token_stride, i64 head_stride, i32 heads,
                        u64 by_heads, i32 thread_idx)
      : Copy(base, token_stride, thread_idx),
        head_stride_bytes(head_stride * kElemBytes),
        heads_per_unit(heads),
        by_heads_per_unit(by_heads) {}

  DEVICE void load(u32 s_tile, i32 first_row, i32 num_rows) const {
    const i32 thread_row = first_row + this->row;
    this->template load_rows<1>(s_tile, thread_row, num_rows, 0, [&](i32 pass) {
      const i32 row = thread_row + pass * Copy::kRowsPerPass;
      const i32 token = divide(row, by_heads_per_unit);
      return this->g_column + this->row_stride.offset(token) +
             (row - token * heads_per_unit) * head_stride_bytes;
    });
  }
};
