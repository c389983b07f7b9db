// What the threads of a block do together.
#pragma once
#include "tile/rows.cuh"

namespace moe {
struct Scan {
  int before;  // sum of the values of all threads before this one
  int total;
};

// Takes all threads; `scratch` holds a word per warp, and may be used again at once.
PTX_D Scan scan_block(int value, Shared scratch) {
  const int lane = thread_id() % 32, warp = thread_id() / 32;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int left = shfl_up(sum, distance);
    if (lane >= distance) sum += left;
  }
  if (lane == 31) store_shared(scratch + warp * 4, sum);
  sync_block();
  Scan scan = {sum - value, 0};
  for (int w = 0; w < block_threads() / 32; w++) {
    const int of_warp = load_shared<int>(scratch + w * 4);
    if (w < warp) scan.before += of_warp;
    scan.total += of_warp;
  }
  if (!BUG(scan_block_reuse)) sync_block();
  return scan;
}

// The sum over all threads, in a fixed order. As scan_block.
PTX_D float sum_of_block(float value, Shared scratch) {
  const float of_my_warp = sum_of_lanes(value);
  if (thread_id() % 32 == 0) store_shared(scratch + thread_id() / 32 * 4, of_my_warp);
  sync_block();
  float sum = 0.0f;
  for (int w = 0; w < block_threads() / 32; w++) sum = add_rn(sum, load_shared<float>(scratch + w * 4));
  sync_block();
  return sum;
}

}  // namespace moe
