// Tiles of 16-bit rows: their layout in shared memory and the copy from global memory. Used by
// every flash2 kernel. Change here: layout, thread mapping, tail handling. Which rows are copied is
// the caller's business.
#pragma once
#include "common/device/elem.cuh"
#include "flash2/device/row_stride.cuh"
#include "common/ptx/cp_async.cuh"
#include "common/ptx/memory.cuh"

// kRows x kHeadDim elements in shared memory. Columns are rounded up to a multiple of 16 (the depth
// of one mma; more where warps share the columns evenly) and hold zeros past kHeadDim. Rows are
// padded by 16 bytes: their stride is an odd number of 16-byte units, so the eight rows that one
// ldmatrix phase reads lie in different banks, and every address is a lane's base plus a constant.
template <i32 kRows_, i32 kHeadDim, i32 kColumnMultiple = 16>
struct TileLayout {
  static constexpr i32 kRows = kRows_;
  static constexpr i32 kCols = round_up(kHeadDim, kColumnMultiple);
  static constexpr i32 kRowBytes = kCols * kElemBytes + 16;
  static constexpr i32 kBytes = kRows * kRowBytes;

  // Of byte `column_bytes` of a row, from the tile's begin.
  DEVICE static u32 offset(i32 row, i32 column_bytes) {
    return u32(row * kRowBytes + column_bytes);
  }
  // From the address of a place to that of the place `rows` and `column_bytes` on.
  DEVICE static u32 moved(u32 addr, i32 rows, i32 column_bytes) {
    return addr + u32(rows * kRowBytes + column_bytes);
  }
};

// The same without padding, for rows of whole 128-byte lines: 16-byte unit u of a line is at u ^
// (row % 8), which serves ldmatrix as well. A line of a padded row lies across two lines of shared
// memory, and so cp.async fetches it by two or three requests to L2 instead of one. Begins at a
// multiple of 128 bytes.
template <i32 kRows_, i32 kHeadDim, i32 kColumnMultiple = 16>
struct LineTileLayout {
  static constexpr i32 kRows = kRows_;
  static constexpr i32 kCols = round_up(kHeadDim, kColumnMultiple);
  static constexpr i32 kRowBytes = kCols * kElemBytes;
  static constexpr i32 kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % 128 == 0);

  DEVICE static u32 offset(i32 row, i32 column_bytes) {
    return u32(row * kRowBytes + (column_bytes ^ (row % 8 * 16)));
  }
  // The place has zeros where rows % 8, or column_bytes % 128, has ones: nothing is carried.
  DEVICE static u32 moved(u32 addr, i32 rows, i32 column_bytes) {
    return (addr ^ u32((column_bytes % 128) ^ (rows % 8 * 16))) +
           u32(rows * kRowBytes + column_bytes / 128 * 128);
  }
};

// Lines where that is wanted (kLines) and possible: not if a warp's columns, of kParts that share
// them, begin in the middle of a line and end in another. fwd_tiles.py has the same rule.
DEVICE constexpr bool has_lines(i32 columns, i32 parts) {
  return columns % 64 == 0 && (columns / parts % 64 == 0 || 64 % (columns / parts) == 0);
}
template <bool kLines, i32 kRows, i32 kHeadDim, i32 kColumnMultiple = 16, i32 kParts = 1>
using CopiedTileLayout = Select<kLines && has_lines(round_up(kHeadDim, kColumnMultiple), kParts),
                                LineTileLayout<kRows, kHeadDim, kColumnMultiple>,
                                TileLayout<kRows, kHeadDim, kColumnMultiple>>;

// Copies one tile global -> shared with kThreads threads in pieces of kVectorBytes (16, 8, 4 or 2):
// the largest that the caller's pointers and strides are aligned to. 16, 8 and 4 are cp.async (the
// caller commits and waits); 2 goes through registers at once. kWide: of RowStride. kReadOnce:
// no other CTA reads these rows, so that they need not stay in L2.
template <class Layout, i32 kHeadDim, i32 kThreads, i32 kVectorBytes, bool kWide,
          bool kReadOnce = false>
struct TileCopy {
  static constexpr i32 kRows = Layout::kRows;
  static constexpr i32 kVectorsPerRow = Layout::kCols * kElemBytes / kVectorBytes;
  DEVICE static constexpr i32 threads_per_row() {
    i32 threads =
        1;  // the largest power of two that divides a row evenly and covers at most 128 bytes
    while (threads < 32 && threads * kVectorBytes < 128 && kVectorsPerRow % (2 * threads) == 0) {
      threads *= 2;
    }
    return threads;
  }
  static constexpr i32 kThreadsPerRow = threads_per_row();
  static constexpr i32 kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr i32 kPasses = ceil_div(Layout::kRows, kRowsPerPass);
  static constexpr i32 kVectorsPerThread = kVectorsPerRow / kThreadsPerRow;  // of one row
  static_assert(kThreads % kThreadsPerRow == 0, "a row belongs to whole threads");

