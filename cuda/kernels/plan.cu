// The routing plan of fastmoe-core's PlanSpec::build, to the bit: a stable counting sort of the rows by expert.
//
// T tokens, E experts, K experts per token, R = T*K routed rows, C capacity, N sorted rows: E*C with padding, else R.
// Four kernels in a row, the last one for a drop by score only:
//
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

  PTX_D int tiles() const { return (rows + TILE - 1) / TILE; }
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
  PTX_D void seat(int row, int sorted) const {
    store(gather + sorted, row / top_k);
    store(inverse + row, sorted);
    if (sorted_weights) store(sorted_weights + sorted, load_readonly(weights + row));
  }
  PTX_D void leave_unused(int sorted) const {
    store(gather + sorted, -1);
    if (sorted_weights) store(sorted_weights + sorted, 0.0f);
  }
};

// Calls `work(tile)` for the tiles of this warp.
template <class Work> PTX_D void for_each_tile(int tiles, Work work) {
  for (int tile = block_id() * PLAN_WARPS + thread_id() / 32; tile < tiles; tile += block_count() * PLAN_WARPS) work(tile);
}

template <class Id> PTX_D void plan_count(const PlanParams<Id>& p) {
  const Shared counts = shared_memory() + thread_id() / 32 * SPAN * 4;  // [SPAN] of this warp
  int first_bad = p.rows;
  for_each_tile(p.tiles(), [&](int tile) {
    for (uint32_t span = 0; span < static_cast<uint32_t>(p.experts); span += SPAN) {
      for (int e = lane(); e < SPAN; e += 32) store_shared(counts + e * 4, 0);
      sync_warp();
      for (int i = 0; i < TILE; i += 32) {
        const int row = tile * TILE + i + lane();
        if (row >= p.rows) break;
        const uint32_t expert = p.expert(row);
        if (expert == NOBODY && row < first_bad) first_bad = row;
        if (expert - span < SPAN && expert != NOBODY) atomic_add_shared(counts + (expert - span) * 4, 1);
      }
      sync_warp();
      const int left = p.experts - static_cast<int>(span);
      const Global<int> out = p.tile_rows() + (static_cast<int64_t>(tile) * p.experts + span);
      for (int e = lane(); e < left && e < SPAN; e += 32) store(out + e, load_shared<int>(counts + e * 4));
      sync_warp();
    }
  });
  first_bad = redux_min(static_cast<uint32_t>(first_bad));
  if (p.bad_row && first_bad < p.rows && lane() == 0) atomic_min(p.bad_row, first_bad);
}

// A block takes 32 experts, a lane one of them, a warp a share of the tiles.
PTX_D void plan_scan(const PlanParams<int64_t>& p) {
  const int expert = block_id() * 32 + lane(), warp = thread_id() / 32;
  const int share = (p.tiles() + SCAN_WARPS - 1) / SCAN_WARPS;
  const int first = warp * share, end = first + share < p.tiles() ? first + share : p.tiles();
  const Global<int> rows = p.tile_rows() + expert;
  int sum = 0;
  for (int tile = first; tile < end; tile++)
    if (expert < p.experts) sum += load(rows + static_cast<int64_t>(tile) * p.experts);
  store_shared(shared_memory() + thread_id() * 4, sum);
  if (!BUG(plan_scan_no_barrier)) sync_block();
  int before = 0, total = 0;
  for (int w = 0; w < SCAN_WARPS; w++) {
    const int of_warp = load_shared<int>(shared_memory() + (w * 32 + lane()) * 4);
    if (w < warp) before += of_warp;
    total += of_warp;
  }
  if (expert >= p.experts) return;
  for (int tile = first; tile < end; tile++) {
    const Global<int> at = rows + static_cast<int64_t>(tile) * p.experts;
    const int here = load(at);
    store(at, before);
    before += here;
  }
  if (warp != 0) return;
  store(p.totals() + expert, total);
  store(p.counts + expert, total < p.capacity ? total : p.capacity);
}

