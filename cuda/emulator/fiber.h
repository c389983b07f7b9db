// Stacks that take turns on one operating system thread.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
  const void* stack = nullptr;  // lowest address; these three are for AddressSanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Makes `context` start in `entry` on a stack; `entry` calls entered() first and never returns.
void prepare(Context& context, char* stack, size_t bytes, void (*entry)());
void entered();
// The context of the stack that the operating system gave this thread.
void prepare_own(Context& context);
void switch_to(Context& from, Context& to);

// Stacks for `count` fibers, each above a page that may not be touched.
class Stacks {
 public:
  static constexpr size_t bytes = 128 * 1024;
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  char* operator[](int i) const { return memory_ + i * (guard + bytes) + guard; }

 private:
  static constexpr size_t guard = 4096;
  char* memory_;
  size_t size_;
};

}  // namespace emulator
