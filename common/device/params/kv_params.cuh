// What flash2/device/kv_source.cuh and flash2/append.cu read: keys and values in a cache.
// params.cuh says how to read this. Host: common/features/kv.py.
#pragma once
#include "common/ptx/base.cuh"

// k and v are (last_slot + 1, rows, heads, head_dim): a slot holds a sequence or, paged, one page.
// seqlen_k is what a sequence has room for.
struct KvParams {
  const i32* page_table;       // Cfg::kPaged; (last_table_row + 1, page_table_stride) slots
  const i32* cache_batch_idx;  // Cfg::kCacheBatchIdx; (batch,): slots or rows of page_table
  const i32* leftpad_k;        // Cfg::kLeftpadK; (batch,): first keys
  i64 page_table_stride;
  i32 last_table_row, last_slot;
  i32 page_size, page_shift;  // with page_magic: division by page_size, see PageTable
  u32 page_magic;
};
