// Loops shared among libtorch's own OpenMP threads.
//
// `at::parallel_for` is a header's template: without -fopenmp it runs on one thread, and with it a second OpenMP runtime comes
// in beside the one in libtorch's wheel. The runtime that libtorch has loaded is asked instead.

#pragma once

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace disback {

// While this thread's tensors have no content (training.cpp), it has nothing to compute. Other threads go on as always.
inline thread_local bool hollow = false;

// GCC's entry point into OpenMP, which LLVM's and Intel's runtimes have too; null where there is none: one thread then.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
inline Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

template <typename Body>
struct Shared {
  const Body& body;
  int64_t begin, end, step;
  std::atomic<int64_t> next{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;

  // Pieces are taken until none is left, so that fewer threads than asked for do no harm.
  static void run(void* raw) {
    auto& self = *static_cast<Shared*>(raw);
    for (;;) {
      const int64_t from = self.begin + self.step * self.next.fetch_add(1);
      if (from >= self.end) return;
      try {
        self.body(from, std::min(from + self.step, self.end));
      } catch (...) {
        if (!self.failed.test_and_set()) self.error = std::current_exception();
        return;
      }
    }
  }
};

// `body(from, to)` over pieces of [begin, end) of at least `grain` (but the last), as many as libtorch's threads.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end || hollow) return;
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), most);
  if (threads <= 1 || team() == nullptr) return body(begin, end);
  Shared<Body> shared{body, begin, end, (end - begin + threads - 1) / threads};
  team()(&Shared<Body>::run, &shared, static_cast<unsigned>(threads), 0);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace disback
