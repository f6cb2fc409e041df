// Whether first_key_tile() names the first of the key tiles that query_tiles() sends to a query
// tile, and these are neighbours. One thread a problem.
//   in: (count / 5, 5) words: seqlen_q, seqlen_k, window_left, window_right, attention_chunk.
//   out: (count / 5) words: query tiles for which it is not so.
#include "prelude.cuh"

#include "common/device/bwd_work.cuh"
#include "common/ptx/memory.cuh"
#include "tests/kernels/probe_params.cuh"

struct ProbedMask {
  i32 window_left, window_right, attention_chunk;
};

KERNEL(Cfg::kNumThreads, Cfg::kMinCtasPerSm) probe_key_tiles(GRID_CONSTANT ProbeParams p) {
  const i32 problem = block_idx() * Cfg::kNumThreads + thread_idx();
  if (problem >= p.count / 5) {
    return;
  }
  i32 of[5];
  for (i32 i = 0; i < 5; ++i) {
    of[i] = ld_global_i32(p.in + 5 * problem + i);
  }
  const ProbedMask masks{of[2], of[3], of[4]};
  const SeqlenInfo seq{0, 0, of[0], of[0], of[1], of[1] - of[0]};
  const i32 key_tiles = ceil_div(seq.seqlen_k, Cfg::kBlockN) + 2;  // some without keys
  u32 wrong = 0;
  for (i32 m_block = 0; m_block < ceil_div(seq.seqlen_q, Cfg::kBlockM); ++m_block) {
    const i32 first = first_key_tile<Cfg>(masks, seq, m_block, Cfg::kBlockN);
    i32 visits = 0;
    bool right = true;
    for (i32 n_block = 0; n_block < key_tiles; ++n_block) {
      const TileRange tiles = query_tiles<Cfg>(masks, seq, n_block * Cfg::kBlockN, Cfg::kBlockN);
      if (tiles.begin <= m_block && m_block < tiles.end) {
        right = right && n_block == first + visits;
        ++visits;
      }
    }
    wrong += right ? 0 : 1;
  }
  st_global_u32(p.out + problem, wrong);
}
