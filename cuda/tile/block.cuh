// What the threads of a block do together.
#pragma once
#include "ptx/ptx.cuh"

namespace moe {
using namespace ptx;

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

}  // namespace moe