  const char* g_column;  // this thread's first vector in row 0 of the sequence
  RowStride<kWide> row_stride;
  u32 s_offset;  // the same vector in this thread's first row of the shared tile
  i32 row;       // this thread's first row
  i32 vector;    // this thread's first vector

  DEVICE TileCopy(const void* base, i64 row_stride, i32 thread_idx)
      : row_stride(row_stride),
        row(thread_idx / kThreadsPerRow),
        vector(thread_idx % kThreadsPerRow) {
    g_column = static_cast<const char*>(base) + vector * kVectorBytes;
    s_offset = Layout::offset(row, vector * kVectorBytes);
  }

  // Copies rows first_row .. first_row + kRows - 1; rows from num_rows on and columns from kHeadDim
  // on become zero.
  DEVICE void load(u32 s_tile, i32 first_row, i32 num_rows) const {
    load_part<1>(s_tile, first_row, num_rows, 0);
  }

  // Part `part` of kParts of load(): lets a product carry the copy of the next tile, a few
  // instructions per step, instead of a burst that fills the memory pipe's queue and holds up
  // everything behind it. Of the columns, all or the chunk-th of kChunks equal shares: lets a
  // product begin on the columns that are there.
  template <i32 kParts, i32 kChunks = 1>
  DEVICE void load_part(u32 s_tile, i32 first_row, i32 num_rows, i32 part, i32 chunk = 0) const {
    const i32 thread_row = first_row + row;
    const char* g = g_column + row_stride.offset(thread_row);
    const auto address = [&](i32 pass) {
      return g + row_stride.template steps<kRowsPerPass>(pass);
    };
    load_rows<kParts, kChunks>(s_tile, thread_row, num_rows, part, address, chunk);
  }

 protected:
  // The same with rows anywhere: address(pass) is this thread's first vector of row thread_row +
  // pass * kRowsPerPass.
  template <i32 kParts, i32 kChunks = 1, class Address>
  DEVICE void load_rows(u32 s_tile, i32 thread_row, i32 num_rows, i32 part, Address address,
                        i32 chunk = 0) const {
    constexpr i32 kVectors = kVectorsPerThread / kChunks;
    static_assert(kVectorsPerThread % kChunks == 0, "a chunk is whole vectors of every thread");
    const u32 s = s_tile + s_offset;
#pragma unroll
    for (i32 pass = 0; pass < kPasses; ++pass) {
      if (pass * kParts / kPasses == part &&
          (Layout::kRows % kRowsPerPass == 0 || row + pass * kRowsPerPass < Layout::kRows)) {
        const char* g = address(pass);
#pragma unroll
        for (i32 i = chunk * kVectors; i < (chunk + 1) * kVectors; ++i) {
          copy_vector(Layout::moved(s, pass * kRowsPerPass, i * kThreadsPerRow * kVectorBytes),
                      g + i * kThreadsPerRow * kVectorBytes,
                      thread_row + pass * kRowsPerPass < num_rows ? valid_bytes(i) : 0);
        }
      }
    }
  }

 private:
  // Bytes of this thread's i-th vector that lie inside kHeadDim.
  DEVICE i32 valid_bytes(i32 i) const {
    if constexpr (kHeadDim == Layout::kCols) {
      return kVectorBytes;
    } else {
      const i32 left = (kHeadDim * kElemBytes) - (vector + i * kThreadsPerRow) * kVectorBytes;
      return imin(imax(left, 0), kVectorBytes);
    }
  }
  DEVICE static void copy_vector(u32 dst, const char* src, i32 bytes) {
    if constexpr (kVectorBytes == 16 && kReadOnce) {
      cp_async_16_with_policy(dst, src, bytes, evict_first_policy());
    } else if constexpr (kVectorBytes == 16) {
      cp_async_16(dst, src, bytes);
    } else if constexpr (kVectorBytes == 8) {
      cp_async_8(dst, src, bytes);
    } else if constexpr (kVectorBytes == 4) {
      cp_async_4(dst, src, bytes);
    } else {
      st_shared_u16(dst, bytes > 0 ? ld_global_u16(src) : u16(0));
    }
  }
};

// Copies kVectorBytes shared -> global.
template <i32 kVectorBytes>
DEVICE void store_vector(char* dst, u32 src) {
  if constexpr (kVectorBytes == 16) {
    u32 words[4];
    ld_shared_v4(words, src);
    st_global_v4(dst, words);
  } else if constexpr (kVectorBytes == 8) {
    st_global_u64(dst, ld_shared_u64(src));
  } else if constexpr (kVectorBytes == 4) {
    st_global_u32(dst, ld_shared_u32(src));
  } else {
    st_global_u16(dst, ld_shared_u16(src));
  }
}
