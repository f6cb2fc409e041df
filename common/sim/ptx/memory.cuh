// Twin of common/ptx/memory.cuh for the simulator: every access is checked.
#pragma once
#include "common/ptx/base.cuh"

DEVICE u16 ld_global_u16(const void* src, SITE) {
  u16 value;
  flash_sim::load_global(&value, src, sizeof value, site);
  return value;
}

DEVICE u32 ld_global_u32(const void* src, SITE) {
  u32 value;
  flash_sim::load_global(&value, src, sizeof value, site);
  return value;
}

DEVICE u64 ld_global_u64(const void* src, SITE) {
  u64 value;
  flash_sim::load_global(&value, src, sizeof value, site);
  return value;
}

DEVICE i32 ld_global_i32(const void* src, SITE) {
  i32 value;
  flash_sim::load_global(&value, src, sizeof value, site);
  return value;
}

DEVICE i64 ld_global_i64(const void* src, SITE) {
  i64 value;
  flash_sim::load_global(&value, src, sizeof value, site);
  return value;
}

DEVICE f32 ld_global_f32(const void* src, SITE) {
  f32 value;
  flash_sim::load_global(&value, src, sizeof value, site);
  return value;
}

DEVICE void ld_global_v4(u32 (&value)[4], const void* src, SITE) {
  flash_sim::load_global(value, src, sizeof value, site);
}

DEVICE void st_global_u16(void* dst, u16 value, SITE) {
  flash_sim::store_global(dst, &value, sizeof value, site);
}

DEVICE void st_global_u32(void* dst, u32 value, SITE) {
  flash_sim::store_global(dst, &value, sizeof value, site);
}

DEVICE void st_global_u64(void* dst, u64 value, SITE) {
  flash_sim::store_global(dst, &value, sizeof value, site);
}

DEVICE void st_global_f32(void* dst, f32 value, SITE) {
  flash_sim::store_global(dst, &value, sizeof value, site);
}

DEVICE void st_global_v4(void* dst, const u32 (&value)[4], SITE) {
  flash_sim::store_global(dst, value, sizeof value, site);
}

DEVICE u16 ld_shared_u16(u32 src, SITE) {
  u16 value;
  flash_sim::load_shared(&value, src, sizeof value, site);
  return value;
}

DEVICE u32 ld_shared_u32(u32 src, SITE) {
  u32 value;
  flash_sim::load_shared(&value, src, sizeof value, site);
  return value;
}

DEVICE u64 ld_shared_u64(u32 src, SITE) {
  u64 value;
  flash_sim::load_shared(&value, src, sizeof value, site);
  return value;
}

DEVICE f32 ld_shared_f32(u32 src, SITE) {
  f32 value;
  flash_sim::load_shared(&value, src, sizeof value, site);
  return value;
}

DEVICE void ld_shared_v4(u32 (&value)[4], u32 src, SITE) {
  flash_sim::load_shared(value, src, sizeof value, site);
}

DEVICE void st_shared_u16(u32 dst, u16 value, SITE) {
  flash_sim::store_shared(dst, &value, sizeof value, site);
}

DEVICE void st_shared_u32(u32 dst, u32 value, SITE) {
  flash_sim::store_shared(dst, &value, sizeof value, site);
}

DEVICE void st_shared_u64(u32 dst, u64 value, SITE) {
  flash_sim::store_shared(dst, &value, sizeof value, site);
}

DEVICE void st_shared_f32(u32 dst, f32 value, SITE) {
  flash_sim::store_shared(dst, &value, sizeof value, site);
}

DEVICE void st_shared_v4(u32 dst, const u32 (&value)[4], SITE) {
  flash_sim::store_shared(dst, value, sizeof value, site);
}

DEVICE void red_global_add_f32(f32* dst, f32 value, SITE) {
  flash_sim::add_global_f32(dst, value, site);
}

DEVICE void red_global_add_v4_f32(f32* dst, const f32 (&value)[4], SITE) {
  flash_sim::add_global_v4_f32(dst, value, site);
}

DEVICE u32 ld_acquire_global_u32(const void* src, SITE) {
  return flash_sim::load_acquire_global_u32(src, site);
}

DEVICE u64 ld_acquire_global_u64(const void* src, SITE) {
  return flash_sim::load_acquire_global_u64(src, site);
}

DEVICE void st_release_global_u32(u32* dst, u32 value, SITE) {
  flash_sim::store_release_global_u32(dst, value, site);
}

DEVICE void red_release_global_add_u32(u32* dst, u32 value, SITE) {
  flash_sim::add_release_global_u32(dst, value, site);
}

DEVICE void fence_acq_rel_gpu() { flash_sim::fence_acq_rel_gpu(); }

DEVICE void nanosleep(u32 nanoseconds, SITE) { flash_sim::nanosleep(site); }

DEVICE u64 atomic_add_global_u64(u64* dst, u64 value, SITE) {
  return flash_sim::add_global_u64(dst, value, site);
}

DEVICE u64 atomic_add_acq_rel_global_u64(u64* dst, u64 value, SITE) {
  return flash_sim::add_global_u64(dst, value, site);
}

DEVICE u32 atomic_add_global_u32(u32* dst, u32 value, SITE) {
  return flash_sim::add_global_u32(dst, value, site);
}
