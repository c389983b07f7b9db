#include "emulator/memory.h"

#include <algorithm>
#include <vector>

#include "emulator/global_races.h"
#include "emulator/settings.h"

namespace emulator {
namespace {

// A bit per byte; an aligned access of up to 16 bytes lies within one word.
class Bits {
 public:
  explicit Bits(size_t bytes) : words_(bytes / 64 + 2) {}
  void clear() {
    for (auto& word : words_) word.store(0, std::memory_order_relaxed);
  }
  bool set(size_t at, size_t bytes) { return words_[at / 64].fetch_or(mask(at, bytes), std::memory_order_relaxed) & mask(at, bytes); }
  bool any(size_t at, size_t bytes) const { return words_[at / 64].load(std::memory_order_relaxed) & mask(at, bytes); }
  bool all(size_t at, size_t bytes) const { return !(~words_[at / 64].load(std::memory_order_relaxed) & mask(at, bytes)); }

 private:
  static uint64_t mask(size_t at, size_t bytes) { return ((uint64_t{1} << bytes) - 1) << at % 64; }
  std::vector<std::atomic<uint64_t>> words_;
};

struct Range {
  uintptr_t low, high, origin;  // origin: low rounded down to a word of bits
  std::string name;
  Use use;
  Bits written, read_only;
  GlobalShadow shadow;
  Range(const void* base, size_t bytes, const char* name, Use use)
      : low(reinterpret_cast<uintptr_t>(base)), high(low + bytes), origin(low & ~uintptr_t{63}), name(name), use(use),
        written(use == Use::read_only ? 0 : bytes + 64), read_only(use == Use::read_write ? bytes + 64 : 0),
        shadow(use == Use::read_write ? bytes : 0) {}
  bool watched() const { return use == Use::read_write && settings.races; }
};

std::vector<std::unique_ptr<Range>> ranges;  // in the order of their addresses
uint64_t generation = 0;
thread_local Range* last = nullptr;
thread_local uint64_t last_generation = 0;

auto after(uintptr_t address) {
  return std::upper_bound(ranges.begin(), ranges.end(), address, [](uintptr_t a, const auto& r) { return a < r->low; });
}

[[noreturn]] void fail_outside(uintptr_t address, size_t bytes, const char* what, const Where& where) {
  const auto next = after(address);
  const Range* near = next == ranges.end() ? nullptr : next->get();
  if (next != ranges.begin()) {
    const Range* before = std::prev(next)->get();
    if (!near || address - before->high < near->low - address || address < before->high) near = before;
  }
  fail(where, "%s of %zu bytes at %p is out of bounds: %+td bytes from the start of %s, which has %zu", what, bytes,
       reinterpret_cast<void*>(address), static_cast<ptrdiff_t>(address - near->low), near->name.c_str(), near->high - near->low);
}

// The range of an access, or null where no ranges are registered.
Range* find(const void* pointer, size_t bytes, const char* what, const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % bytes) fail(where, "%s of %zu bytes at %p is misaligned", what, bytes, pointer);
  if (last_generation != generation) last = nullptr, last_generation = generation;
  if (last && address >= last->low && address + bytes <= last->high) return last;
  if (!pointer) fail(where, "%s through a null pointer", what);
  if (ranges.empty()) return nullptr;
  const auto next = after(address);
  if (next != ranges.begin() && address + bytes <= std::prev(next)->get()->high) return last = std::prev(next)->get();
  fail_outside(address, bytes, what, where);
}

size_t offset(const Range& r, const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) - r.low; }
size_t bit(const Range& r, const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) - r.origin; }

}  // namespace

void add_range(const void* base, size_t bytes, const char* name, Use use) {
  const auto at = after(reinterpret_cast<uintptr_t>(base));
  ranges.insert(at, std::make_unique<Range>(base, bytes, name, use));
  generation++;
}

void remove_range(const void* base) {
  std::erase_if(ranges, [&](const auto& r) { return r->low == reinterpret_cast<uintptr_t>(base); });
  generation++;
}

size_t unwritten(const void* base) {
  const auto next = after(reinterpret_cast<uintptr_t>(base));
  const Range& r = *std::prev(next)->get();
  size_t count = 0;
  for (uintptr_t a = r.low; a < r.high; a++) count += !r.written.any(a - r.origin, 1);
  return count;
}

void start_ranges() {
  for (auto& r : ranges) {
    r->written.clear();
    r->read_only.clear();
    r->shadow.start();
  }
}

void check_load(const void* from, size_t bytes, const char* what, const Where& where) {
  Range* r = find(from, bytes, what, where);
  if (r && r->use == Use::write_once && !r->written.all(bit(*r, from), bytes))
    fail(where, "%s of %s at byte %zu, which is an output and not yet written", what, r->name.c_str(), offset(*r, from));
  if (r && r->watched()) r->shadow.read(offset(*r, from), bytes, r->name.c_str(), where);
}

void check_load_readonly(const void* from, size_t bytes, const char* what, const Where& where) {
  Range* r = find(from, bytes, what, where);
  if (!r || r->use == Use::read_only) return;
  if (r->use == Use::write_once) fail(where, "%s of %s, an output, through the read-only cache", what, r->name.c_str());
  if (r->written.any(bit(*r, from), bytes))
    fail(where, "%s of %s at byte %zu through the read-only cache, but this kernel wrote it", what, r->name.c_str(), offset(*r, from));
  r->read_only.set(bit(*r, from), bytes);
}

void check_store(const void* to, size_t bytes, const char* what, const Where& where) {
  Range* r = find(to, bytes, what, where);
  if (!r) return;
  if (r->use == Use::read_only) fail(where, "%s to %s at byte %zu, which is read-only", what, r->name.c_str(), offset(*r, to));
  const bool again = r->written.set(bit(*r, to), bytes);
  if (again && r->use == Use::write_once)
    fail(where, "%s to %s at byte %zu, which was written before", what, r->name.c_str(), offset(*r, to));
  if (r->use == Use::read_write && r->read_only.any(bit(*r, to), bytes))
    fail(where, "%s to %s at byte %zu, which this kernel read through the read-only cache", what, r->name.c_str(), offset(*r, to));
  if (r->watched()) r->shadow.write(offset(*r, to), bytes, false, r->name.c_str(), where);
}

void check_atomic(const void* at, size_t bytes, const char* what, const Where& where) {
  Range* r = find(at, bytes, what, where);
  if (!r) return;
  if (r->use != Use::read_write)
    fail(where, "%s on %s, which is %s", what, r->name.c_str(), r->use == Use::read_only ? "read-only" : "write-once");
  r->written.set(bit(*r, at), bytes);
  if (r->watched()) r->shadow.write(offset(*r, at), bytes, true, r->name.c_str(), where);
}

}  // namespace emulator
