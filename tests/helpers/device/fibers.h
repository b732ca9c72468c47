// Fibers: a function with a stack of its own, which runs until it switches to another one.
#pragma once
#include <cstddef>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

// A switch saves registers only, where this is known; ucontext would make a system call each time.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, size_t size, void (*entry)()) {
    void** top = (void**)(stack + size - 64);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = (void*)entry;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) {
    emulator_switch(&from.stack_pointer, to.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

constexpr size_t kStack = 64 << 10;
inline char* stack_of(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i)
    stacks.push_back(
        (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  return stacks[i];
}

}  // namespace emulator
