#include "emulator/failure.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/block.h"
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
  Block& block = *self.block;
  char who[200];
  snprintf(who, sizeof who, "%s, block %d, warp %d, lane %d: ", block.kernel->name, block.id, self.warp->id, self.lane);
  block.error = short_place(where) + ": " + who + text;
  switch_to(self.context, block.host);
  abort();  // nobody comes back to a block that failed
}

}  // namespace emulator
