#include "emulator/block.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "emulator/cluster.h"

namespace emulator {

static constexpr size_t page = 4096;
static size_t shared_pages(uint32_t bytes) { return (bytes + page - 1) / page * page; }

Block::Block(Cluster& cluster, int rank, int threads, uint32_t shared_bytes)
    : cluster(cluster), rank(rank), threads(threads), shared_bytes(shared_bytes) {
  // Pages that may not be touched on both sides: what lies past the end by more than the checks see.
  char* memory = static_cast<char*>(mmap(nullptr, shared_pages(shared_bytes) + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory + page, shared_pages(shared_bytes), PROT_READ | PROT_WRITE);
  shared = reinterpret_cast<uint8_t*>(memory + page);
  shadow.resize(shared_bytes, cluster.warp_count);
}

Block::~Block() { munmap(shared - page, shared_pages(shared_bytes) + 2 * page); }

void Block::start(int block_id) {
  id = block_id;
  live = threads;
  memset(shared, 0xff, shared_bytes);  // NaN in every format
  shared_version++;
  for (Barrier& b : named) b = {};
  mbarriers.clear();
  for (Reach& r : reached) r = {};
}

void Block::end() {
  Clock known;
  for (const Warp& warp : cluster.warps)
    if (warp.block == this) known.join(warp.known.seen, cluster.agents);
  for (int agent = 0; agent < cluster.agents; agent++)
    if (reached[agent].stamp > known.of[agent])
      fail(reached[agent].where, "this by %s in the block's memory is not ordered before the block has returned from the kernel",
           cluster.agent_name(agent).c_str());
  for (const Pending& work : cluster.pending)
    if (work.block == this) fail(work.where, "the block ends while this is in flight");
  for (const auto& [offset, barrier] : mbarriers)
    if (barrier.bytes)
      fail(barrier.where, "the block ends while its mbarrier at shared byte %u has been told to expect %lld bytes %s than came", offset,
           static_cast<long long>(std::abs(barrier.bytes)), barrier.bytes < 0 ? "less" : "more");
}

void reach(Block& block, int agent, uint32_t stamp, const char* what, const Where& where) {
  if (&block == current->block) return;
  if (!block.live) fail(where, "%s in the memory of block %d, which has returned from the kernel", what, block.id);
  block.reached[agent] = {stamp, where};
}

}  // namespace emulator
