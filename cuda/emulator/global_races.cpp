#include "emulator/global_races.h"

#include "emulator/scheduler.h"

namespace emulator {

bool GlobalShadow::ordered(const Touch& before, const Touch& now) const {
  if (before.launch != launch_ || (before.atomic && now.atomic)) return true;
  if (before.block != now.block) return false;
  if (before.warp != now.warp) return before.stamp <= current->warp->known.seen.of[before.warp];
  return before.lane == now.lane || before.epoch != now.epoch;
}

void GlobalShadow::visit(size_t offset, size_t bytes, bool writes, bool atomic, const char* name, const Where& where) {
  const Access access = own_access(atomic);
  const Touch now{launch_, static_cast<uint32_t>(current->block->id), access.stamp, access.epoch, static_cast<uint8_t>(access.warp),
                  access.lane, atomic, where};
  Touch conflict;
  const char* earlier = nullptr;
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = offset / unit; i * unit < offset + bytes; i++) {
      Unit& u = units_[i];
      if (!ordered(u.write, now)) conflict = u.write, earlier = "write";
      if (writes && !ordered(u.read, now)) conflict = u.read, earlier = "read";
      (writes ? u.write : u.read) = now;
    }
  }
  if (earlier)
    fail(where, "race: %s of %s at byte %zu is not ordered after a %s by block %u, warp %d, lane %d at %s", writes ? "write" : "read", name,
         offset, earlier, conflict.block, current->cluster->warps[conflict.warp].number, conflict.lane, short_place(conflict.where).c_str());
}

}  // namespace emulator
