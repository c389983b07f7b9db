// The routing plan of fastmoe-core's PlanSpec::build, to the bit: a stable counting sort of the rows by expert.
//
// T tokens, E experts, K experts per token, R = T*K routed rows, C capacity, N sorted rows: E*C with padding, else R.
// Either one kernel or three make the plan, and one more where rows are dropped by score:
//
//   plan_small     one block, for up to 1024 experts: quicker for a few thousand rows
//   plan_count     a warp counts the rows of a tile for every expert
//   plan_scan      over the tiles of each expert: where the rows of a tile start
//   plan_scatter   a warp gives the rows of its tile their places, 32 at a time, in order
//   plan_seat      a block finds the rows of highest weight of its expert and gives them theirs
#include "tile/block.cuh"
#include "tile/exact.cuh"
#include "tile/rows.cuh"

namespace moe {

constexpr int TILE = 512;      // rows of a tile
constexpr int SPAN = 1024;     // experts that are counted at a time
constexpr int PLAN_WARPS = 4;  // tiles that a block works at
constexpr int SCAN_WARPS = 32;
constexpr int SMALL_WARPS = 8;
constexpr int SEAT_THREADS = 256;

// Ids of type int32_t or int64_t; those outside 0..E are dropped.
template <class Id> struct PlanParams {
  Global<const Id> ids;          // [T, K]
  Global<const float> weights;   // [T, K]; null: none, and no drop by score
  Global<int> counts;            // [E] rows kept
  Global<int> offsets;           // [E + 1]
  Global<int> gather;            // [N] token of each sorted row, -1 in unused rows
  Global<int> inverse;           // [T, K] sorted row, -1 where dropped
  Global<float> sorted_weights;  // [N], 0 in unused rows; may be null
  Global<int> bad_row;           // lowered to the first t * K + k whose id is out of range; may be null
  Global<int> workspace;         // ceil(R / 512) * E + E, and R more for a drop by score
  int rows, top_k, experts;      // R >= 0, K >= 1, E >= 1; R and N fit 31 bits
  int capacity;                  // C, or 2^31 - 1 for none
  int pad;                       // whether every expert owns C sorted rows
  int drop_by_score;             // whether the rows of highest weight stay, rather than the first ones

  PTX_D int tiles() const { return rows / TILE + (rows % TILE != 0); }
  // [tiles, E] rows of a tile for an expert, after plan_scan those of all tiles before.
  PTX_D Global<int> tile_rows() const { return workspace; }
  // [E] rows before any is dropped.
  PTX_D Global<int> totals() const { return workspace + static_cast<int64_t>(tiles()) * experts; }
  // [R] rows by expert, before any is dropped; for a drop by score.
  PTX_D Global<int> by_expert() const { return totals() + experts; }

  PTX_D int kept(int expert) const {
    const int all = load(totals() + expert);
    return all < capacity ? all : capacity;
  }
  PTX_D int sorted_rows_of(int expert) const { return pad ? capacity : kept(expert); }
  // The expert of a row, or NOBODY.
  PTX_D uint32_t expert(int row) const {
    const Id id = load_readonly(ids + row);
    return static_cast<uint64_t>(id) < static_cast<uint64_t>(experts) ? static_cast<uint32_t>(id) : NOBODY;
  }
  PTX_D void count(int expert, int total) const {
    store(totals() + expert, total);
    store(counts + expert, total < capacity ? total : capacity);
  }
  PTX_D float weight(int row) const { return sorted_weights ? load_readonly(weights + row) : 0.0f; }
  PTX_D void seat(int row, int sorted, float weight) const {
    store(gather + sorted, row / top_k);
    store(inverse + row, sorted);
    if (sorted_weights) store(sorted_weights + sorted, weight);
  }
  PTX_D void leave_unused(int64_t sorted) const {
    store(gather + sorted, -1);
    if (sorted_weights) store(sorted_weights + sorted, 0.0f);
  }
  // Those of rows `end` to N.
  PTX_D void leave_rest_unused(int end) const {
    const int64_t threads = static_cast<int64_t>(block_count()) * block_threads();
    int64_t row = static_cast<int64_t>(block_id()) * block_threads() + thread_id();
    for (row += end; !pad && row < rows; row += threads) leave_unused(row);
  }
};

// Calls `work(first, last + 1)` for the rows of this warp's tiles.
template <class Id, class Work> PTX_D void for_each_tile(const PlanParams<Id>& p, Work work) {
  for (int tile = block_id() * PLAN_WARPS + thread_id() / 32; tile < p.tiles(); tile += block_count() * PLAN_WARPS)
    work(tile, tile * TILE, p.rows - tile * TILE < TILE ? p.rows : (tile + 1) * TILE);
}

// Counts rows for the experts span..span + SPAN by a warp; `counts` is [SPAN]. Lowers `first_bad`, a lane's own.
template <class Id>
PTX_D void count_rows(const PlanParams<Id>& p, int begin, int end, uint32_t span, Shared counts, int& first_bad) {
  for (int e = lane(); e < SPAN; e += 32) store_shared(counts + e * 4, 0);
  sync_warp();
#pragma unroll 4
  for (int row = begin + lane(); row < end; row += 32) {
    const uint32_t expert = p.expert(row);
    if (expert == NOBODY && row < first_bad) first_bad = row;
    if (expert != NOBODY && expert - span < SPAN) atomic_add_shared(counts + (expert - span) * 4, 1);
  }
  sync_warp();
}

template <class Id> PTX_D void report_bad_row(const PlanParams<Id>& p, int first_bad) {
  first_bad = redux_min(static_cast<uint32_t>(first_bad));
  if (p.bad_row && first_bad < p.rows && lane() == 0) atomic_min(p.bad_row, first_bad);
}

// Gives the rows of the experts span..span + SPAN their places by a warp, in order. [SPAN]: the first sorted row of each
// expert, and how many of its rows come before `begin`.
template <class Id>
PTX_D void place_rows(const PlanParams<Id>& p, int begin, int end, uint32_t span, Shared offsets, Shared places) {
  constexpr int AT_ONCE = 4;  // loads in flight
  for (int first = begin; first < end; first += 32 * AT_ONCE) {
    uint32_t experts[AT_ONCE];
    float weights[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int row = first + i * 32 + lane();
      experts[i] = row < end ? p.expert(row) : NOBODY;
      weights[i] = row < end ? p.weight(row) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int row = first + i * 32 + lane();
      const uint32_t expert = experts[i];
      const bool here = expert != NOBODY && expert - span < SPAN;
      const uint32_t peers = match_any(here ? expert : NOBODY);
      const uint32_t before = peers & ((BUG(plan_unstable) ? 0u : 1u << lane()) - 1);
      const Shared next = places + (here ? expert - span : 0) * 4;
      const int place = load_shared<int>(next) + popcount(before);
      if (!BUG(plan_scatter_no_barrier)) sync_warp();
      if (here && before == 0) store_shared(next, place + popcount(peers));
      sync_warp();
      if (here) {
        const int sorted = load_shared<int>(offsets + (expert - span) * 4) + place;
        if (p.drop_by_score)
          store(p.by_expert() + sorted, row);
        else if (place < p.capacity + BUG(plan_one_too_many))
          p.seat(row, sorted, weights[i]);
        else
          store(p.inverse + row, -1);
      } else if (row < end && expert == NOBODY && span == 0) {
        store(p.inverse + row, -1);
      }
    }
  }
}

// Cuts the sorted rows from `end` on into those of the experts span..span + SPAN, whose totals are known; returns their
// end. `offsets` is [SPAN]; EACH times the threads of the block are SPAN.
template <int EACH, class Id>
PTX_D int lay_out(const PlanParams<Id>& p, int end, int span, Shared offsets, Shared scratch) {
  const int first = thread_id() * EACH;
  int owned[EACH], sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int expert = span + first + i;
    owned[i] = expert >= p.experts ? 0 : p.drop_by_score ? load(p.totals() + expert) : p.sorted_rows_of(expert);
    sum += owned[i];
  }
  const Scan scan = scan_block(sum, scratch);
  int offset = (BUG(plan_spans_overlap) ? 0 : end) + scan.before;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int expert = span + first + i;
    store_shared(offsets + (first + i) * 4, offset);
    if (block_id() == 0 && expert < p.experts && !p.drop_by_score) store(p.offsets + expert, offset);
    offset += owned[i];
  }
  sync_block();
  return end + scan.total;
}

