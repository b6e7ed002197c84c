// Where device memory lies, and who may touch it.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <set>
#include <unordered_map>
#include <vector>

#include "report.h"

namespace stand_in {

constexpr size_t reach = size_t{1} << 36;  // addresses of one device
constexpr size_t pinned_reach = size_t{1} << 35;
constexpr int most_devices = 4;
char* device_base = nullptr;  // PROT_NONE, for ever
char* alias_base = nullptr;   // the memory
char* pinned_base = nullptr;

int device_count() {
  static const int n = [] {
    const char* t = std::getenv("STAND_IN_CUDA_DEVICES");
    return t ? std::min(most_devices, std::max(0, std::atoi(t))) : 1;
  }();
  return n;
}

bool of_device(const void* p) { return p >= device_base && p < device_base + reach * most_devices; }
bool of_pinned(const void* p) { return p >= pinned_base && p < pinned_base + pinned_reach; }
char* alias(const void* p) {
  if (p == nullptr) return nullptr;
  TORCH_CHECK(of_device(p), "stand-in CUDA: a cuda tensor whose memory is the host's, at ", p);
  return alias_base + (static_cast<const char*>(p) - device_base);
}

// ---- copies under way ------------------------------------------------------------------------------------------------
// Pinned memory that a copy without waiting reads (or writes) may not be changed (or seen) before the host has waited.
struct Flight { char* at; size_t n; };
std::mutex flight_lock;
std::vector<Flight> flights;
void land() {
  std::lock_guard<std::mutex> g(flight_lock);
  for (auto& f : flights) mprotect(f.at, f.n, PROT_READ | PROT_WRITE);
  flights.clear();
}
void depart(const void* p, size_t n, int protection) {
  char* from = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) / 4096 * 4096);
  char* to = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + n + 4095) / 4096 * 4096);
  std::lock_guard<std::mutex> g(flight_lock);
  flights.push_back({from, size_t(to - from)});
  mprotect(from, to - from, protection);
}

thread_local c10::DeviceIndex current = 0;
thread_local std::array<c10::StreamId, most_devices> streams{};
std::atomic<c10::StreamId> next_stream{32};

// One recording at a time, of one stream. As on a device: nothing is computed for good until it is replayed.
struct Launch {
  c10::OperatorHandle op;
  torch::jit::Stack inputs;                       // CPU tensors that own nothing
  std::vector<std::pair<size_t, char*>> outputs;  // fresh results: which, and where they go
};
struct Recording {
  int device;
  c10::StreamId stream;
  std::vector<Launch> launches;
  std::set<void*> pool;                                           // memory made while it was recorded: its own until it is dropped
  std::vector<void*> freed;
  struct Outside { uint64_t serial; std::string user; };
  std::map<void*, Outside> outside;                               // older memory that it uses: the product keeps it alive
  std::map<char*, std::string> before;                            // what older memory held before it was touched
};
std::recursive_mutex recording_lock;
Recording* active = nullptr;
std::map<void*, Recording*> pools;

