// void flash_sim_switch(void** save, void* load): pushes the callee-saved registers, stores the stack pointer in *save,
// takes `load` as the new one and pops what fiber_switch or fiber_prepare left there.
// flash_sim_start: first code of a fiber, calls the entry that fiber_prepare put in a callee-saved register.
// The floating-point control words are left alone: all fibers share them.
#if defined(__ELF__) && defined(__x86_64__)

  .text
  .globl flash_sim_switch
  .hidden flash_sim_switch
  .type flash_sim_switch, @function
flash_sim_switch:
  pushq %r15
  pushq %r14
  pushq %r13
  pushq %r12
  pushq %rbx
  pushq %rbp
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %rbp
  popq %rbx
  popq %r12
  popq %r13
  popq %r14
  popq %r15
  ret
  .size flash_sim_switch, . - flash_sim_switch

  .globl flash_sim_start
  .hidden flash_sim_start
  .type flash_sim_start, @function
flash_sim_start:
  callq *%rbx
  ud2
  .size flash_sim_start, . - flash_sim_start

#elif defined(__ELF__) && defined(__aarch64__)

  .text
  .globl flash_sim_switch
  .hidden flash_sim_switch
  .type flash_sim_switch, %function
flash_sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size flash_sim_switch, . - flash_sim_switch

  .globl flash_sim_start
  .hidden flash_sim_start
  .type flash_sim_start, %function
flash_sim_start:
  blr x19
  brk #0
  .size flash_sim_start, . - flash_sim_start

#endif
#if defined(__ELF__)
  .section .note.GNU-stack, "", %progbits
#endif
