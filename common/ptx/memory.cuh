// Loads, stores and atomics on global and shared memory. The only way in which kernels touch
// memory, so that the simulator can check each access. Addresses are aligned to the size of the
// access.
//   global: a pointer into a tensor.  shared: a 32-bit shared address, see smem_base().
// Volatile: issued in program order and never merged, so keep what you have loaded.
#pragma once
#include "common/ptx/base.cuh"

// PTX: ld.global.u16.
DEVICE u16 ld_global_u16(const void* src) {
  u16 value;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(src) : "memory");
  return value;
}

// PTX: ld.global.u32.
DEVICE u32 ld_global_u32(const void* src) {
  u32 value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(src) : "memory");
  return value;
}

// PTX: ld.global.u64.
DEVICE u64 ld_global_u64(const void* src) {
  u64 value;
  asm volatile("ld.global.u64 %0, [%1];" : "=l"(value) : "l"(src) : "memory");
  return value;
}

// PTX: ld.global.s32.
DEVICE i32 ld_global_i32(const void* src) {
  i32 value;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(src) : "memory");
  return value;
}

// PTX: ld.global.s64.
DEVICE i64 ld_global_i64(const void* src) {
  i64 value;
  asm volatile("ld.global.s64 %0, [%1];" : "=l"(value) : "l"(src) : "memory");
  return value;
}

// PTX: ld.global.f32.
DEVICE f32 ld_global_f32(const void* src) {
  f32 value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(src) : "memory");
  return value;
}

// Loads 16 bytes. PTX: ld.global.v4.u32.
DEVICE void ld_global_v4(u32 (&value)[4], const void* src) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "l"(src)
               : "memory");
}

// PTX: st.global.u16.
DEVICE void st_global_u16(void* dst, u16 value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(dst), "h"(value) : "memory");
}

// PTX: st.global.u32.
DEVICE void st_global_u32(void* dst, u32 value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(dst), "r"(value) : "memory");
}

// PTX: st.global.u64.
DEVICE void st_global_u64(void* dst, u64 value) {
  asm volatile("st.global.u64 [%0], %1;" ::"l"(dst), "l"(value) : "memory");
}

// PTX: st.global.f32.
DEVICE void st_global_f32(void* dst, f32 value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(dst), "f"(value) : "memory");
}

// Stores 16 bytes. PTX: st.global.v4.u32.
DEVICE void st_global_v4(void* dst, const u32 (&value)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "r"(value[0]), "r"(value[1]),
               "r"(value[2]), "r"(value[3])
               : "memory");
}

// PTX: ld.shared.u16.
DEVICE u16 ld_shared_u16(u32 src) {
  u16 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(src) : "memory");
  return value;
}

// PTX: ld.shared.u32.
DEVICE u32 ld_shared_u32(u32 src) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(src) : "memory");
  return value;
}

// PTX: ld.shared.u64.
DEVICE u64 ld_shared_u64(u32 src) {
  u64 value;
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(src) : "memory");
  return value;
}

// PTX: ld.shared.f32.
DEVICE f32 ld_shared_f32(u32 src) {
  f32 value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(src) : "memory");
  return value;
}

// Loads 16 bytes. PTX: ld.shared.v4.u32.
DEVICE void ld_shared_v4(u32 (&value)[4], u32 src) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(src)
               : "memory");
}

// PTX: st.shared.u16.
DEVICE void st_shared_u16(u32 dst, u16 value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(dst), "h"(value) : "memory");
}

// PTX: st.shared.u32.
DEVICE void st_shared_u32(u32 dst, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(value) : "memory");
}

// PTX: st.shared.u64.
DEVICE void st_shared_u64(u32 dst, u64 value) {
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(dst), "l"(value) : "memory");
}

// PTX: st.shared.f32.
DEVICE void st_shared_f32(u32 dst, f32 value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(dst), "f"(value) : "memory");
}

// Stores 16 bytes. PTX: st.shared.v4.u32.
DEVICE void st_shared_v4(u32 dst, const u32 (&value)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(value[0]), "r"(value[1]),
               "r"(value[2]), "r"(value[3])
               : "memory");
}

// Adds without returning the old value; the order of additions is open. PTX: red.global.add.f32.
DEVICE void red_global_add_f32(f32* dst, f32 value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(dst), "f"(value) : "memory");
}

// Adds to four neighbours, each atomically, as above. PTX: red.global.add.v4.f32 (sm_90+).
DEVICE void red_global_add_v4_f32(f32* dst, const f32 (&value)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "f"(value[0]),
               "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
}

// Loads what another CTA has stored with release. PTX: ld.acquire.gpu.global.u32.
DEVICE u32 ld_acquire_global_u32(const void* src) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(src) : "memory");
  return value;
}

// Loads what another CTA has stored with release. PTX: ld.acquire.gpu.global.u64.
DEVICE u64 ld_acquire_global_u64(const void* src) {
  u64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(src) : "memory");
  return value;
}

// Stores. What the CTA stored before a barrier ahead of this is seen by a thread that reads the
// value with acquire and then passes a barrier. PTX: st.release.gpu.global.u32.
DEVICE void st_release_global_u32(u32* dst, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(dst), "r"(value) : "memory");
}

// Adds without returning the old value; releases as above. PTX: red.release.gpu.global.add.u32.
DEVICE void red_release_global_add_u32(u32* dst, u32 value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(dst), "r"(value) : "memory");
}

// Orders this thread's accesses to memory before it against those after it, for all threads of the
// GPU that synchronise with it. PTX: fence.acq_rel.gpu.
DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Sleeps for some time, up to twice this long or not at all. In loops that wait for a change of
// global memory, and only there, behind their acquiring load: the simulator's fiber sleeps until
// what that has read changes. PTX: nanosleep.u32.
DEVICE void nanosleep(u32 nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory");
}

// Adds and returns the old value. PTX: atom.global.add.u64.
DEVICE u64 atomic_add_global_u64(u64* dst, u64 value) {
  u64 old;
  asm volatile("atom.global.add.u64 %0, [%1], %2;" : "=l"(old) : "l"(dst), "l"(value) : "memory");
  return old;
}

// The same. What the CTA stored before a barrier ahead of this is seen by a thread that reads the
// sum, or a later one, with acquire and then passes a barrier. PTX:
// atom.acq_rel.gpu.global.add.u64.
DEVICE u64 atomic_add_acq_rel_global_u64(u64* dst, u64 value) {
  u64 old;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(dst), "l"(value)
               : "memory");
  return old;
}

// Adds and returns the old value. PTX: atom.global.add.u32.
DEVICE u32 atomic_add_global_u32(u32* dst, u32 value) {
  u32 old;
  asm volatile("atom.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(dst), "r"(value) : "memory");
  return old;
}