// The recording that kernels of this thread go to.
Recording* recording() {
  if (active == nullptr) return nullptr;
  TORCH_CHECK(streams[active->device] == active->stream, "CUDA error: a kernel on stream ", streams[active->device], " while stream ", active->stream,
              " is capturing (operation would make the legacy stream depend on a capturing blocking stream)");
  return active;
}
void refuse_in_capture(const char* what) {
  TORCH_CHECK(active == nullptr, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}
void waited(const char* what) {
  refuse_in_capture(what);
  report().wait(what);
  trace(what);
  land();
}

void on_fault(int sig, siginfo_t* info, void*) {
  char text[200];
  const void* p = info->si_addr;
  int n = 0;
  if (of_device(p)) n = snprintf(text, sizeof text, "stand-in CUDA: the host touched memory of the device at %p\n", p);
  else if (of_pinned(p)) n = snprintf(text, sizeof text, "stand-in CUDA: the host touched pinned memory at %p that a copy without waiting still needs\n", p);
  if (n > 0) {
    (void)!write(2, text, n);
    void* frames[64];
    backtrace_symbols_fd(frames, backtrace(frames, 64), 2);
  }
  signal(sig, SIG_DFL);
  raise(sig);
}

struct Memory {
  Memory() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    device_base = static_cast<char*>(mmap(nullptr, reach * most_devices, PROT_NONE, flags, -1, 0));
    alias_base = static_cast<char*>(mmap(nullptr, reach * most_devices, PROT_READ | PROT_WRITE, flags, -1, 0));
    pinned_base = static_cast<char*>(mmap(nullptr, pinned_reach, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (device_base == MAP_FAILED || alias_base == MAP_FAILED || pinned_base == MAP_FAILED) {
      std::fprintf(stderr, "stand-in CUDA: no address space\n");
      std::abort();
    }
    void* warm[4];
    backtrace(warm, 4);  // loads libgcc now, not in the handler
    struct sigaction a{};
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &a, nullptr);
    sigaction(SIGBUS, &a, nullptr);
    report();
  }
} memory;

struct Pool {
  char* base;
  size_t end, used = 0;
  std::map<size_t, std::vector<char*>> free;
  std::unordered_map<void*, size_t> live;
  std::unordered_map<void*, uint64_t> serials;
  uint64_t next = 1;
  std::mutex lock;
  // Of the block that lies there now; 0: none.
  uint64_t serial(void* p) {
    std::lock_guard<std::mutex> g(lock);
    return live.count(p) ? serials[p] : 0;
  }
  char* take(size_t n, bool* fresh = nullptr) {
    size_t size = n <= (1 << 20) ? size_t{512} : size_t{2} << 20;
    if (n <= (1 << 20)) while (size < n) size *= 2;
    else size = (n + size - 1) / size * size;
    std::lock_guard<std::mutex> g(lock);
    auto& f = free[size];
    char* p;
    if (!f.empty()) {
      p = f.back();
      f.pop_back();
    } else {
      TORCH_CHECK(used + size <= end, "CUDA out of memory (stand-in)");
      p = base + used;
      used += size;
      if (fresh) *fresh = true;
    }
    live[p] = size;
    serials[p] = next++;
    return p;
  }
  size_t size(void* p) {
    std::lock_guard<std::mutex> g(lock);
    return live.at(p);
  }
  size_t give(void* p) {
    std::lock_guard<std::mutex> g(lock);
    auto it = live.find(p);
    const size_t size = it->second;
    live.erase(it);
    free[size].push_back(static_cast<char*>(p));
    return size;
  }
};
Pool& pool(int device) {
  static auto* pools = [] {
    auto* all = new std::array<Pool, most_devices>();
    for (int i = 0; i < most_devices; ++i) (*all)[i].base = device_base + reach * i, (*all)[i].end = reach;
    return all;
  }();
  return (*pools)[device];
}
int device_of(const void* p) { return static_cast<int>((static_cast<const char*>(p) - device_base) / reach); }

struct DeviceMemory final : c10::DeviceAllocator {
  std::array<c10::CachingDeviceAllocator::DeviceStats, most_devices> stats;
  std::mutex lock;
  static DeviceMemory& one() {
    static auto* it = new DeviceMemory();
    return *it;
  }
  void count(int device, size_t n, bool more) {
    report().memory(more ? long(n) : -long(n));
    std::lock_guard<std::mutex> g(lock);
    for (auto* s : {&stats[device].allocated_bytes[0], &stats[device].reserved_bytes[0], &stats[device].active_bytes[0], &stats[device].requested_bytes[0]}) {
      if (more) s->increase(n);
      else s->decrease(n);
    }
  }
  static void release(void* p) {
    if (p == nullptr) return;
    const int device = device_of(p);
    const size_t n = pool(device).size(p);
    one().count(device, n, false);
    {
      std::lock_guard<std::recursive_mutex> g(recording_lock);
      auto it = pools.find(p);
      if (it != pools.end()) {
        it->second->freed.push_back(p);
        return;
      }
    }
    poison(p, n);
    pool(device).give(p);
  }
  // NaN: what nobody wrote, nobody reads.
  static void poison(void* p, size_t n) { std::memset(alias(p), 0xff, n); }
  c10::DataPtr allocate(size_t n) override {
    const c10::Device where(at::kCUDA, current);
    if (n == 0) return {nullptr, nullptr, &release, where};
    bool fresh = false;
    char* p = pool(current).take(n, &fresh);
    count(current, pool(current).size(p), true);
    if (fresh) poison(p, pool(current).size(p));
    std::lock_guard<std::recursive_mutex> g(recording_lock);
    if (active != nullptr && active->device == current && streams[current] == active->stream) active->pool.insert(p), pools[p] = active;
    return {p, p, &release, where};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(alias(to), alias(from), n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex d) override { return stats[d]; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex d) override { stats[d].allocated_bytes[0].reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {size_t{16} << 30, size_t{16} << 30}; }
};

struct PinnedMemory final : c10::Allocator {
  static Pool& pinned() {
    static auto* it = [] {
      auto* p = new Pool();
      p->base = pinned_base;
      p->end = pinned_reach;
      return p;
    }();
    return *it;
  }
  static PinnedMemory& one() {
    static auto* it = new PinnedMemory();
    return *it;
  }
  static void release(void* p) {
    if (p != nullptr) pinned().give(p);
  }
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &release, at::kCPU};
    char* p = pinned().take(std::max<size_t>(n, 4096));
    {
      std::lock_guard<std::mutex> g(flight_lock);
      for (auto& f : flights) if (f.at == p) mprotect(f.at, f.n, PROT_READ | PROT_WRITE);
    }
    return {p, p, &release, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

}  // namespace stand_in
