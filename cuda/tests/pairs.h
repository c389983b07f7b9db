// Launches of grouped products, those of warpgroups with their tensor maps and with blocks in pairs.
#pragma once
#include "emulator/launch.h"
#include "tests/products.h"
#include "tile/tensor_boxes.cuh"

namespace test {

// Boxes of 64 elements and as many rows, of matrices side by side.
template <class T> ptx::TensorMap map_of(const Buffer<T>& tensor, uint64_t width, uint64_t height, uint64_t depth, uint32_t box_height = 64) {
  if (width * height * depth == 0) return {};
  return emulator::make_tensor_map(tensor.values().data(), sizeof(T), width, height, depth, width * sizeof(T), width * height * sizeof(T), 64, box_height, true);
}
// Weights [E, N, K], transposed [E, K, N].
template <class T> ptx::TensorMap map_of_weights(const Buffer<T>& w, int n, int k, int experts, bool transposed) {
  return transposed ? map_of(w, n, k, experts) : map_of(w, k, n, experts, 128);
}

// `maps` gives the tensor maps of a and b.
template <class Params, class Maps> void launch_product(const Entry& entry, const Params& params, Maps maps) {
  if (!entry.warpgroups()) return launch(entry.name.c_str(), uniform(1, 3), params);
  tile::Mapped<Params> mapped{{}, {}, params};
  maps(mapped.a, mapped.b);
  launch(entry.name.c_str(), 2 * uniform(1, 3), mapped);
}

}  // namespace test
