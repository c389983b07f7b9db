#include "emulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

#if defined(__x86_64__)
// Saves the registers that a called function keeps, and takes up the other stack where it did the same.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(.text
.type emulator_switch_stack,@function
emulator_switch_stack:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
.size emulator_switch_stack,.-emulator_switch_stack
)");

static void start_in(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // Tops at different offsets within their pages, or the stacks of a warp would share the sets of the L1 cache.
  const size_t stagger = reinterpret_cast<uintptr_t>(stack) / (bytes + 4096) % 32 * 1088 % 8192;
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes - stagger) & ~uintptr_t{63});
  *--top = nullptr;  // entry's return address; it also aligns the stack as a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  context.stack_pointer = top;
}
static void exchange(Context& from, Context& to) { emulator_switch_stack(&from.stack_pointer, to.stack_pointer); }
#else
static void start_in(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
static void exchange(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
#endif

void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  context.stack = stack;
  context.stack_bytes = bytes;
  start_in(context, stack, bytes, entry);
}

#ifdef __SANITIZE_ADDRESS__
void entered() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }

void prepare_own(Context& context) {
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &context.stack_bytes);
  pthread_attr_destroy(&attributes);
  context.stack = stack;
}

void switch_to(Context& from, Context& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  exchange(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
#else
void entered() {}
void prepare_own(Context&) {}
void switch_to(Context& from, Context& to) { exchange(from, to); }
#endif

Stacks::Stacks(int count) : size_(count * (guard + bytes)) {
  void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; i++) mprotect(memory_ + i * (guard + bytes), guard, PROT_NONE);
}

Stacks::~Stacks() {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory_, size_);  // fibers that were given up leave their frames' marks behind
#endif
  munmap(memory_, size_);
}

}  // namespace emulator