// All that is left of a plan without a drop by score once the rows have their places, which end at `end`.
template <class Id> PTX_D void finish(const PlanParams<Id>& p, int end) {
  if (p.drop_by_score) return;
  if (block_id() == 0 && thread_id() == 0) store(p.offsets + p.experts, end);
  const int64_t threads = static_cast<int64_t>(block_count()) * block_threads();
  for (int64_t row = static_cast<int64_t>(block_id()) * block_threads() + thread_id(); p.pad && row < end; row += threads) {
    const int expert = static_cast<int>(row) / p.capacity;
    if (row - static_cast<int64_t>(expert) * p.capacity >= p.kept(expert) + BUG(plan_padding)) p.leave_unused(row);
  }
  p.leave_rest_unused(end);
}

template <class Id> PTX_D void plan_count(const PlanParams<Id>& p) {
  const Shared counts = shared_memory() + thread_id() / 32 * SPAN * 4;
  int first_bad = p.rows;
  for_each_tile(p, [&](int tile, int begin, int end) {
    for (int span = 0; span < p.experts; span += SPAN) {
      count_rows(p, begin, end, span, counts, first_bad);
      const Global<int> out = p.tile_rows() + (static_cast<int64_t>(tile) * p.experts + span);
      for (int e = lane(); e < SPAN && e < p.experts - span; e += 32) store(out + e, load_shared<int>(counts + e * 4));
      sync_warp();
    }
  });
  report_bad_row(p, first_bad);
}

