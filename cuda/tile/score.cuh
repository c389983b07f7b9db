// From logits to scores, as fastmoe-core's score.rs defines them.
#pragma once
#include "tile/exact.cuh"

namespace moe {

enum Score : int { SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2 };
enum Order : int { SCORE_TOPK = 0, TOPK_SCORE = 1 };

// cap * tanh(x / cap); the logit itself where cap is 0.
PTX_D float soft_cap(float x, float cap) { return cap == 0.0f ? x : mul_rn(tanh_exact(div_rn(x, cap)), cap); }

// The score of a logit, once the row is known.
struct Scorer {
  int score;
  // Softmax alone: of the row.
  float max, sum;

  PTX_D float operator()(float x) const {
    if (score == SOFTMAX) return div_rn(exp_exact(sub_rn(x, max)), sum);
    if (score == SIGMOID) return div_rn(1.0f, add_rn(1.0f, exp_exact(-x)));
    const float positive = x > 0.0f ? x : 0.0f;
    return sqrt_rn(add_rn(positive, log1p_exact(exp_exact(x > 0.0f ? -x : x))));
  }
};

// The scorer of a row of n logits of which `x(i)` is number i * 32 + lane, -inf past the end.
//
// The exponentials of a softmax are added in 16 lanes, element j to lane j % 16, and the lanes folded in halves.
template <class X> PTX_D Scorer scorer_of(int score, int n, X x) {
  Scorer scorer = {score, -infinity(), 0.0f};
  if (score != SOFTMAX) return scorer;
  for (int i = 0; i * 32 < n; i++) scorer.max = x(i) > scorer.max ? x(i) : scorer.max;
  scorer.max = number(redux_max(order(scorer.max)));
  float sum = 0.0f;
  for (int i = 0; i * 32 < n; i++) {
    const float y = exp_exact(sub_rn(x(i), scorer.max));
    const float upper = shfl_xor(y, 16);  // lanes 0 to 15 hold the sums
    sum = BUG(score_sum_order) ? add_rn(sum, add_rn(y, upper)) : add_rn(add_rn(sum, y), upper);
  }
#pragma unroll
  for (int half = 8; half > 0; half /= 2) sum = add_rn(sum, shfl_xor(sum, half));
  scorer.sum = shfl(sum, 0);
  return scorer;
}

}  // namespace moe
