#include "emulator/wgmma.h"

#include <algorithm>
#include <cstring>

#include "emulator/collective.h"
#include "emulator/launch.h"
#include "emulator/product.h"
#include "emulator/shared.h"
#include "emulator/tma.h"
#include "ptx/host/math.h"

namespace emulator {
namespace {

constexpr int depth = 16;  // along K

// Fields of a shared-memory descriptor; lengths are kept in units of 16 bytes.
uint32_t field(uint64_t descriptor, int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; }
uint32_t start(uint64_t d) { return field(d, 0); }
uint32_t leading(uint64_t d) { return field(d, 16); }
uint32_t stride(uint64_t d) { return field(d, 32); }

void check_descriptor(uint64_t d, const Where& where) {
  if (d >> 62 != 1) fail(where, "wgmma descriptor: swizzle mode %d; only 128 bytes (1) is known", static_cast<int>(d >> 62));
  if (d >> 49 & 7) fail(where, "wgmma descriptor: the base offset must be 0");
}

// Where in the block's window eight elements lie that are contiguous in shared memory: K-major row `line`, K from 8 * chunk; or MN-major depth
// `line`, rows from 8 * chunk.
uint32_t chunk_address(uint64_t d, bool transposed, int line, int chunk) {
  const uint32_t rows = start(d) + static_cast<uint32_t>(line % 8 * 128 + line / 8 * static_cast<int>(stride(d)));
  return swizzle128(transposed ? rows + chunk / 8 * leading(d) + chunk % 8 * 16 : rows + chunk * 16);
}

// visit(address, line, chunk) for the operand's rows first..first+count-1.
template <class Visit> void operand(uint64_t d, bool transposed, int first, int count, Visit&& visit) {
  const uint32_t window = current->block->rank * shared_window;
  if (transposed)
    for (int k = 0; k < depth; k++)
      for (int chunk = first / 8; chunk < (first + count) / 8; chunk++) visit(window + chunk_address(d, true, k, chunk), k, chunk);
  else
    for (int row = first; row < first + count; row++)
      for (int chunk = 0; chunk < depth / 8; chunk++) visit(window + chunk_address(d, false, row, chunk), row, chunk);
}

void check_operand(uint64_t d, bool transposed, int first, int count, uint32_t stamp, const Where& where) {
  Block& block = *current->block;
  const Warp& warp = *current->warp;
  operand(d, transposed, first, count, [&](uint32_t address, int, int) {
    shared_at(block, address, 16, 16, "wgmma operand", where);
    if (!settings.races) return;
    block.shadow.check_fenced(shared_offset(address), warp.known, where);
    block.shadow.read(shared_offset(address), 16, {block.cluster.async_agent(warp), stamp, warp.id, no_lane, 0}, warp.known, where);
  });
}

float element(Format format, uint16_t bits) { return format == Format::bf16 ? ptx::to_float(ptx::bf16{bits}) : ptx::to_float(ptx::f16{bits}); }

// Rows first..first+count-1 into out[row - first][k] with the given strides.
void read_operand(const Block& block, uint64_t d, bool transposed, Format format, int first, int count, float* out, int row_stride,
                  int k_stride) {
  operand(d, transposed, first, count, [&](uint32_t address, int line, int chunk) {
    uint16_t bits[8];
    memcpy(bits, block.shared + shared_offset(address), sizeof bits);
    for (int i = 0; i < 8; i++) {
      const int row = transposed ? chunk * 8 + i : line, k = transposed ? line : chunk * 8 + i;
      out[(row - first) * row_stride + k * k_stride] = element(format, bits[i]);
    }
  });
}

const float* panel(Block& block, const Product& p) {
  for (const Panel& kept : block.panels)
    if (kept.descriptor == p.b && kept.version == block.shared_version && kept.columns == p.columns && kept.format == p.format &&
        kept.transposed == p.b_transposed)
      return kept.values;
  Panel& next = block.panels[block.next_panel++ % std::size(block.panels)];
  next.descriptor = p.b;
  next.version = block.shared_version;
  next.columns = p.columns;
  next.format = p.format;
  next.transposed = p.b_transposed;
  read_operand(block, p.b, p.b_transposed, p.format, 0, p.columns, next.values, 1, p.columns);
  return next.values;
}

// The warp's 16 rows, from or to the registers of its lanes.
template <class Move> void rows_and_registers(const Product& p, float* rows, Move&& move) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < p.columns / 2; i += 2)
      move(rows + (lane / 4 + i / 2 % 2 * 8) * p.columns + i / 4 * 8 + lane % 4 * 2, p.registers[lane] + i);
}

