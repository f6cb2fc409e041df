// See fiber.h. The switch itself is switch.S on x86-64 and aarch64, ucontext elsewhere.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace flash_sim {

#if FLASH_SIM_OWN_SWITCH

extern "C" void flash_sim_switch(void** save, void* load);
extern "C" void flash_sim_start();

void fiber_prepare(Fiber& fiber, char* stack_begin, char* stack_end, void (*entry)()) {
  (void)stack_begin;
  char* top = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(stack_end) & ~uintptr_t{15});
#if defined(__x86_64__)
  // Popped by flash_sim_switch: rbp rbx r12 r13 r14 r15, then the return address.
  constexpr int kSlots = 7;
  void** slots = reinterpret_cast<void**>(top) - kSlots;
  memset(slots, 0, kSlots * sizeof(void*));
  slots[1] = reinterpret_cast<void*>(entry);  // rbx, called by flash_sim_start
  slots[6] = reinterpret_cast<void*>(flash_sim_start);
#else
  // Loaded by flash_sim_switch: x19..x30, then d8..d15.
  constexpr int kSlots = 20;
  void** slots = reinterpret_cast<void**>(top) - kSlots;
  memset(slots, 0, kSlots * sizeof(void*));
  slots[0] = reinterpret_cast<void*>(entry);             // x19, called by flash_sim_start
  slots[11] = reinterpret_cast<void*>(flash_sim_start);  // x30
#endif
  fiber.stack_pointer = slots;
}

void fiber_switch(Fiber& from, Fiber& to) {
  flash_sim_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void fiber_prepare(Fiber& fiber, char* stack_begin, char* stack_end, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_begin;
  fiber.context.uc_stack.ss_size = static_cast<size_t>(stack_end - stack_begin);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void fiber_switch(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

Stacks::~Stacks() {
  if (base_ != nullptr) {
    munmap(base_, count_ * kStackBytes);
  }
}

bool Stacks::reserve(int count) {
  if (count <= count_) {
    return true;
  }
  void* base = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return false;
  }
  if (base_ != nullptr) {
    munmap(base_, count_ * kStackBytes);
  }
  base_ = static_cast<char*>(base);
  count_ = count;
  for (int i = 0; i < count; ++i) {
    mprotect(base_ + i * kStackBytes, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  }
  return true;
}

char* Stacks::begin(int index) const { return base_ + index * kStackBytes; }

}  // namespace flash_sim
