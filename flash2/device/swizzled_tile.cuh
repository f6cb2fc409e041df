// A tile as WGMMA reads it, filled by TileCopy: chunks of 64 columns, each its
// rows one after another in the 128-byte swizzle of wgmma_desc.cuh. Begins at a
// multiple of 1024 bytes.
#pragma once
#include "flash2/device/tile_copy.cuh"
#include "common/device/wgmma_desc.cuh"

template <i32 kRows_, i32 kHeadDim, i32 kColumnMultiple>
struct SwizzledTileLayout {
  using Chunk = SwizzledChunk<128>;
  static_assert(kColumnMultiple % Chunk::kCols == 0 && kRows_ % 8 == 0);
  static constexpr i32 kRows = kRows_;
  static constexpr i32 kCols = round_up(kHeadDim, kColumnMultiple);
  static constexpr i32 kRowBytes = Chunk::kCols * kElemBytes;
  static constexpr i32 kChunkBytes = kRows * kRowBytes;
  static constexpr i32 kBytes = kCols / Chunk::kCols * kChunkBytes;

  // As in TileLayout. TileCopy steps over rows by multiples of 8, which leave
  // the swizzle alone, and over columns by whole chunks.
  DEVICE static u32 offset(i32 row, i32 column_bytes) {
    return Chunk::unit_address(u32(column_bytes / kRowBytes * kChunkBytes), row,
                               column_bytes % kRowBytes / 16);
  }
  DEVICE static u32 moved(u32 addr, i32 rows, i32 column_bytes) {
    return addr + u32(rows * kRowBytes + column_bytes / kRowBytes * kChunkBytes);
  }

  // B operand whose depth are the columns from `column` on, a multiple of 16 (K
  // in Q K^T), and where its depth step k is.
  DEVICE static u64 k_major(u32 s_tile, i32 column) {
    return Chunk::k_major(s_tile + Chunk::k_major_step(column / 16, kChunkBytes));
  }
  DEVICE static constexpr u32 k_major_step(i32 k) { return Chunk::k_major_step(k, kChunkBytes); }
  // B operand whose depth are the rows, and its columns those from `column` on,
  // a multiple of 64 (V in P V).
  DEVICE static u64 mn_major(u32 s_tile, i32 column) {
    return Chunk::mn_major(s_tile + u32(column / Chunk::kCols * kChunkBytes), kChunkBytes);
  }
  DEVICE static constexpr u32 mn_major_step(i32 k) { return Chunk::mn_major_step(k); }
};

// The same with the chunks of kParts equal parts of the columns in turn: the
// first of each part, the second of each...
template <i32 kRows_, i32 kHeadDim, i32 kParts>
struct InterleavedTileLayout : SwizzledTileLayout<kRows_, kHeadDim, 64 * kParts> {
  using Tile = SwizzledTileLayout<kRows_, kHeadDim, 64 * kParts>;
  static constexpr i32 kPartChunks = Tile::kBytes / Tile::kChunkBytes / kParts;

  DEVICE static u32 moved(u32 addr, i32 rows, i32 column_bytes) {
    const i32 chunk = column_bytes / Tile::kRowBytes;
    return addr + u32(rows * Tile::kRowBytes +
                      (chunk % kPartChunks * kParts + chunk / kPartChunks) * Tile::kChunkBytes);
  }
  // Chunk `chunk` of a part.
  DEVICE static u32 part_chunk(u32 s_tile, i32 part, i32 chunk) {
    return s_tile + u32((chunk * kParts + part) * Tile::kChunkBytes);
  }
};
