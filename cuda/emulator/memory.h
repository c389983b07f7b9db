// Global memory: the ranges that a kernel may touch, and what it may do there.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "emulator/failure.h"

namespace emulator {

enum class Use : int {
  read_only,
  write_once,  // an output: a launch writes each byte at most once, and reads none before
  read_write
};

// While any range is registered, an access outside of all of them fails.
void add_range(const void* base, size_t bytes, const char* name, Use use);
void remove_range(const void* base);
// Bytes of the range that starts at `base` which the last launch has not written.
size_t unwritten(const void* base);
void start_ranges();  // a launch begins

// Each returns if the access is allowed. `bytes` is a power of two and the address has to be a multiple of it.
void check_load(const void* from, size_t bytes, const char* what, const Where& where);
// Through the read-only cache: memory that this kernel also writes is an error.
void check_load_readonly(const void* from, size_t bytes, const char* what, const Where& where);
void check_store(const void* to, size_t bytes, const char* what, const Where& where);
void check_atomic(const void* at, size_t bytes, const char* what, const Where& where);

}  // namespace emulator
