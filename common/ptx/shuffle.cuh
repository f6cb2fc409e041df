// Exchange of registers and predicates inside a warp. All 32 lanes take part; none of these orders
// memory. Written with the compiler's intrinsics, which are one instruction each: unlike asm text
// they tell the compiler that the operation is convergent and has no other effect.
#pragma once
#include "common/ptx/base.cuh"

// Value of lane (own lane ^ lane_mask). PTX: shfl.sync.bfly.b32.
DEVICE f32 shfl_xor_f32(f32 value, i32 lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Value of lane (own lane ^ lane_mask). PTX: shfl.sync.bfly.b32.
DEVICE u32 shfl_xor_u32(u32 value, i32 lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Value of lane src_lane, 0..31. PTX: shfl.sync.idx.b32.
DEVICE u32 shfl_idx_u32(u32 value, i32 src_lane) {
  return __shfl_sync(0xffffffffu, value, src_lane);
}

// Value of lane (own lane - delta), the own value where that is below 0. PTX: shfl.sync.up.b32.
DEVICE u32 shfl_up_u32(u32 value, i32 delta) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<u32>(delta));
}

// Whether the predicate holds in any lane. PTX: vote.sync.any.pred.
DEVICE bool vote_any(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }

// Bit i is the predicate of lane i. PTX: vote.sync.ballot.b32.
DEVICE u32 vote_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