// The queue's products up to the group, in order; those that go on in the same registers without moving them between.
void run_products(Warp& warp, int groups) {
  thread_local float rows[16 * 256];
  auto& queue = warp.products.products;
  Block& block = *warp.block;
  size_t i = 0;
  while (i < queue.size() && queue[i].group < groups) {
    const Product& first = queue[i];
    if (first.lanes != ~0u) fail(first.where, "wgmma was not issued by all lanes of the warp");
    if (first.accumulate) rows_and_registers(first, rows, [](float* row, const float* r) { memcpy(row, r, 8); });
    for (; i < queue.size() && queue[i].group < groups && queue[i].registers[0] == first.registers[0] && queue[i].columns == first.columns; i++) {
      const Product& p = queue[i];
      float a[16 * depth];
      read_operand(block, p.a, p.a_transposed, p.format, warp.number % 4 * 16, 16, a, depth, 1);
      if (!p.accumulate) memset(rows, 0, sizeof(float) * 16 * p.columns);
      multiply(rows, p.columns, a, depth, panel(block, p), p.columns, 16, p.columns, depth);
    }
    rows_and_registers(first, rows, [](const float* row, float* r) { memcpy(r, row, 8); });
  }
  warp.products.done += static_cast<uint32_t>(i);
  queue.erase(queue.begin(), queue.begin() + static_cast<ptrdiff_t>(i));
}

}  // namespace

void issue_product(const Product& product, float* registers) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  const Where& where = product.where;
  if (!self.products.fenced) fail(where, "wgmma without a wgmma_fence since the last wgmma_commit");
  if (warp.live != ~0u) fail(where, "wgmma in a warp where some lanes have returned from the kernel");
  auto& queue = warp.products.products;
  const uint32_t at = self.products.issued++ - warp.products.done;
  if (at == queue.size()) {  // the first lane here
    check_descriptor(product.a, where);
    check_descriptor(product.b, where);
    queue.push_back(product);
    queue.back().group = self.products.group;
    queue.back().stamp = ++warp.issued;
    warp.products.group_stamps.resize(self.products.group + 1, warp.issued);
    warp.products.group_stamps.back() = warp.issued;
    check_operand(product.a, product.a_transposed, warp.number % 4 * 16, 16, warp.issued, where);
    check_operand(product.b, product.b_transposed, 0, product.columns, warp.issued, where);
    for (uint64_t part : {product.a, product.b, uint64_t{product.accumulate}})
      warp.products.hash = (warp.products.hash ^ part) * 0x9e3779b97f4a7c15u + 1;
  }
  Product& p = queue[at];
  if (p.a != product.a || p.b != product.b || p.accumulate != product.accumulate || p.group != self.products.group ||
      p.where.line() != where.line())
    fail(where, "wgmma differs between the lanes of a warp");
  p.registers[self.lane] = registers;
  p.lanes |= 1u << self.lane;
  // All lanes of the warp have to decide alike.
  const bool now = settings.completion == Completion::early ||
                   (settings.completion == Completion::random && (p.stamp * 2654435761u + settings.seed) & 64);
  if (!now) return;
  int nothing = 0;
  together("wgmma", nothing, where, [&](int**) { run_products(warp, self.products.group + 1); });
}

void wait_products(int newest_left, const Where& where) {
  struct Argument { int groups; } argument{current->products.group - newest_left};
  together("wgmma_wait", argument, where, [&](Argument** lanes) {
    Warp& warp = *current->warp;
    const int groups = lanes[0]->groups;
    for (int lane = 1; lane < 32; lane++)
      if (lanes[lane]->groups != groups) fail(where, "lanes of the warp have committed different numbers of wgmma groups");
    run_products(warp, groups);
    const auto& stamps = warp.products.group_stamps;
    if (groups <= 0 || stamps.empty()) return;
    uint32_t& seen = warp.known.seen.of[warp.cluster->async_agent(warp)];
    seen = std::max(seen, stamps[std::min<size_t>(groups, stamps.size()) - 1]);
  });
}

void check_warpgroups(const Cluster& cluster) {
  for (const Warp& warp : cluster.warps) {
    const Warp& first = cluster.warps[warp.id - warp.number % 4];
    const bool whole = first.number + 4 <= warp.block->threads / 32;
    if (whole && warp.products.hash != first.products.hash)
      throw Failure(std::string(cluster.kernel->name) + ", block " + std::to_string(warp.block->id) + ": warps " +
                    std::to_string(first.number) + " and " + std::to_string(warp.number) + ", of one warpgroup, issued different wgmma");
  }
}

}  // namespace emulator
