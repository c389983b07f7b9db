#include "emulator/bug.h"

#include <algorithm>
#include <stdexcept>

namespace emulator {

static std::vector<std::string>& names() {
  static std::vector<std::string> all;
  return all;
}

int add_bug(const char* name) {
  const auto found = std::find(names().begin(), names().end(), name);
  if (found == names().end()) names().push_back(name);
  return static_cast<int>(std::find(names().begin(), names().end(), name) - names().begin()) + 1;
}

std::vector<std::string> bugs() { return names(); }

void seed_bug(const std::string& name) {
  const auto found = std::find(names().begin(), names().end(), name);
  if (found == names().end()) throw std::invalid_argument("no bug of the name " + name);
  seeded = static_cast<int>(found - names().begin()) + 1;
}

}  // namespace emulator
