#include "emulator/launch.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "emulator/memory.h"
#include "emulator/scheduler.h"
#include "emulator/shared.h"

namespace emulator {
namespace {

constexpr size_t page = 4096, max_params_bytes = 4096;
constexpr uint32_t max_shared_bytes = 227 * 1024;

std::map<std::string, const Kernel*>& table() {
  static std::map<std::string, const Kernel*> kernels;
  return kernels;
}

size_t shared_pages(uint32_t bytes) { return (bytes + page - 1) / page * page; }

void run_threads() {
  entered();
  for (;;) {
    current->block->kernel->body(current->block->params);
    finish();
  }
}

// Blocks that have ended well, kept for the next launch of the same shape.
class Pool {
 public:
  std::unique_ptr<Block> take(const Kernel& k) {
    const std::lock_guard lock(mutex_);
    for (auto& b : blocks_)
      if (b->threads == k.threads && b->shared_bytes == k.shared_bytes) {
        std::swap(b, blocks_.back());
        auto block = std::move(blocks_.back());
        blocks_.pop_back();
        return block;
      }
    return std::make_unique<Block>(k.threads, k.shared_bytes);
  }
  void give(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    if (blocks_.size() == 8) blocks_.erase(blocks_.begin());
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
} pool;

}  // namespace

Kernel::Kernel(const char* name, int threads, uint32_t shared_bytes, size_t params_bytes, void (*body)(const void*))
    : name(name), threads(threads), shared_bytes(shared_bytes), params_bytes(params_bytes), body(body) {
  table()[name] = this;
}

const Kernel& kernel(const std::string& name) {
  const auto found = table().find(name);
  if (found == table().end()) throw Failure("there is no kernel of the name " + name);
  return *found->second;
}

std::vector<const Kernel*> kernels() {
  std::vector<const Kernel*> all;
  for (const auto& [name, k] : table()) all.push_back(k);
  return all;
}

Block::Block(int threads, uint32_t shared_bytes)
    : threads(threads), warp_count(threads / 32), agents((2 * warp_count + 7) & ~7), shared_bytes(shared_bytes),
      fibers(threads), warps(warp_count), stacks(std::make_unique<Stacks>(threads)) {
  // Pages that may not be touched on both sides: what lies past the end by more than the checks see.
  char* memory = static_cast<char*>(mmap(nullptr, shared_pages(shared_bytes) + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory + page, shared_pages(shared_bytes), PROT_READ | PROT_WRITE);
  shared = reinterpret_cast<uint8_t*>(memory + page);
  shadow.resize(shared_bytes, warp_count);
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.id = i;
    f.lane = i % 32;
    f.warp = &warps[i / 32];
    f.block = this;
    prepare(f.context, (*stacks)[i], Stacks::bytes, run_threads);
  }
  for (int w = 0; w < warp_count; w++) {
    warps[w].id = w;
    warps[w].block = this;
  }
}

Block::~Block() { munmap(shared - page, shared_pages(shared_bytes) + 2 * page); }

void Block::start(int block_id) {
  id = block_id;
  random_state = (settings.seed + 1) * 0x9e3779b97f4a7c15u ^ (static_cast<uint64_t>(id) * 0xd1b54a32d192ed03u + 77);
  for (int i = 0; i < 4; i++) random();
  memset(shared, 0xff, shared_bytes);  // NaN in every format
  for (NamedBarrier& b : named) b = {};
  mbarriers.clear();
  pending.clear();
  shared_version++;
  // Stamps go on from block to block, so that the records of the last one count as long known.
  for (const Warp& w : warps) highest_stamp = std::max({highest_stamp, w.known.seen.of[w.id], w.issued});
  live = threads;
  for (Warp& w : warps) {
    for (int agent = 0; agent < agents; agent++) w.known.seen.of[agent] = w.known.fenced.of[agent] = highest_stamp;
    release(w);
    w.issued = highest_stamp;
    w.ready = w.live = ~0u;
    w.arrived = 0;
    w.epoch++;
    w.products = {};
  }
  ready_warps = warp_count == 32 ? ~0u : (1u << warp_count) - 1;
  for (Fiber& f : fibers) {
    f.done = false;
    f.copies = {};
    f.stores = {};
    f.products = {};
    f.polled = nullptr;
  }
}

void Block::run(int block_id) {
  start(block_id);
  prepare_own(host);
  current = &fibers[settings.shuffle ? random() % fibers.size() : 0];
  switch_to(host, current->context);
  current = nullptr;
  if (!error.empty()) throw Failure(error);
  check_warpgroups(*this);
}

void launch(const std::string& name, int64_t blocks, const void* params, size_t params_bytes) {
  const Kernel& k = kernel(name);
  if (params_bytes != k.params_bytes)
    throw Failure(name + ": parameters of " + std::to_string(params_bytes) + " bytes; the kernel has " + std::to_string(k.params_bytes));
  if (params_bytes > max_params_bytes) throw Failure(name + ": more than 4096 bytes of parameters");
  if (k.threads <= 0 || k.threads > 1024 || k.threads % 32) throw Failure(name + ": threads must be a multiple of 32 up to 1024");
  if (k.shared_bytes > max_shared_bytes) throw Failure(name + ": more than 227 KiB of shared memory");
  if (blocks <= 0 || blocks > INT32_MAX) throw Failure(name + ": a grid of " + std::to_string(blocks) + " blocks");
  alignas(64) char copy[max_params_bytes];
  memcpy(copy, params, params_bytes);
  start_ranges();

  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    auto block = pool.take(k);
    block->kernel = &k;
    block->params = copy;
    block->count = static_cast<int>(blocks);
    try {
      for (int64_t i; (i = next++) < blocks;) block->run(static_cast<int>(i));
    } catch (const Failure& failure) {
      next = blocks;
      const std::lock_guard lock(mutex);
      if (error.empty()) error = failure.what();
      return;
    }
    pool.give(std::move(block));
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(settings.workers, blocks); i++) helpers.emplace_back(work);
  work();
  for (std::thread& t : helpers) t.join();
  if (!error.empty()) throw Failure(error);
}

}  // namespace emulator
