// Launches of grouped products, those of warpgroups with their tensor maps and with blocks in pairs.
#pragma once
#include "emulator/launch.h"
#include "tests/products.h"
#include "tile/tensor_boxes.cuh"

namespace test {

// Boxes of 64 elements and as many rows, of matrices side by side in memory.
template <class T> ptx::TensorMap map_of(const Buffer<T>& tensor, uint64_t width, uint64_t height, uint64_t depth, uint32_t box_height = 64) {
  if (width * height * depth == 0) return {};
  return emulator::make_tensor_map(tensor.values().data(), sizeof(T), width, height, depth, width * sizeof(T), width * height * sizeof(T), 64, box_height, true);
}
// Of results [R, width], or of one half of their columns, by a warp's 16 rows.
template <class T> ptx::TensorMap map_of_results(const Buffer<T>& tensor, uint64_t width, uint64_t rows) { return map_of(tensor, width, rows, 1, 16); }
template <class T> ptx::TensorMap map_of_half(const Buffer<T>& tensor, uint64_t width, uint64_t rows, int half) {
  if (width * rows == 0) return {};
  const uint64_t row_bytes = width * sizeof(T);
  return emulator::make_tensor_map(tensor.values().data() + half * width / 2, sizeof(T), width / 2, rows, 1, row_bytes, rows * row_bytes, 64, 16, true);
}
// The same for hidden states, of which gate and up columns may be halves.
template <class T> void map_hidden(ptx::TensorMap* maps, const Buffer<T>& hidden, uint64_t width, uint64_t rows, bool halves) {
  for (int half = 0; half < 1 + halves; half++) maps[half] = halves ? map_of_half(hidden, width, rows, half) : map_of_results(hidden, width, rows);
}
// Weights [E, N, K], transposed [E, K, N].
template <class T> ptx::TensorMap map_of_weights(const Buffer<T>& w, int n, int k, int experts, bool transposed) {
  return transposed ? map_of(w, n, k, experts) : map_of(w, k, n, experts, 128);
}

// `maps` gives the tensor maps.
template <class Params, class Maps> void launch_product(const Entry& entry, const Params& params, Maps maps) {
  if (!entry.warpgroups()) return launch(entry.name.c_str(), uniform(1, 3), params);
  tile::Mapped<Params> mapped{};
  mapped.params = params;
  maps(mapped);
  launch(entry.name.c_str(), 2 * uniform(1, 3), mapped);
}

}  // namespace test
