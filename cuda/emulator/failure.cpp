#include "emulator/failure.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/cluster.h"
#include "emulator/launch.h"

namespace emulator {

std::string short_place(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ':' + std::to_string(where.line());
}

void fail(const Where& where, const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Fiber& self = *current;
  Cluster& cluster = *self.cluster;
  char who[200];
  snprintf(who, sizeof who, "%s, block %d, warp %d, lane %d: ", cluster.kernel->name, self.block->id, self.warp->number, self.lane);
  cluster.error = short_place(where) + ": " + who + text;
  switch_to(self.context, cluster.host);
  abort();  // nobody comes back to a cluster that failed
}

}  // namespace emulator
