#include "emulator/launch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "emulator/cluster.h"
#include "emulator/memory.h"

namespace emulator {
namespace {

constexpr size_t max_params_bytes = 4096;
constexpr uint32_t max_shared_bytes = 227 * 1024;

std::map<std::string, const Kernel*>& table() {
  static std::map<std::string, const Kernel*> kernels;
  return kernels;
}

// Clusters that have ended well, kept for the next launch of the same shape.
class Pool {
 public:
  std::unique_ptr<Cluster> take(const Kernel& k) {
    const std::lock_guard lock(mutex_);
    for (auto& c : clusters_)
      if (c->blocks.size() == static_cast<size_t>(k.cluster) && c->blocks[0]->threads == k.threads && c->blocks[0]->shared_bytes == k.shared_bytes) {
        std::swap(c, clusters_.back());
        auto cluster = std::move(clusters_.back());
        clusters_.pop_back();
        return cluster;
      }
    return std::make_unique<Cluster>(k.cluster, k.threads, k.shared_bytes);
  }
  void give(std::unique_ptr<Cluster> cluster) {
    const std::lock_guard lock(mutex_);
    if (clusters_.size() == 8) clusters_.erase(clusters_.begin());
    clusters_.push_back(std::move(cluster));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
} pool;

}  // namespace

Kernel::Kernel(const char* name, int threads, uint32_t shared_bytes, int cluster, size_t params_bytes, void (*body)(const void*))
    : name(name), threads(threads), shared_bytes(shared_bytes), cluster(cluster), params_bytes(params_bytes), body(body) {
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

void launch(const std::string& name, int64_t blocks, const void* params, size_t params_bytes) {
  const Kernel& k = kernel(name);
  if (params_bytes != k.params_bytes)
    throw Failure(name + ": parameters of " + std::to_string(params_bytes) + " bytes; the kernel has " + std::to_string(k.params_bytes));
  if (params_bytes > max_params_bytes) throw Failure(name + ": more than 4096 bytes of parameters");
  if (k.threads <= 0 || k.threads > 1024 || k.threads % 32) throw Failure(name + ": threads must be a multiple of 32 up to 1024");
  if (k.threads * k.cluster > 32 * max_warps) throw Failure(name + ": a cluster of more than 1024 threads, which is not emulated");
  if (k.shared_bytes > max_shared_bytes) throw Failure(name + ": more than 227 KiB of shared memory");
  if (blocks <= 0 || blocks > INT32_MAX) throw Failure(name + ": a grid of " + std::to_string(blocks) + " blocks");
  if (blocks % k.cluster)
    throw Failure(name + ": a grid of " + std::to_string(blocks) + " blocks is no multiple of the " + std::to_string(k.cluster) + " of a cluster");
  alignas(64) char copy[max_params_bytes];
  memcpy(copy, params, params_bytes);
  start_ranges();

  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    auto cluster = pool.take(k);
    cluster->kernel = &k;
    cluster->params = copy;
    try {
      for (int64_t first; (first = next.fetch_add(k.cluster)) < blocks;) cluster->run(static_cast<int>(first), static_cast<int>(blocks));
    } catch (const Failure& failure) {
      next = blocks;
      const std::lock_guard lock(mutex);
      if (error.empty()) error = failure.what();
      return;
    }
    pool.give(std::move(cluster));
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(settings.workers, blocks / k.cluster); i++) helpers.emplace_back(work);
  work();
  for (std::thread& t : helpers) t.join();
  if (!error.empty()) throw Failure(error);
}

}  // namespace emulator
