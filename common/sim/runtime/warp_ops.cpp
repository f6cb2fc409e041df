// What the operations of a whole warp compute, once all its lanes have handed over their arguments.
#include <cstring>

#include "half.h"
#include "machine.h"

namespace flash_sim {

namespace {

// The fragment layout of the PTX manual (mma.m16n8k16), gathered into plain matrices.
template <f32 (*kToF32)(u16)>
void mma(Warp& warp) {
  alignas(64) f32 a[16][16];
  alignas(64) f32 b[16][8];
  const auto lower = [](u32 pair) { return kToF32(static_cast<u16>(pair)); };
  const auto upper = [](u32 pair) { return kToF32(static_cast<u16>(pair >> 16)); };
  for (i32 l = 0; l < 32; ++l) {
    const MmaArgs& args = *static_cast<MmaArgs*>(warp.lanes[l].args);
    const i32 row = l / 4;
    const i32 col = 2 * (l % 4);
    for (i32 i = 0; i < 4; ++i) {
      f32* a_pair = &a[row + 8 * (i % 2)][col + 8 * (i / 2)];
      a_pair[0] = lower(args.a[i]);
      a_pair[1] = upper(args.a[i]);
    }
    for (i32 i = 0; i < 2; ++i) {
      b[col + 8 * i][row] = lower(args.b[i]);
      b[col + 8 * i + 1][row] = upper(args.b[i]);
    }
  }
  alignas(64) f32 product[16][8] = {};
  for (i32 m = 0; m < 16; ++m) {
    for (i32 k = 0; k < 16; ++k) {
      for (i32 n = 0; n < 8; ++n) {
        product[m][n] += a[m][k] * b[k][n];
      }
    }
  }
  for (i32 l = 0; l < 32; ++l) {
    f32* d = static_cast<MmaArgs*>(warp.lanes[l].args)->d;
    const i32 col = 2 * (l % 4);
    for (i32 i = 0; i < 4; ++i) {
      d[i] += product[l / 4 + 8 * (i / 2)][col + i % 2];
    }
  }
}

void ldmatrix(Cta& cta, Warp& warp, i32 num_matrices, bool transposed) {
  u16 rows[8][8];
  for (i32 matrix = 0; matrix < num_matrices; ++matrix) {
    for (i32 row = 0; row < 8; ++row) {
      cta.current = &warp.lanes[matrix * 8 + row];  // an error is the fault of who named the row
      const u32 addr = static_cast<LdmatrixArgs*>(cta.current->args)->addr;
      memcpy(rows[row], cta.shared(addr, 16, "read by ldmatrix", warp.site), 16);
      cta.check_race_ldmatrix(addr - kSmemBase, warp.site);
    }
    for (i32 l = 0; l < 32; ++l) {
      const i32 row = l / 4;
      const i32 col = 2 * (l % 4);
      const u32 lower = transposed ? rows[col][row] : rows[row][col];
      const u32 upper = transposed ? rows[col + 1][row] : rows[row][col + 1];
      *static_cast<LdmatrixArgs*>(warp.lanes[l].args)->r[matrix] = upper << 16 | lower;
    }
  }
}

void stmatrix(Cta& cta, Warp& warp, bool transposed) {
  const auto element = [&](i32 matrix, i32 lane, i32 half) {
    return static_cast<u16>(static_cast<StmatrixArgs*>(warp.lanes[lane].args)->r[matrix] >>
                            (16 * half));
  };
  for (i32 matrix = 0; matrix < 4; ++matrix) {
    for (i32 row = 0; row < 8; ++row) {
      u16 values[8];
      for (i32 col = 0; col < 8; ++col) {
        values[col] = transposed ? element(matrix, col * 4 + row / 2, row % 2)
                                 : element(matrix, row * 4 + col / 2, col % 2);
      }
      cta.current = &warp.lanes[matrix * 8 + row];
      const u32 addr = static_cast<StmatrixArgs*>(cta.current->args)->addr;
      u8* to = cta.shared(addr, 16, "write by stmatrix", warp.site);
      cta.check_race(addr - kSmemBase, 16, Access::kWrite, warp.site);
      memcpy(to, values, 16);
    }
  }
}

// Each lane's source lane, from (own lane, operand).
template <class SourceLane>
void shuffle(Cta& cta, Warp& warp, i32 max_operand, SourceLane source_lane) {
  for (i32 l = 0; l < 32; ++l) {
    LaneArgs& args = *static_cast<LaneArgs*>(warp.lanes[l].args);
    if (args.operand < 0 || args.operand > max_operand) {
      cta.current = &warp.lanes[l];
      cta.fail(std::string(name_of(warp.op)) + " with operand " + std::to_string(args.operand),
               warp.site);
    }
    args.result = static_cast<LaneArgs*>(warp.lanes[source_lane(l, args.operand)].args)->value;
  }
}

u32 ballot(const Warp& warp) {
  u32 bits = 0;
  for (i32 l = 0; l < 32; ++l) {
    bits |= static_cast<u32>(static_cast<LaneArgs*>(warp.lanes[l].args)->value != 0) << l;
  }
  return bits;
}

void give_all(Warp& warp, u32 result) {
  for (Lane& lane : warp.lanes) {
    static_cast<LaneArgs*>(lane.args)->result = result;
  }
}

}  // namespace

void compute_warp_op(Cta& cta, Warp& warp) {
  Lane* last_to_arrive = cta.current;
  switch (warp.op) {
    case WarpOp::kMmaF16:
      mma<f16_as_f32>(warp);
      break;
    case WarpOp::kMmaBf16:
      mma<bf16_as_f32>(warp);
      break;
    case WarpOp::kLdmatrixX2:
      ldmatrix(cta, warp, 2, false);
      break;
    case WarpOp::kLdmatrixX4:
      ldmatrix(cta, warp, 4, false);
      break;
    case WarpOp::kLdmatrixX2Trans:
      ldmatrix(cta, warp, 2, true);
      break;
    case WarpOp::kLdmatrixX4Trans:
      ldmatrix(cta, warp, 4, true);
      break;
    case WarpOp::kStmatrixX4:
      stmatrix(cta, warp, false);
      break;
    case WarpOp::kStmatrixX4Trans:
      stmatrix(cta, warp, true);
      break;
    case WarpOp::kShflXor:
      shuffle(cta, warp, 31, [](i32 lane, i32 mask) { return lane ^ mask; });
      break;
    case WarpOp::kShflIdx:
      shuffle(cta, warp, 31, [](i32, i32 source) { return source; });
      break;
    case WarpOp::kShflUp:
      shuffle(cta, warp, 31,
              [](i32 lane, i32 delta) { return lane < delta ? lane : lane - delta; });
      break;
    case WarpOp::kVoteAny:
      give_all(warp, static_cast<u32>(ballot(warp) != 0));
      break;
    case WarpOp::kVoteBallot:
      give_all(warp, ballot(warp));
      break;
    case WarpOp::kWarpSync:
    case WarpOp::kCtaSync:
    case WarpOp::kNamedBarrierSync:
    case WarpOp::kNamedBarrierArrive:
    case WarpOp::kClusterArrive:
    case WarpOp::kClusterWait:
      break;  // machine.cpp
    case WarpOp::kWgmma:
    case WarpOp::kWgmmaFence:
    case WarpOp::kWgmmaCommitGroup:
    case WarpOp::kWgmmaWaitGroup:
      break;  // wgmma.cpp
  }
  cta.current = last_to_arrive;
}

bool is_barrier(WarpOp op) {
  return op == WarpOp::kCtaSync || op == WarpOp::kNamedBarrierSync ||
         op == WarpOp::kNamedBarrierArrive;
}

bool is_wgmma(WarpOp op) {
  return op == WarpOp::kWgmma || op == WarpOp::kWgmmaFence || op == WarpOp::kWgmmaCommitGroup ||
         op == WarpOp::kWgmmaWaitGroup;
}

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::kMmaF16:
      return "mma_m16n8k16_f16";
    case WarpOp::kMmaBf16:
      return "mma_m16n8k16_bf16";
    case WarpOp::kLdmatrixX2:
      return "ldmatrix_x2";
    case WarpOp::kLdmatrixX4:
      return "ldmatrix_x4";
    case WarpOp::kLdmatrixX2Trans:
      return "ldmatrix_x2_trans";
    case WarpOp::kLdmatrixX4Trans:
      return "ldmatrix_x4_trans";
    case WarpOp::kStmatrixX4:
      return "stmatrix_x4";
    case WarpOp::kStmatrixX4Trans:
      return "stmatrix_x4_trans";
    case WarpOp::kShflXor:
      return "shfl_xor";
    case WarpOp::kShflIdx:
      return "shfl_idx";
    case WarpOp::kShflUp:
      return "shfl_up";
    case WarpOp::kVoteAny:
      return "vote_any";
    case WarpOp::kVoteBallot:
      return "vote_ballot";
    case WarpOp::kWarpSync:
      return "warp_sync";
    case WarpOp::kCtaSync:
      return "cta_sync";
    case WarpOp::kNamedBarrierSync:
      return "named_barrier_sync";
    case WarpOp::kNamedBarrierArrive:
      return "named_barrier_arrive";
    case WarpOp::kClusterArrive:
      return "cluster_arrive";
    case WarpOp::kClusterWait:
      return "cluster_wait";
    case WarpOp::kWgmma:
      return "wgmma";
    case WarpOp::kWgmmaFence:
      return "wgmma_fence";
    case WarpOp::kWgmmaCommitGroup:
      return "wgmma_commit_group";
    case WarpOp::kWgmmaWaitGroup:
      return "wgmma_wait_group";
  }
  return "?";
}

}  // namespace flash_sim
