// How launches are run: when asynchronous work happens, and in which order threads take turns.
#pragma once
#include <cstdint>
#include <string>

namespace emulator {

enum class Completion {
  late,   // when something waits for it, or when no thread can run
  early,  // at once
  random  // at any time between
};

struct Settings {
  Completion completion = Completion::late;
  bool shuffle = false;  // the order of threads is drawn from `seed`; otherwise each runs until it has to wait
  uint64_t seed = 1;     // also draws the errors of approximations and the lane that elect_one picks; 0 means no errors
  bool races = true;     // look for unordered accesses to shared memory
  int workers = 1;       // operating system threads, each running one cluster at a time
};
inline Settings settings;

inline std::string describe(const Settings& s) {
  static const char* const completions[] = {"late", "early", "random"};
  return std::string(completions[static_cast<int>(s.completion)]) + (s.shuffle ? ", shuffled" : ", in order") + ", seed " +
         std::to_string(s.seed);
}

}  // namespace emulator