// A block takes 32 experts, a lane one of them, a warp a share of the tiles.
PTX_D void plan_scan(const PlanParams<int64_t>& p) {
  const int expert = block_id() * 32 + lane(), warp = thread_id() / 32;
  const int share = (p.tiles() + SCAN_WARPS - 1) / SCAN_WARPS;
  const int first = warp * share, end = first + share < p.tiles() ? first + share : p.tiles();
  const Global<int> rows = p.tile_rows() + expert;
  const auto at = [&](int tile) { return rows + static_cast<int64_t>(tile) * p.experts; };
  int sum = 0;
#pragma unroll 4
  for (int tile = first; tile < end; tile++)
    if (expert < p.experts) sum += load(at(tile));
  store_shared(shared_memory() + thread_id() * 4, sum);
  if (!BUG(plan_scan_no_barrier)) sync_block();
  int before = 0, total = 0;
  for (int w = 0; w < SCAN_WARPS; w++) {
    const int of_warp = load_shared<int>(shared_memory() + (w * 32 + lane()) * 4);
    if (w < warp) before += of_warp;
    total += of_warp;
  }
  if (expert >= p.experts) return;
  constexpr int AT_ONCE = 4;  // loads in flight
  for (int tile = first; tile < end; tile += AT_ONCE) {
    int here[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) here[i] = tile + i < end ? load(at(tile + i)) : 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (tile + i < end) store(at(tile + i), before);
      before += here[i];
    }
  }
  if (warp == 0) p.count(expert, total);
}

