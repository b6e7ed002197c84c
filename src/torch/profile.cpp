// Where the time of a step goes: operators of libtorch by name, and what lies outside all of them.

#include <ATen/record_function.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

struct Entry {
  uint64_t calls = 0;
  int64_t own = 0;  // nanoseconds, operators called inside left out
};

struct Open {
  Clock::time_point since;
  int64_t inside = 0;
};

thread_local std::vector<Open> open;
thread_local std::unordered_map<std::string, Entry> entries;
thread_local int64_t outermost = 0;

}  // namespace

extern "C" {

// Times this thread's operators from now on (a backward pass on the CPU runs on the thread that asked for it).
uint64_t disback_time_operators() {
  open.clear();
  entries.clear();
  outermost = 0;
  const auto start = [](const at::RecordFunction&) -> std::unique_ptr<at::ObserverContext> {
    open.push_back({Clock::now()});
    return nullptr;
  };
  const auto end = [](const at::RecordFunction& f, at::ObserverContext*) {
    if (open.empty()) return;
    const int64_t took = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - open.back().since).count();
    Entry& entry = entries[f.name()];
    ++entry.calls;
    entry.own += took - open.back().inside;
    open.pop_back();
    if (open.empty()) {
      outermost += took;
    } else {
      open.back().inside += took;
    }
  };
  return at::addThreadLocalCallback(at::RecordFunctionCallback(start, end).scopes({at::RecordScope::FUNCTION}));
}

// Ends the timing. Gives lines of `name calls nanoseconds`, longest first (malloc'ed, for disback_free), and the
// nanoseconds inside operators in all.
char* disback_operator_times(uint64_t handle, int64_t* inside) {
  at::removeCallback(handle);
  *inside = outermost;
  std::vector<std::pair<std::string, Entry>> sorted(entries.begin(), entries.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second.own > b.second.own; });
  std::string text;
  for (const auto& [name, e] : sorted) {
    text += name + " " + std::to_string(e.calls) + " " + std::to_string(e.own) + "\n";
  }
  entries.clear();
  open.clear();
  return strdup(text.c_str());
}
}
