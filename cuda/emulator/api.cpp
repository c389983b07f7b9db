#include "emulator/api.h"

#include <exception>
#include <string>
#include <vector>

#include "emulator/launch.h"
#include "emulator/memory.h"
#include "emulator/settings.h"
#include "emulator/tma.h"

namespace {

template <class Body> const char* message(Body&& body) {
  static thread_local std::string text;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}

}  // namespace

const char* emulator_launch(const char* kernel, int64_t blocks, const void* params, size_t params_bytes) {
  return message([&] { emulator::launch(kernel, blocks, params, params_bytes); });
}

const char* emulator_kernel(const char* kernel, uint32_t* threads, uint32_t* shared_bytes, size_t* params_bytes) {
  return message([&] {
    const emulator::Kernel& k = emulator::kernel(kernel);
    *threads = static_cast<uint32_t>(k.threads);
    *shared_bytes = k.shared_bytes;
    *params_bytes = k.params_bytes;
  });
}

const char* emulator_kernel_name(size_t index) {
  static const std::vector<const emulator::Kernel*> all = emulator::kernels();
  return index < all.size() ? all[index]->name : nullptr;
}

void emulator_add_range(const void* base, size_t bytes, const char* name, EmulatorUse use) {
  emulator::add_range(base, bytes, name, static_cast<emulator::Use>(use));
}
void emulator_remove_range(const void* base) { emulator::remove_range(base); }

const char* emulator_tensor_map(void* map, const void* base, uint32_t element_bytes, uint64_t width, uint64_t height, uint64_t depth,
                                uint64_t row_bytes, uint64_t matrix_bytes, uint32_t box_width, uint32_t box_height, int swizzle128) {
  return message([&] {
    if (reinterpret_cast<uintptr_t>(map) % alignof(emulator::TensorMap)) throw emulator::Failure("tensor map: it must be aligned to 64 bytes");
    *static_cast<emulator::TensorMap*>(map) = emulator::make_tensor_map(base, element_bytes, width, height, depth, row_bytes, matrix_bytes,
                                                                        box_width, box_height, swizzle128);
  });
}

void emulator_set_schedule(EmulatorCompletion completion, int shuffle, uint64_t seed, int check_races, int workers) {
  emulator::settings = {static_cast<emulator::Completion>(completion), shuffle != 0, seed, check_races != 0, workers};
}
