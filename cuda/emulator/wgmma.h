// Products by a warpgroup from shared memory: issued, then done before wait_products() returns.
#pragma once
#include <cstdint>
#include <vector>

#include "emulator/failure.h"

namespace emulator {

struct Cluster;

enum class Format { bf16, f16 };

struct Product {
  uint64_t a, b;            // descriptors
  int columns;
  Format format;
  bool a_transposed, b_transposed, accumulate;
  int group;
  uint32_t stamp;
  Where where;
  uint32_t lanes = 0;       // which have issued it
  float* registers[32] = {};
};

// Of one thread.
struct ProductIssue {
  uint32_t issued = 0;      // how many
  int group = 0;
  bool fenced = false;
};

// Of one warp: its quarter of the warpgroup's work.
struct ProductQueue {
  std::vector<Product> products;
  uint32_t done = 0;        // how many have left the queue
  std::vector<uint32_t> group_stamps;  // of the last product of each group
  uint64_t hash = 0;        // of all that was issued
};

void issue_product(const Product& product, float* registers);
void wait_products(int newest_left, const Where& where);

// B of a product as fp32 [16][columns], kept for the other warps of the group.
struct Panel {
  uint64_t descriptor = 0, version = 0;
  int columns = 0;
  Format format = Format::bf16;
  bool transposed = false;
  alignas(32) float values[16 * 256];
};

// The warps of each warpgroup have issued the same products; throws Failure where not.
void check_warpgroups(const Cluster& cluster);

}  // namespace emulator