// Gives the rows of a tile that belong to the experts of a span their places; `offsets` and `places` are [SPAN].
template <class Id>
PTX_D void scatter_tile(const PlanParams<Id>& p, int tile, uint32_t span, Shared offsets, Shared places) {
  const Global<int> starts = p.tile_rows() + (static_cast<int64_t>(tile) * p.experts + span);
  const int left = p.experts - static_cast<int>(span);
  for (int e = lane(); e < left && e < SPAN; e += 32) store_shared(places + e * 4, load(starts + e));
  sync_warp();
  for (int i = 0; i < TILE && tile * TILE + i < p.rows; i += 32) {
    const int row = tile * TILE + i + lane();
    const uint32_t expert = row < p.rows ? p.expert(row) : NOBODY;
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
        p.seat(row, sorted);
      else
        store(p.inverse + row, -1);
    } else if (row < p.rows && expert == NOBODY && span == 0) {
      store(p.inverse + row, -1);
    }
  }
  sync_warp();
}

template <class Id> PTX_D void plan_scatter(const PlanParams<Id>& p) {
  constexpr int EACH = SPAN / (PLAN_WARPS * 32);
  const Shared offsets = shared_memory();  // [SPAN]
  const Shared places = offsets + (1 + thread_id() / 32) * SPAN * 4;
  const Shared scratch = offsets + (1 + PLAN_WARPS) * SPAN * 4;
  int end = 0;  // of the experts so far
  for (int span = 0; span < p.experts; span += SPAN) {
    const int first = thread_id() * EACH;
    int owned[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int expert = span + first + i;
      owned[i] = expert >= p.experts ? 0 : p.drop_by_score ? load(p.totals() + expert) : p.sorted_rows_of(expert);
      sum += owned[i];
    }
    const Scan scan = scan_block(sum, scratch);
    int offset = end + scan.before;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int expert = span + first + i;
      store_shared(offsets + (first + i) * 4, offset);
      if (block_id() == 0 && expert < p.experts && !p.drop_by_score) store(p.offsets + expert, offset);
      offset += owned[i];
    }
    end += scan.total;
    sync_block();
    for_each_tile(p.tiles(), [&](int tile) { scatter_tile(p, tile, span, offsets, places); });
    sync_block();
  }
  if (p.drop_by_score) return;
  if (block_id() == 0 && thread_id() == 0) store(p.offsets + p.experts, end);
  const int thread = block_id() * block_threads() + thread_id(), threads = block_count() * block_threads();
  if (p.pad) {
    for (int row = thread; row < end; row += threads)
      if (row % p.capacity >= p.kept(row / p.capacity) + BUG(plan_padding)) p.leave_unused(row);
  } else {
    for (int row = end + thread; row < p.rows; row += threads) p.leave_unused(row);
  }
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
        p.seat(row_of(i), offset + larger_before + (equal_before < cut.ties ? equal_before : cut.ties));
      else if (i < all)
        store(p.inverse + row_of(i), -1);
      larger += scan.total & 0xffff;
      equal += scan.total >> 16;
    }
    for (int i = keep + thread_id(); i < owned; i += SEAT_THREADS) p.leave_unused(offset + i);
  }
  const int thread = block_id() * SEAT_THREADS + thread_id();
  for (int row = end + thread; !p.pad && row < p.rows; row += block_count() * SEAT_THREADS) p.leave_unused(row);
}

}  // namespace moe

// Blocks: for every 4 tiles of 512 rows, at least 1. plan_scan and plan_seat read no ids.
PTX_KERNEL(plan_count_i32, moe::PLAN_WARPS * 32, 8, moe::PLAN_WARPS * moe::SPAN * 4, moe::plan_count, moe::PlanParams<int32_t>)
PTX_KERNEL(plan_count_i64, moe::PLAN_WARPS * 32, 8, moe::PLAN_WARPS * moe::SPAN * 4, moe::plan_count, moe::PlanParams<int64_t>)
// For every 32 experts, exactly.
PTX_KERNEL(plan_scan, moe::SCAN_WARPS * 32, 1, moe::SCAN_WARPS * 32 * 4, moe::plan_scan, moe::PlanParams<int64_t>)
// As plan_count.
PTX_KERNEL(plan_scatter_i32, moe::PLAN_WARPS * 32, 8, (moe::PLAN_WARPS + 1) * moe::SPAN * 4 + 16, moe::plan_scatter, moe::PlanParams<int32_t>)
PTX_KERNEL(plan_scatter_i64, moe::PLAN_WARPS * 32, 8, (moe::PLAN_WARPS + 1) * moe::SPAN * 4 + 16, moe::plan_scatter, moe::PlanParams<int64_t>)
// For every expert, at least 1.
PTX_KERNEL(plan_seat, moe::SEAT_THREADS, 4, (moe::SEAT_THREADS + 2 + 8) * 4, moe::plan_seat, moe::PlanParams<int64_t>)
