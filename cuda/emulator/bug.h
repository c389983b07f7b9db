// Bugs put into kernels on purpose, to see that the emulator finds them.
//
// BUG(name) is true in the one run that seeds this bug, and a constant false on a GPU:
//   if (!BUG(up_no_barrier)) sync_block();
// Names, or numbers, are unique in the program; a name that a template uses in several instances is one bug.
#pragma once
#include <string>
#include <vector>

namespace emulator {

struct BugName {
  char text[64] = {};
  consteval BugName(const char* name) {
    for (int i = 0; name[i]; i++) text[i] = name[i];  // a name that is too long does not compile
  }
};

int add_bug(const char* name);  // a number of its own, from 1; the same for the same name
std::vector<std::string> bugs();
void seed_bug(const std::string& name);  // throws std::invalid_argument where there is none of that name
inline int seeded = 0;
inline bool reached = false;  // whether a kernel has come by the seeded bug
inline bool is_seeded(int number) {
  if (number != seeded) return false;
  return reached = true;
}

template <BugName name> inline const int bug_number = add_bug(name.text);

}  // namespace emulator

#define BUG(name) emulator::is_seeded(emulator::bug_number<#name>)
