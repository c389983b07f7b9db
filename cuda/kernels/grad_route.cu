// Through the router backwards: from the gradients of the weights [T, K] and of the scores [T, E] to those of the logits
// and of the scale that each expert has.
//
// T tokens, E experts, K experts per token, R = T*K. A warp takes a token. The choice of experts has no gradient.
#include "tile/rows.cuh"
#include "tile/score.cuh"

namespace moe {

template <class T> struct GradRouteParams {
  Global<const T> logits;            // [T, E]
  Global<const int64_t> ids;         // [T, K]; one that is no expert adds nothing
  Global<const float> scores;        // [T, E]
  Global<const float> expert_scale;  // [E]; may be null
  Global<const float> grad_weights;  // [T, K]; may be null
  Global<const float> grad_scores;   // [T, E]; may be null
  Global<T> grad_logits;             // [T, E]
  Global<float> by_choice;           // [T, K] what each adds to the gradient of its expert's scale; may be null
  int tokens, experts, top_k;        // T, E, K
  // As in RouteParams.
  int score, order, renormalize;
  float eps, scale, softcap;
};

// One of the K choices of a token.
struct Choice {
  int expert;
  float score;  // its weight before it was renormalised and scaled
  float grad;   // of that score
};

template <class T> struct TokenGrad {
  const GradRouteParams<T>& p;
  const int64_t token;

  PTX_D float logit(int64_t expert) const {
    return soft_cap(to_float(load_readonly(p.logits + (token * p.experts + expert))), p.softcap);
  }
  PTX_D bool softmax_of_chosen() const { return p.order == TOPK_SCORE && p.score == SOFTMAX; }

  // Whether a score of its own has a gradient; where none has, scores that are NaN do not spread.
  PTX_D bool reaches_scores() const { return p.grad_scores || (p.grad_weights && !softmax_of_chosen()); }

  // The expert of choice i * 32 + lane; -1 where there is none.
  PTX_D int expert_of(int i) const {
    const int k = i * 32 + lane();
    const int64_t id = k < p.top_k ? load_readonly(p.ids + (token * p.top_k + k)) : -1;
    return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
  }

  // Choice i * 32 + lane; one of expert -1, and zeros, where there is none.
  PTX_D Choice choice(int i, const Scorer& of_chosen) const {
    const int expert = expert_of(i);
    if (expert < 0 || !p.grad_weights) return {-1, 0.0f, 0.0f};
    const int64_t slot = token * p.top_k + i * 32 + lane();
    float grad = load_readonly(p.grad_weights + slot) * p.scale;
    if (p.expert_scale) grad *= load_readonly(p.expert_scale + expert);
    const float score =
        softmax_of_chosen() ? of_chosen(logit(expert)) : load_readonly(p.scores + (token * p.experts + expert));
    return {expert, score, grad};
  }

  // The sum of `term` over the K choices.
  template <class Term> PTX_D float sum_of_choices(Term term) const {
    float sum = 0.0f;
    for (int i = 0; i * 32 < p.top_k; i++) sum += term(i);
    return sum_of_lanes(sum);
  }

  PTX_D void run() const {
    const auto chosen_logit = [&](int i) {
      const int expert = expert_of(i);
      return expert < 0 ? -infinity() : logit(expert);
    };
    const Scorer of_chosen = softmax_of_chosen() ? scorer_of(SOFTMAX, p.top_k, chosen_logit) : Scorer{};
    const auto before = [&](int i) { return choice(i, of_chosen); };
    float total = 1.0f, dot = 0.0f;
    if (p.renormalize && p.grad_weights) {
      total = sum_of_choices([&](int i) { return before(i).score; }) + p.eps;
      dot = sum_of_choices([&](int i) { const Choice c = before(i); return c.grad * c.score; }) / total;
    }
    if (p.by_choice) write_by_choice(before, total);
    const auto renormalized = [&](int i) {
      Choice c = before(i);
      c.grad = (c.grad - dot) / total;
      return c;
    };
    const float inner = sum_of_choices([&](int i) { const Choice c = renormalized(i); return c.grad * c.score; });
    if (softmax_of_chosen())  // its gradient is one of logits already
      write(dense_inner(0.0f), [&](int i) { Choice c = renormalized(i); c.grad = c.score * (c.grad - inner); return c; });
    else
      write(dense_inner(inner), renormalized);
  }

  template <class Choices> PTX_D void write_by_choice(Choices choices, float total) const {
    for (int i = 0; i * 32 + lane() < p.top_k; i++) {
      const int64_t slot = token * p.top_k + i * 32 + lane();
      const float grad = p.grad_weights ? load_readonly(p.grad_weights + slot) * p.scale : 0.0f;
      store(p.by_choice + slot, grad * (choices(i).score / total));
    }
  }

  // <grad_scores, scores> and what is added.
  PTX_D float dense_inner(float more) const {
    float sum = 0.0f;
    for (int expert = lane(); p.grad_scores && expert < p.experts; expert += 32) {
      const int64_t at = token * p.experts + expert;
      sum += load_readonly(p.grad_scores + at) * load_readonly(p.scores + at);
    }
    return sum_of_lanes(sum) + more;
  }

  // Expert by expert, with what its choice adds.
  template <class Choices> PTX_D void write(float inner, Choices choices) const {
    const Choice first = choices(0);
    for (int i = 0; i * 32 < p.experts; i++) {
      const int expert = i * 32 + lane();
      float of_choice = 0.0f;
      for (int c = 0; c * 32 < p.top_k; c++) {
        const Choice mine = c == 0 || BUG(grad_route_first_choices) ? first : choices(c);
        for (int k = 0; k < 32 && c * 32 + k < p.top_k; k++) {
          const float grad = shfl(mine.grad, k);
          if (shfl(mine.expert, k) == expert) of_choice += grad;
        }
      }
      if (expert >= p.experts) continue;
      const int64_t at = token * p.experts + expert;
      float grad = p.grad_scores ? load_readonly(p.grad_scores + at) : 0.0f;
      if (!softmax_of_chosen()) grad += of_choice;
      if (reaches_scores()) grad = through_score(grad, load_readonly(p.scores + at), expert, inner);
      if (softmax_of_chosen()) grad += of_choice;
      if (p.softcap != 0.0f) {
        const float capped = tanh_exact(div_rn(to_float(load_readonly(p.logits + at)), p.softcap));
        grad *= 1.0f - capped * capped;
      }
      store(p.grad_logits + at, from_float<T>(grad));
    }
  }

  PTX_D float through_score(float grad, float score, int expert, float inner) const {
    if (p.score == SOFTMAX) return score * (grad - inner);
    if (p.score == SIGMOID) return grad * score * (1.0f - score);
    // d sqrt(softplus(x)) / dx = sigmoid(x) / (2 sqrt(softplus(x))), 0 where the root has become 0.
    return score == 0.0f ? 0.0f : grad * Scorer{SIGMOID, 0, 0}(logit(expert)) / (score + score);
  }
};

template <class T> PTX_D void grad_route(const GradRouteParams<T>& p) {
  for_each_part(p.tokens, 1, [&](int64_t token, int) { TokenGrad<T>{p, token}.run(); });
}

struct GradExpertScaleParams {
  Global<const int64_t> ids;      // [T, K]
  Global<const float> by_choice;  // [T, K]
  Global<float> out;              // [E] the sum of by_choice over the choices of each expert
  int rows, experts;              // R, E
};

constexpr int SCALE_THREADS = 256;

// A block for each expert: a thread adds every 256th row in order, then the threads are added.
PTX_D void grad_expert_scale(const GradExpertScaleParams& p) {
  for (int expert = block_id(); expert < p.experts; expert += block_count()) {
    float sum = 0.0f;
    for (int64_t row = thread_id(); row < p.rows; row += SCALE_THREADS)
      if (load_readonly(p.ids + row) == expert) sum += load_readonly(p.by_choice + row);
    sum = sum_of_block(sum, shared_memory());
    if (thread_id() == 0) store(p.out + expert, sum);
  }
}

}  // namespace moe

// A block for every expert, or fewer.
PTX_KERNEL(grad_expert_scale, moe::SCALE_THREADS, 4, moe::SCALE_THREADS / 32 * 4, moe::grad_expert_scale, moe::GradExpertScaleParams)
PTX_KERNEL(grad_route_f32, 128, 8, 0, moe::grad_route, moe::GradRouteParams<float>)
PTX_KERNEL(grad_route_bf16, 128, 8, 0, moe::grad_route, moe::GradRouteParams<ptx::bf16>)
PTX_KERNEL(grad_route_f16, 128, 8, 0, moe::grad_route, moe::GradRouteParams<ptx::f16>)
