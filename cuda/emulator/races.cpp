#include "emulator/races.h"

#include <string>

#include "emulator/cluster.h"

namespace emulator {

void Shadow::resize(uint32_t bytes, int warps) {
  const size_t granules = bytes / 16 + 1;
  agents_ = (2 * warps + 7) & ~7;
  writes_.assign(granules, {});
  writers_.assign(granules, {});
  readers_.assign(granules, {});
  read_stamps_.assign(granules * agents_, 0);
  read_bytes_.assign(granules * agents_, 0);
}

void Shadow::fail_race(const char* what, uint32_t g, int agent, const char* earlier, const Where& then, const Where& where) const {
  fail(where, "race: %s of shared bytes %u..%u%s is not ordered after a %s by %s at %s", what, g * 16, g * 16 + 15,
       this == &current->block->shadow ? "" : " of the other block", earlier, current->cluster->agent_name(agent).c_str(),
       short_place(then).c_str());
}

void Shadow::fail_lanes(const char* what, uint32_t g, int lane, const char* earlier, const Where& then, const Where& where) const {
  fail(where, "race: %s of shared bytes %u..%u after a %s by %s of this warp at %s, without a sync_warp or barrier between", what,
       g * 16, g * 16 + 15, earlier, lane == several_lanes ? "several lanes" : ("lane " + std::to_string(lane)).c_str(),
       short_place(then).c_str());
}

void Shadow::fail_unfenced(uint32_t g, const Where& where) const {
  fail(where, "shared bytes %u..%u were written at %s, and no fence_proxy_async lies between that and this asynchronous read",
       g * 16, g * 16 + 15, short_place(writes_[g].where).c_str());
}

}  // namespace emulator
