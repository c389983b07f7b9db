// fastmoe-core, called live: oracle/src/lib.rs.
#pragma once
#include <cstdint>

namespace oracle {

struct Route {
  int32_t tokens, experts, top_k;
  int32_t score, order, renormalize;
  float eps, scale, softcap;
  int32_t n_group, topk_group, group_score, group_losers;
  const float *logits, *bias, *expert_scale;  // the last two may be null
  int64_t* ids;
  float *weights, *scores;
};

struct Plan {
  int32_t tokens, experts, top_k;
  int32_t capacity, pad, drop_by_score;  // a negative capacity is none
  const int64_t* ids;
  const float* weights;  // may be null
  int32_t *counts, *offsets, *gather, *inverse;
  float* sorted_weights;  // may be null
};

extern "C" void oracle_route(const Route&);
// The first t * K + k whose id is out of range, or -1.
extern "C" int32_t oracle_plan(const Plan&);

}  // namespace oracle
