// What a kernel did wrong: who, where, and what.
#pragma once
#include <source_location>
#include <stdexcept>

namespace emulator {

using Where = std::source_location;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch: launch() throws a Failure that names kernel, file, line, block, warp and lane.
[[noreturn]] void fail(const Where& where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// "up.cu:123", the directory left out.
std::string short_place(const Where& where);

}  // namespace emulator
