// The kernels of this program by name, and running them.
//
// A language-neutral face of the same is in api.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Kernel {
  const char* name;
  int threads;
  uint32_t shared_bytes;
  int cluster;  // blocks
  size_t params_bytes;
  void (*body)(const void* params);
  // Adds itself to the table.
  Kernel(const char* name, int threads, uint32_t shared_bytes, int cluster, size_t params_bytes, void (*body)(const void*));
};

const Kernel& kernel(const std::string& name);  // throws Failure
std::vector<const Kernel*> kernels();

// Runs every block to its end. Throws Failure with what the kernel did wrong.
void launch(const std::string& name, int64_t blocks, const void* params, size_t params_bytes);

}  // namespace emulator
