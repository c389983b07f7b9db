#include "tests/harness.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "emulator/bug.h"
#include "emulator/settings.h"

namespace test {
namespace {

constexpr size_t page = 4096;
constexpr unsigned longest_seconds = 120;  // for one run of one test
std::mt19937_64 generator;
std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Options {
  int runs = 9;
  uint64_t seed = 1;
  std::string filter, bug;
  bool list = false, bugs = false;
};

// The first runs are those without chance, the rest go round the three completions, shuffled.
void set_schedule(int run, uint64_t first_seed) {
  emulator::Settings& s = emulator::settings;
  s.completion = static_cast<emulator::Completion>(run % 3);
  s.shuffle = run >= 2;
  s.seed = run < 2 ? 0 : first_seed + run;
}

std::string place(const Test& t) { return t.name + " (" + emulator::describe(emulator::settings) + ")"; }

// Whether it passed; prints why not.
bool run_once(const Test& test) {
  generator.seed(std::hash<std::string>()(test.name) ^ emulator::settings.seed * 0x9e3779b97f4a7c15u);
  alarm(longest_seconds);
  try {
    test.body();
  } catch (const std::exception& e) {
    printf("FAILED %s\n    %s\n", place(test).c_str(), e.what());
    return false;
  }
  alarm(0);
  return true;
}

std::string running;
void on_signal(int signal) {
  char text[300];
  const int size = snprintf(text, sizeof text, "FAILED %s\n    %s\n", running.c_str(),
                            signal == SIGALRM ? "no end in sight" : "a guard page was touched, or worse");
  if (write(1, text, size) < 0) _exit(4);
  _exit(3);
}
void catch_signals() {
  static char stack[64 * 1024];
  const stack_t alternative{stack, 0, sizeof stack};
  sigaltstack(&alternative, nullptr);
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGALRM}) sigaction(signal, &action, nullptr);
}

std::vector<Test> chosen(const Options& o) {
  std::vector<Test> some;
  for (const Test& t : tests())
    if (t.name.find(o.filter) != std::string::npos) some.push_back(t);
  return some;
}

int run_all(const Options& o) {
  int failures = 0, runs = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto some = chosen(o);
  for (const Test& t : some)
    for (int run = 0; run < o.runs; run++, runs++) {
      set_schedule(run, o.seed);
      running = place(t);
      if (!run_once(t)) {
        failures++;
        break;
      }
    }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  printf("%zu tests, %d runs, %d failed, %.1f s\n", some.size(), runs, failures, seconds);
  return failures != 0 || some.empty();
}

// How the process of a seeded bug ends.
enum Outcome { missed, caught, unreached };  // unreached: no test comes by that line in nine runs

// Each bug in a process of its own, until the first run that notices it.
int run_bugs(const Options& o) {
  int all[3] = {};
  for (const std::string& bug : emulator::bugs()) {
    fflush(stdout);
    const pid_t child = fork();
    if (!child) {
      emulator::seed_bug(bug);
      const auto some = chosen(o);
      for (int run = 0; run < o.runs && (run < 9 || emulator::reached); run++)
        for (const Test& t : some) {
          set_schedule(run, o.seed);
          running = place(t);
          if (!run_once(t)) {
            fflush(stdout);
            _exit(caught);
          }
        }
      _exit(emulator::reached ? missed : unreached);
    }
    int status = 0;
    waitpid(child, &status, 0);
    // What no program returns on purpose is an end by a signal, or on_signal's.
    const int outcome = WIFEXITED(status) && WEXITSTATUS(status) <= unreached ? WEXITSTATUS(status) : caught;
    printf("%s %s\n", std::array{"MISSED", "caught", "unreached"}[outcome], bug.c_str());
    all[outcome]++;
  }
  printf("%d of %d seeded bugs caught\n", all[caught], all[caught] + all[missed]);
  return all[missed] != 0;
}

}  // namespace

Test::Test(const std::string& name, const std::function<void()>& body) : name(name), body(body) { tests().push_back(*this); }

void failed(const std::string& why, const Where& where) { throw std::runtime_error(emulator::short_place(where) + ": " + why); }

std::mt19937_64& random() { return generator; }

void expect_failure(const std::string& part, const std::function<void()>& body, Where where) {
  try {
    body();
  } catch (const emulator::Failure& failure) {
    if (std::string(failure.what()).find(part) == std::string::npos)
      failed("it failed with \"" + std::string(failure.what()) + "\", not with \"" + part + '"', where);
    return;
  }
  failed("it did not fail; wanted \"" + part + '"', where);
}

Memory::Memory(const char* name, size_t bytes, emulator::Use use) : name_(name) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + 15) / 16 * 16;  // allocations are aligned, so the last bytes may be padding
  pages_ = (rounded + page - 1) / page * page + 2 * page;
  map_ = static_cast<char*>(mmap(nullptr, pages_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(map_ + page, pages_ - 2 * page, PROT_READ | PROT_WRITE);
  data_ = map_ + pages_ - page - rounded;
  emulator::add_range(data_, bytes, name, use);
}
Memory::~Memory() {
  if (!map_) return;
  emulator::remove_range(data_);
  munmap(map_, pages_);
}

}  // namespace test

#ifdef __SANITIZE_ADDRESS__
// A kernel that fails leaves its threads' stacks behind, and what those own.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

int main(int count, char** arguments) {
  test::Options o;
  for (int i = 1; i < count; i++) {
    const std::string a = arguments[i];
    if (a == "--runs" && i + 1 < count) o.runs = atoi(arguments[++i]);
    else if (a == "--seed" && i + 1 < count) o.seed = strtoull(arguments[++i], nullptr, 10);
    else if (a == "--bug" && i + 1 < count) o.bug = arguments[++i];
    else if (a == "--bugs") o.bugs = true;
    else if (a == "--list") o.list = true;
    else o.filter = a;
  }
  setvbuf(stdout, nullptr, _IOLBF, 0);
  test::catch_signals();
  if (o.list) {
    for (const auto& t : test::chosen(o)) printf("%s\n", t.name.c_str());
    for (const auto& b : emulator::bugs()) printf("bug %s\n", b.c_str());
    return 0;
  }
  if (o.bugs) return test::run_bugs(o);
  if (!o.bug.empty()) emulator::seed_bug(o.bug);
  return test::run_all(o);
}
