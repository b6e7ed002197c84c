// What a run asked of the device: launches, copies, waits of the host, memory. Written as JSON to $STAND_IN_CUDA_REPORT when the
// process ends.
#pragma once
#include <execinfo.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace stand_in {

struct Report {
  std::mutex lock;
  // Operators by name; waits by cause; arguments of products as "aten::mm self BFloat16"; copies within the device.
  std::map<std::string, long> ops, waits, kinds, copies;
  // Copies between host and device; those of them from or to pinned memory, without waiting; those of pageable memory above 64 KiB,
  // which the driver cannot stage: the host waits for the device.
  std::atomic<long> to_device{0}, to_host{0}, within{0}, pinned{0}, pageable{0}, launches{0}, replays{0}, replayed{0};
  std::atomic<size_t> to_device_bytes{0}, to_host_bytes{0};
  // Bytes that kernels read and wrote, each tensor once a call.
  std::atomic<size_t> touched{0};
  std::atomic<long> live{0}, peak{0};

  void wait(const std::string& what) {
    std::lock_guard<std::mutex> g(lock);
    ++waits[what];
  }
  void launch(const std::string& name) {
    ++launches;
    std::lock_guard<std::mutex> g(lock);
    ++ops[name];
  }
  void kind(const std::string& what) {
    std::lock_guard<std::mutex> g(lock);
    ++kinds[what];
  }
  void kind_of_copy(const std::string& what) {
    std::lock_guard<std::mutex> g(lock);
    ++copies[what];
  }
  void memory(long bytes) {
    const long now = live += bytes;
    for (long seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
    }
  }
  static void list(FILE* f, const char* name, const std::map<std::string, long>& all) {
    std::fprintf(f, ",\n\"%s\": {", name);
    const char* between = "";
    for (auto& [k, v] : all) std::fprintf(f, "%s\n  \"%s\": %ld", between, k.c_str(), v), between = ",";
    std::fprintf(f, "}");
  }
  ~Report() {
    const char* to = std::getenv("STAND_IN_CUDA_REPORT");
    FILE* f = to == nullptr ? nullptr : std::fopen(to, "w");
    if (f == nullptr) return;
    std::fprintf(f, "{\"launches\": %ld, \"replays\": %ld, \"replayed\": %ld,\n", launches.load(), replays.load(), replayed.load());
    std::fprintf(f, "\"to_device\": %ld, \"to_device_bytes\": %zu, \"to_host\": %ld, \"to_host_bytes\": %zu, \"within\": %ld,\n", to_device.load(),
                 to_device_bytes.load(), to_host.load(), to_host_bytes.load(), within.load());
    std::fprintf(f, "\"pinned\": %ld, \"pageable\": %ld, \"touched_bytes\": %zu, \"live_bytes\": %ld, \"peak_bytes\": %ld", pinned.load(),
                 pageable.load(), touched.load(), live.load(), peak.load());
    list(f, "waits", waits);
    list(f, "kinds", kinds);
    list(f, "copies", copies);
    list(f, "ops", ops);
    std::fprintf(f, "}\n");
    std::fclose(f);
  }
};
inline Report& report() {
  static Report r;
  return r;
}

// Prints where the host waits, if asked: STAND_IN_CUDA_TRACE=all, or part of a wait's name.
inline void trace(const std::string& what) {
  static const char* wanted = std::getenv("STAND_IN_CUDA_TRACE");
  if (wanted == nullptr || (std::string(wanted) != "all" && what.find(wanted) == std::string::npos)) return;
  void* frames[48];
  std::fprintf(stderr, "stand-in CUDA: %s\n", what.c_str());
  backtrace_symbols_fd(frames, backtrace(frames, 48), 2);
}

}  // namespace stand_in
