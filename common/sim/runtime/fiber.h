// Fibers: one per CUDA thread, switched by hand, all on the OS thread that runs their CTA.
#pragma once
#include <cstddef>

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))
#define FLASH_SIM_OWN_SWITCH 1  // switch.S
#else
#define FLASH_SIM_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace flash_sim {

#if FLASH_SIM_OWN_SWITCH
struct Fiber {
  void* stack_pointer = nullptr;  // the callee-saved registers lie on the stack
};
#else
struct Fiber {
  ucontext_t context;
};
#endif

// Makes `fiber` start in entry() (which must not return) on the stack that ends at stack_end.
void fiber_prepare(Fiber& fiber, char* stack_begin, char* stack_end, void (*entry)());

// Saves the running fiber in `from` and continues `to`.
void fiber_switch(Fiber& from, Fiber& to);

// `count` stacks in one mapping, each with a guard page below: running over the end crashes instead
// of corrupting a neighbour. Pages are only backed once touched.
class Stacks {
 public:
  static constexpr size_t kStackBytes = 512 * 1024;
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();
  bool reserve(int count);  // false: the system has no memory for them
  char* begin(int index) const;
  // Not the same offset in every stack: the hot ends of 256 stacks a power of two apart would share
  // few cache sets.
  char* end(int index) const { return begin(index) + kStackBytes - 64 - (index % 64) * 1088; }

 private:
  char* base_ = nullptr;
  int count_ = 0;
};

}  // namespace flash_sim