template <class Id> PTX_D void plan_scatter(const PlanParams<Id>& p) {
  const Shared offsets = shared_memory(), scratch = offsets + (1 + PLAN_WARPS) * SPAN * 4;
  const Shared places = offsets + (1 + thread_id() / 32) * SPAN * 4;
  int last = 0;
  for (int span = 0; span < p.experts; span += SPAN) {
    last = lay_out<SPAN / (PLAN_WARPS * 32)>(p, last, span, offsets, scratch);
    for_each_tile(p, [&](int tile, int begin, int end) {
      const Global<int> starts = p.tile_rows() + (static_cast<int64_t>(tile) * p.experts + span);
      for (int e = lane(); e < SPAN && e < p.experts - span; e += 32) store_shared(places + e * 4, load(starts + e));
      sync_warp();
      place_rows(p, begin, end, span, offsets, places);
      sync_warp();
    });
    sync_block();
  }
  finish(p, last);
}

template <class Id> PTX_D void plan_small(const PlanParams<Id>& p) {
  constexpr int EACH = SPAN / (SMALL_WARPS * 32);
  const int warp = thread_id() / 32;
  const Shared offsets = shared_memory(), scratch = offsets + (1 + SMALL_WARPS) * SPAN * 4;
  const auto places = [&](int w) { return offsets + (1 + w) * SPAN * 4; };
  const int share = (p.rows / SMALL_WARPS + 32) / 32 * 32;  // of a warp
  const int begin = warp * share, end = begin + share < p.rows ? begin + share : p.rows;
  int first_bad = p.rows;
  count_rows(p, begin, end, 0, places(warp), first_bad);
  report_bad_row(p, first_bad);
  if (!BUG(plan_small_no_barrier)) sync_block();
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int expert = thread_id() * EACH + i;
    int before = 0;
    for (int w = 0; w < SMALL_WARPS; w++) {
      const Shared at = places(w) + expert * 4;
      const int here = load_shared<int>(at);
      store_shared(at, before);
      before += here;
    }
    if (expert < p.experts) p.count(expert, before);
  }
  const int last = lay_out<EACH>(p, 0, 0, offsets, scratch);
  place_rows(p, begin, end, 0, offsets, places(warp));
  finish(p, last);
}

// Of the keys of n rows: the `keep`-th largest, and how many equal to it are among the `keep` largest.
struct Cut {
  uint32_t key;
  int ties;
};

// Eight bits at a time, from the top; 1 <= keep <= n. `scratch` holds 256 + 2 + 8 words.
template <class Key> PTX_D Cut find_cut(int n, int keep, Shared scratch, Key key) {
  const Shared found = scratch + SEAT_THREADS * 4, sums = found + 8;
  Cut cut = {0, keep};
  for (int shift = 24; shift >= 0; shift -= 8) {
    store_shared(scratch + thread_id() * 4, 0);
    sync_block();
    for (int i = thread_id(); i < n; i += SEAT_THREADS) {
      const uint32_t k = key(i);
      const bool same = shift == 24 || k >> (shift + 8) == cut.key >> (shift + 8);
      if (same) atomic_add_shared(scratch + (k >> shift & 255) * 4, 1);
    }
    sync_block();
    const int digit = 255 - thread_id();
    const int here = load_shared<int>(scratch + digit * 4);
    const int above = scan_block(here, sums).before;
    if (above < cut.ties && cut.ties <= above + here) {
      store_shared(found, digit);
      store_shared(found + 4, cut.ties - above);
    }
    sync_block();
    cut.key |= load_shared<uint32_t>(found) << shift;
    cut.ties = load_shared<int>(found + 4);
  }
  return cut;
}

