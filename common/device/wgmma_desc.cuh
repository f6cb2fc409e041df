// Matrices of 16-bit elements in shared memory as TMA lays them out and WGMMA reads them: swizzle,
// descriptors, and the steps between descriptors. Used by the kernels of hopper/.
//
// A matrix is split into chunks of kSwizzleBytes / 2 columns; a chunk is its rows one after
// another, kSwizzleBytes each (128, 64 or 32): what one TMA box with that swizzle fills. Eight rows
// are an atom; inside, the 16-byte units of a row change places, so that reading one column of
// units hits all banks. Chunks begin at a multiple of the atom's size, so their number of rows is a
// multiple of 8. WGMMA reads 16 of the depth k per instruction:
//   K-major:  rows are m or n, columns are k.  Q, and K as the B of Q K^T.
//   MN-major: rows are k, columns are m or n.  V as the B of P V.
#pragma once
#include "common/ptx/base.cuh"

template <i32 kSwizzleBytes>
struct SwizzledChunk {
  static_assert(kSwizzleBytes == 128 || kSwizzleBytes == 64 || kSwizzleBytes == 32);
  static constexpr i32 kCols = kSwizzleBytes / 2;
  static constexpr i32 kAtomBytes = 8 * kSwizzleBytes;  // also the alignment of a chunk

  // Where the bytes lie that an unswizzled chunk would have at this shared address: the number of
  // the 128-byte line inside the atom goes into the number of the 16-byte unit.
  DEVICE static u32 swizzled(u32 addr) {
    return addr ^ (addr >> 3 & static_cast<u32>(kSwizzleBytes - 16));
  }

  // Shared address of the 16-byte unit (8 columns) in `row` of the chunk at `chunk`.
  DEVICE static u32 unit_address(u32 chunk, i32 row, i32 unit) {
    return swizzled(chunk + static_cast<u32>(row * kSwizzleBytes + unit * 16));
  }

  // In the same row as unit u at `unit_addr`: the address of unit u ^ distance. A loop over units
  // so keeps one address, where unit_address() would need as many as there are units.
  DEVICE static u32 unit_at(u32 unit_addr, i32 distance) {
    return unit_addr ^ static_cast<u32>(distance * 16);
  }

  // Descriptor of a K-major operand whose first 16 columns are those at `addr`: a chunk's address,
  // plus 32 per earlier step of 16 columns in that chunk. Rows of one chunk follow each other.
  DEVICE static u64 k_major(u32 addr) { return descriptor(addr, 16, kAtomBytes); }

  // Byte offset from the operand's first chunk to its k_step-th 16 columns.
  //   chunk_bytes: from one chunk to the next, usually rows * kSwizzleBytes.
  DEVICE static constexpr u32 k_major_step(i32 k_step, i32 chunk_bytes) {
    constexpr i32 kStepsPerChunk = kCols / 16;
    return static_cast<u32>(k_step / kStepsPerChunk * chunk_bytes + k_step % kStepsPerChunk * 32);
  }

  // Descriptor of an MN-major operand whose first 16 rows begin at `addr`, in its first chunk.
  DEVICE static u64 mn_major(u32 addr, i32 chunk_bytes) {
    return descriptor(addr, chunk_bytes, kAtomBytes);
  }

  // Byte offset from the operand's first rows to its k_step-th 16 rows.
  DEVICE static constexpr u32 mn_major_step(i32 k_step) {
    return static_cast<u32>(k_step * 2 * kAtomBytes);
  }

  // The descriptor's fields: bits 0-13 address, 16-29 leading byte offset (MN-major: to the next
  // chunk; else unused), 32-45 stride byte offset (to the next 8 rows), all in units of 16 bytes;
  // 49-51 base offset 0; 62-63 the swizzle.
  DEVICE static u64 descriptor(u32 addr, i32 leading_bytes, i32 stride_bytes) {
    constexpr u64 kMode = kSwizzleBytes == 128 ? 1 : kSwizzleBytes == 64 ? 2 : 3;
    return static_cast<u64>((addr & 0x3ffffu) >> 4) |
           static_cast<u64>(static_cast<u32>(leading_bytes) >> 4) << 16 |
           static_cast<u64>(static_cast<u32>(stride_bytes) >> 4) << 32 | kMode << 62;
  }
};

// The same operand `bytes` further on (k_major_step, mn_major_step). Stays inside the 14 bits of
// the address, since shared memory ends below 2^18.
DEVICE u64 wgmma_desc_advance(u64 desc, u32 bytes) { return desc + (bytes >> 4); }
