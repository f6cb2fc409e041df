// Twin of common/ptx/shuffle.cuh for the simulator.
#pragma once
#include "common/ptx/base.cuh"

DEVICE u32 shfl_xor_u32(u32 value, i32 lane_mask, SITE) {
  flash_sim::LaneArgs args{value, lane_mask};
  flash_sim::warp_op(flash_sim::WarpOp::kShflXor, &args, site);
  return args.result;
}

DEVICE f32 shfl_xor_f32(f32 value, i32 lane_mask, SITE) {
  return bits_as_f32(shfl_xor_u32(f32_as_bits(value), lane_mask, site));
}

DEVICE u32 shfl_idx_u32(u32 value, i32 src_lane, SITE) {
  flash_sim::LaneArgs args{value, src_lane};
  flash_sim::warp_op(flash_sim::WarpOp::kShflIdx, &args, site);
  return args.result;
}

DEVICE u32 shfl_up_u32(u32 value, i32 delta, SITE) {
  flash_sim::LaneArgs args{value, delta};
  flash_sim::warp_op(flash_sim::WarpOp::kShflUp, &args, site);
  return args.result;
}

DEVICE bool vote_any(bool predicate, SITE) {
  flash_sim::LaneArgs args{predicate};
  flash_sim::warp_op(flash_sim::WarpOp::kVoteAny, &args, site);
  return args.result != 0;
}

DEVICE u32 vote_ballot(bool predicate, SITE) {
  flash_sim::LaneArgs args{predicate};
  flash_sim::warp_op(flash_sim::WarpOp::kVoteBallot, &args, site);
  return args.result;
}