PTX_D void plan_seat(const PlanParams<int64_t>& p) {
  const Shared scratch = shared_memory();
  int end = 0;  // of the sorted rows of all experts
  for (int e = thread_id(); e < p.experts; e += SEAT_THREADS) end += p.sorted_rows_of(e);
  end = scan_block(end, scratch).total;
  for (int expert = block_id(); expert < p.experts; expert += block_count()) {
    int first = 0, offset = 0;  // of this expert's rows in by_expert, and among the sorted rows
    for (int e = thread_id(); e < expert; e += SEAT_THREADS) {
      first += load(p.totals() + e);
      offset += p.sorted_rows_of(e);
    }
    first = scan_block(first, scratch).total;
    offset = scan_block(offset, scratch).total;
    const int all = load(p.totals() + expert), keep = p.kept(expert), owned = p.sorted_rows_of(expert);
    if (thread_id() == 0) store(p.offsets + expert, offset);
    if (thread_id() == 0 && expert + 1 == p.experts) store(p.offsets + p.experts, end);

    const auto row_of = [&](int i) { return load(p.by_expert() + (first + i)); };
    const auto key = [&](int i) { return order(load_readonly(p.weights + row_of(i))); };
    Cut cut = {0, 0};  // below every key
    if (keep == 0) cut.key = ~0u;
    if (keep > 0 && keep < all) cut = find_cut(all, keep, scratch, key);
    int larger = 0, equal = 0;  // in rows before
    for (int i = thread_id(); i - thread_id() < all; i += SEAT_THREADS) {
      const uint32_t k = i < all ? key(i) : 0;
      const Scan scan = scan_block((k > cut.key) | (i < all && k == cut.key) << 16, scratch);
      const int larger_before = larger + (scan.before & 0xffff), equal_before = equal + (scan.before >> 16);
      const bool seated = k > cut.key || (k == cut.key && equal_before < cut.ties + BUG(plan_ties));
      if (i < all && seated)
        p.seat(row_of(i), offset + larger_before + (equal_before < cut.ties ? equal_before : cut.ties), p.weight(row_of(i)));
      else if (i < all)
        store(p.inverse + row_of(i), -1);
      larger += scan.total & 0xffff;
      equal += scan.total >> 16;
    }
    for (int i = keep + thread_id(); i < owned; i += SEAT_THREADS) p.leave_unused(offset + i);
  }
  p.leave_rest_unused(end);
}

}  // namespace moe

// Shared words: places of the experts of a span, one row for all and one for each warp; then sums of the warps.
constexpr int plan_shared(int warps) { return ((1 + warps) * moe::SPAN + warps) * 4; }

// plan_small: one block. plan_count, plan_scatter: a block for every 4 tiles of 512 rows, at least 1.
PTX_KERNEL(plan_small_i32, moe::SMALL_WARPS * 32, 1, plan_shared(moe::SMALL_WARPS), moe::plan_small, moe::PlanParams<int32_t>)
PTX_KERNEL(plan_small_i64, moe::SMALL_WARPS * 32, 1, plan_shared(moe::SMALL_WARPS), moe::plan_small, moe::PlanParams<int64_t>)
PTX_KERNEL(plan_count_i32, moe::PLAN_WARPS * 32, 8, moe::PLAN_WARPS * moe::SPAN * 4, moe::plan_count, moe::PlanParams<int32_t>)
PTX_KERNEL(plan_count_i64, moe::PLAN_WARPS * 32, 8, moe::PLAN_WARPS * moe::SPAN * 4, moe::plan_count, moe::PlanParams<int64_t>)
PTX_KERNEL(plan_scatter_i32, moe::PLAN_WARPS * 32, 6, plan_shared(moe::PLAN_WARPS), moe::plan_scatter, moe::PlanParams<int32_t>)
PTX_KERNEL(plan_scatter_i64, moe::PLAN_WARPS * 32, 6, plan_shared(moe::PLAN_WARPS), moe::plan_scatter, moe::PlanParams<int64_t>)
// These read no ids. plan_scan: exactly a block for every 32 experts; plan_seat: one for every expert, or fewer.
PTX_KERNEL(plan_scan, moe::SCAN_WARPS * 32, 1, moe::SCAN_WARPS * 32 * 4, moe::plan_scan, moe::PlanParams<int64_t>)
PTX_KERNEL(plan_seat, moe::SEAT_THREADS, 4, (moe::SEAT_THREADS + 2 + 8) * 4, moe::plan_seat, moe::PlanParams<int64_t>)
