// Finds accesses to global memory that nothing orders: by different threads of a launch to the same bytes of what the kernel
// both reads and writes, one of them a write. The clocks of races.h tell what is ordered within a block; blocks run in any
// order, and those of a cluster hand nothing on through global memory either.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "emulator/races.h"

namespace emulator {

class GlobalShadow {
 public:
  explicit GlobalShadow(size_t bytes) : units_(bytes / unit + 2) {}
  void start() { launch_++; }  // what came before is ordered
  void read(size_t offset, size_t bytes, const char* name, const Where& where) { visit(offset, bytes, false, false, name, where); }
  void write(size_t offset, size_t bytes, bool atomic, const char* name, const Where& where) {
    visit(offset, bytes, true, atomic, name, where);
  }

 private:
  static constexpr size_t unit = 2;  // bytes: no element is smaller
  struct Touch {
    uint32_t launch = 0, block = 0, stamp = 0, epoch = 0;
    uint8_t warp = 0, lane = 0;
    bool atomic = false;
    Where where;
  };
  struct Unit {
    Touch write, read;  // the last ones
  };

  bool ordered(const Touch& before, const Touch& now) const;
  void visit(size_t offset, size_t bytes, bool writes, bool atomic, const char* name, const Where& where);

  uint32_t launch_ = 1;
  std::mutex mutex_;  // blocks may run in several threads
  std::vector<Unit> units_;
};

}  // namespace emulator
