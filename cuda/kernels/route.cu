// The router: from logits [T, E] to expert ids, weights and scores, with the bits of fastmoe-core's route_rows.
//
// T tokens, E experts, K experts per token. A warp takes a token; expert i * 32 + lane is the i-th of its lane, which
// alone reads and writes its key. The keys are kept in shared memory, or made anew for each choice where E is too large.
#include "tile/rows.cuh"
#include "tile/score.cuh"

namespace moe {

constexpr int ROUTE_THREADS = 128;
constexpr int KEPT = 1024;  // experts whose keys are kept
constexpr int ROUTE_SHARED = ROUTE_THREADS / 32 * 2 * KEPT * 4;

enum GroupScore : int { GROUP_MAX = 0, GROUP_TOP2 = 1 };
enum GroupLosers : int { LOSERS_NEG_INFINITY = 0, LOSERS_ZERO = 1 };

template <class T> struct RouteParams {
  Global<const T> logits;            // [T, E]
  Global<const float> bias;          // [E], added for the choice only; may be null
  Global<const float> expert_scale;  // [E], multiplies the weights of an expert, last of all; may be null
  Global<int64_t> ids;               // [T, K]
  Global<float> weights;             // [T, K]
  Global<float> scores;              // [T, E]
  Global<int> bad_token;             // lowered to the first token with a NaN logit; may be null
  int tokens, experts, top_k;        // T >= 0, E >= 1, 1 <= K <= E
  int score;                         // Score
  int order;                         // Order
  int renormalize;                   // whether a token's weights are divided by (their sum + eps)
  float eps;
  float scale;        // multiplies the weights, after that division
  float softcap;      // logits become softcap * tanh(logit / softcap) first; 0: they stay
  int n_group;        // groups of equal size that E is divided into, E being at most KEPT; 0: no groups
  int topk_group;     // groups that a token may choose from; K experts fit into them
  int group_score;    // GroupScore, from the keys of a group
  int group_losers;   // GroupLosers, the key of the experts of the other groups
};

template <bool KEEP, class T> struct TokenRouter {
  const RouteParams<T>& p;
  const int64_t token;
  const int slots;      // experts of a lane, rounded up
  const Shared keys;    // [E] of this warp: the order of the logits, later of what is chosen by
  const Shared groups;  // [n_group] of this warp

  PTX_D static Shared at(Shared base, int i) { return base + (i * 32 + lane()) * 4; }

  PTX_D float logit(int expert) const {
    return soft_cap(to_float(load_readonly(p.logits + (token * p.experts + expert))), p.softcap);
  }

  // The lane's i-th logit, -inf past the last expert; -0 may have become 0, and the scores are the same.
  PTX_D float x(int i) const {
    if constexpr (KEEP) return number(load_shared<uint32_t>(at(keys, i)));
    return i * 32 + lane() < p.experts ? logit(i * 32 + lane()) : -infinity();
  }

  PTX_D void run() const {
    bool bad = false;
    for (int i = 0; i < slots; i++) {
      const int expert = i * 32 + lane();
      const float x = expert < p.experts ? logit(expert) : -infinity();
      if constexpr (KEEP) store_shared(at(keys, i), order(x));
      bad |= x != x;
    }
    if (p.bad_token && ptx::ballot(bad) != 0 && lane() == 0) atomic_min(p.bad_token, static_cast<int>(token));
    const Scorer all = scorer_of(p.score, p.experts, [&](int i) { return x(i); });
    score_experts(all);
    if (p.n_group != 0) limit_to_groups();
    write_weights(all, choose(all));
  }

  // What the lane's i-th expert is chosen by.
  PTX_D uint32_t key_of(int i, float x, float score) const {
    const int expert = i * 32 + lane();
    if (expert >= p.experts) return BUG(route_past_last_expert) ? order(-infinity()) : 0;
    const bool by_score = p.order == SCORE_TOPK && (p.bias || p.n_group != 0);
    const float value = by_score ? score : x;
    return order(p.bias ? add_rn(value, load_readonly(p.bias + expert)) : value);
  }

  PTX_D uint32_t key(int i, const Scorer& all) const {
    if constexpr (KEEP) return load_shared<uint32_t>(at(keys, i));
    return key_of(i, x(i), all(x(i)));
  }

  PTX_D void score_experts(const Scorer& all) const {
    for (int i = 0; i < slots; i++) {
      const int expert = i * 32 + lane();
      const float logit = x(i), score = all(logit);
      if (expert < p.experts) store(p.scores + (token * p.experts + expert), score);
      if constexpr (KEEP) store_shared(at(keys, i), key_of(i, logit, score));
    }
  }

  // Overwrites the keys of the experts outside the best groups.
  PTX_D void limit_to_groups() const {
    const int size = p.experts / p.n_group;
    for (int group = 0; group < p.n_group; group++) {
      const int first = group * size, end = first + size;
      const auto within = [&](int i) {
        const int expert = i * 32 + lane();
        return first <= expert && expert < end ? load_shared<uint32_t>(at(keys, i)) : 0;
      };
      const Pick best = next_best(first / 32, (end + 31) / 32, before_all(), within);
      uint32_t worth = best.key;
      if (p.group_score == GROUP_TOP2) {
        const Pick second = next_best(first / 32, (end + 31) / 32, BUG(route_group_ties) ? Pick{best.key, NOBODY} : best, within);
        worth = order(add_rn(number(best.key), number(second.key)));
      }
      if (lane() == group % 32) store_shared(at(groups, group / 32), worth);
    }
    for (int g = 0; g < p.topk_group; g++) {
      const Pick best = next_best(0, (p.n_group + 31) / 32, before_all(), [&](int i) {
        return i * 32 + lane() < p.n_group ? load_shared<uint32_t>(at(groups, i)) : 0;
      });
      if (lane() == static_cast<int>(best.id % 32)) store_shared(at(groups, best.id / 32), 0u);  // 0: chosen
    }
    sync_warp();
    const uint32_t loser = order(p.group_losers == LOSERS_ZERO ? 0.0f : -infinity());
    for (int i = 0; i < slots; i++) {
      const int expert = i * 32 + lane();
      if (expert >= p.experts) continue;
      const bool lost = load_shared<uint32_t>(groups + expert / size * 4) != 0;
      if (lost) store_shared(at(keys, i), loser);
    }
    sync_warp();
  }

  // Writes the ids; returns that of choice `lane` among the last 32 choices.
  PTX_D int choose(const Scorer& all) const {
    Pick last = before_all();
    int mine = 0;
    for (int k = 0; k < p.top_k; k++) {
      // A kept key is struck out once it is chosen, which is quicker than to compare all with it.
      last = next_best(0, slots, KEEP ? before_all() : last, [&](int i) { return key(i, all); });
      if (KEEP && lane() == static_cast<int>(last.id % 32)) store_shared(keys + last.id * 4, 0u);
      if (lane() == k % 32) mine = static_cast<int>(last.id);
      const bool full = k % 32 == 31 || k + 1 == p.top_k;
      if (full && lane() <= k % 32) store(p.ids + (token * p.top_k + (BUG(route_first_ids) ? 0 : k / 32 * 32) + lane()), static_cast<int64_t>(mine));
    }
    return mine;
  }

  PTX_D void write_weights(const Scorer& all, int mine) const {
    const auto id = [&](int i) {  // a lane reads back only what it wrote
      const int k = i * 32 + lane();
      if (p.top_k <= 32 || k >= p.top_k) return mine;
      return static_cast<int>(load(p.ids + (token * p.top_k + k)));
    };
    const auto x = [&](int i) { return i * 32 + lane() < p.top_k ? logit(id(i)) : -infinity(); };
    const Scorer chosen = p.order == SCORE_TOPK || BUG(route_score_of_all) ? all : scorer_of(p.score, p.top_k, x);
    float sum = 0.0f;
    for (int i = 0; p.renormalize && i * 32 < p.top_k; i++) {
      const float weight = chosen(x(i));
      for (int j = 0; j < 32 && i * 32 + j < p.top_k; j++) sum = add_rn(sum, shfl(weight, j));
    }
    const float divisor = add_rn(sum, p.eps);
    for (int i = 0; i * 32 < p.top_k; i++) {
      const int k = i * 32 + lane();
      if (k >= p.top_k) break;
      float weight = chosen(x(i));
      if (p.renormalize) weight = div_rn(weight, divisor);
      weight = mul_rn(weight, p.scale);
      if (p.expert_scale) weight = mul_rn(weight, load_readonly(p.expert_scale + id(i)));
      store(p.weights + (token * p.top_k + k), weight);
    }
  }
};

template <class T> PTX_D void route(const RouteParams<T>& p) {
  const Shared keys = shared_memory() + thread_id() / 32 * 2 * KEPT * 4, groups = keys + KEPT * 4;
  const int slots = (p.experts + 31) / 32;
  for_each_part(p.tokens, 1, [&](int64_t token, int) {
    if (p.experts <= KEPT)
      TokenRouter<true, T>{p, token, slots, keys, groups}.run();
    else
      TokenRouter<false, T>{p, token, slots, keys, groups}.run();
  });
}

}  // namespace moe

PTX_KERNEL(route_f32, moe::ROUTE_THREADS, 6, moe::ROUTE_SHARED, moe::route, moe::RouteParams<float>)
PTX_KERNEL(route_bf16, moe::ROUTE_THREADS, 6, moe::ROUTE_SHARED, moe::route, moe::RouteParams<ptx::bf16>)
PTX_KERNEL(route_f16, moe::ROUTE_THREADS, 6, moe::ROUTE_SHARED, moe::route, moe::RouteParams<ptx::f16>)
