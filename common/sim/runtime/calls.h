// What the wrapper twins in common/sim/ptx/ call: the simulator's side of every instruction.
// Compiled into each kernel's shared object, so it stays small; the runtime behind it (the .cpp
// files of this folder) is compiled once. Each call takes the place in the kernel's source that
// asked for it.
#pragma once
#include <source_location>

using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
using u16 = unsigned short;
using u8 = unsigned char;
using f32 = float;

// Last parameter of a twin: where the kernel called it. No part of the wrapper's signature.
#define SITE flash_sim::Site site = flash_sim::Site::current()

#pragma GCC visibility push(default)
namespace flash_sim {

using Site = std::source_location;

constexpr u32 kSmemBase = 1024;  // as on the GPU: not 0, so that a forgotten smem_base() shows

i32 thread_idx();
i32 block_idx();
i32 grid_dim();

void load_global(void* value, const void* src, u32 bytes, Site site);
void store_global(void* dst, const void* value, u32 bytes, Site site);
void add_global_f32(f32* dst, f32 value, Site site);
void add_global_v4_f32(f32* dst, const f32 (&value)[4], Site site);
u32 add_global_u32(u32* dst, u32 value, Site site);
u64 add_global_u64(u64* dst, u64 value, Site site);
u32 load_acquire_global_u32(const void* src, Site site);
u64 load_acquire_global_u64(const void* src, Site site);
void store_release_global_u32(u32* dst, u32 value, Site site);
void add_release_global_u32(u32* dst, u32 value, Site site);
void fence_acq_rel_gpu();
// Sleeps until what this thread's last acquiring load has read is another value.
void nanosleep(Site site);
void load_shared(void* value, u32 src, u32 bytes, Site site);
void store_shared(u32 dst, const void* value, u32 bytes, Site site);

// Asynchronous copies: the data arrives when the thread waits for its group, and not before.
void cp_async(u32 dst, const void* src, u32 bytes, i32 valid_bytes, Site site);
void cp_async_commit_group();
void cp_async_wait_group(i32 pending);

// Operations of a whole warp. Each lane hands over its arguments and sleeps; the last one to come
// computes for all.
enum class WarpOp : u8 {
  kMmaF16,
  kMmaBf16,
  kLdmatrixX2,
  kLdmatrixX4,
  kLdmatrixX2Trans,
  kLdmatrixX4Trans,
  kStmatrixX4,
  kStmatrixX4Trans,
  kShflXor,
  kShflIdx,
  kShflUp,
  kVoteAny,
  kVoteBallot,
  kWarpSync,
  kCtaSync,
  kNamedBarrierSync,
  kNamedBarrierArrive,
  kClusterArrive,
  kClusterWait,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommitGroup,
  kWgmmaWaitGroup,
};

struct MmaArgs {
  f32* d;
  const u32* a;
  u32 b[2];
};

struct LdmatrixArgs {
  u32* r[4];
  u32 addr;
};

struct LaneArgs {   // shuffles, votes and barriers
  u32 value;        // the register, the predicate or the barrier's id
  i32 operand = 0;  // lane mask, source lane, delta or the barrier's number of threads
  u32 result = 0;
};

void warp_op(WarpOp op, void* args, Site site);

}  // namespace flash_sim
#pragma GCC visibility pop
