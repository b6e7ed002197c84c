// Memory and precision of training, where tch 0.24 has no door: recomputation of segments, autocast, a count of the CPU's
// tensor memory, and a witness of reads that stop the device. The conventions are those of shim.cpp.

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "border.h"
#include "cpu/parallel.h"

namespace {

using disback::guarded;

// A segment of a network: inputs to outputs, run once without a graph and again in the backward pass.
using Run = char* (*)(void* self, const at::Tensor* const* inputs, size_t count, at::Tensor** outputs, size_t outputs_count);
using Drop = void (*)(void* self);

struct Segment : torch::CustomClassHolder {
  void* self;
  Run run;
  Drop drop;
  size_t outputs;
  // Which inputs a gradient was asked for when the segment ran first.
  std::vector<bool> wanted;
  Segment(void* self, Run run, Drop drop, size_t outputs) : self(self), run(run), drop(drop), outputs(outputs) {}
  ~Segment() override { drop(self); }

  std::vector<at::Tensor> operator()(const std::vector<at::Tensor>& inputs) const {
    std::vector<const at::Tensor*> in;
    for (const auto& t : inputs) in.push_back(&t);
    std::vector<at::Tensor*> out(outputs, nullptr);
    char* message = run(self, in.data(), in.size(), out.data(), outputs);
    std::vector<at::Tensor> result;
    for (at::Tensor* t : out) {
      if (t != nullptr) result.push_back(std::move(*t));
      delete t;
    }
    if (message != nullptr) {
      std::string text(message);
      std::free(message);
      throw std::runtime_error(text);
    }
    return result;
  }
};

struct Recomputed : torch::autograd::Function<Recomputed> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const c10::intrusive_ptr<Segment>& segment, at::TensorList inputs) {
    std::vector<at::Tensor> all(inputs.begin(), inputs.end());
    ctx->save_for_backward(all);
    ctx->saved_data["segment"] = c10::IValue::make_capsule(segment);
    return (*segment)(all);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto capsule = ctx->saved_data["segment"].toCapsule();
    const auto* segment = static_cast<const Segment*>(capsule.get());
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> wanted;
    std::vector<size_t> places;
    auto saved = ctx->get_saved_variables();
    for (size_t i = 0; i < saved.size(); ++i) {
      auto t = saved[i].detach();
      if (segment->wanted[i]) {
        t.set_requires_grad(true);
        wanted.push_back(t);
        places.push_back(i);
      }
      inputs.push_back(t);
    }
    std::vector<at::Tensor> outputs;
    {
      at::AutoGradMode with_graph(true);
      outputs = (*segment)(inputs);
    }
    torch::autograd::variable_list roots, seeds;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (grads[i].defined() && outputs[i].requires_grad()) {
        roots.push_back(outputs[i]);
        seeds.push_back(grads[i]);
      }
    }
    // The first place is the segment itself.
    torch::autograd::variable_list result(saved.size() + 1);
    if (!roots.empty() && !wanted.empty()) {
      auto found = torch::autograd::grad(roots, wanted, seeds, std::nullopt, false, true);
      for (size_t k = 0; k < places.size(); ++k) result[places[k] + 1] = found[k];
    }
    return result;
  }
};

// What this thread's tensors hold, and held at most. A step on the CPU makes and frees its tensors on the thread that called it,
// the backward pass too; what other threads compute meanwhile is not this one's. A tensor that is freed by another thread than
// made it stays counted here and counts there below zero.
thread_local int64_t held = 0;
thread_local int64_t highest = 0;
// The same of all threads together.
std::atomic<int64_t> all_held{0}, all_highest{0};

void count(int64_t bytes) {
  held += bytes;
  highest = std::max(highest, held);
  const int64_t now = all_held += bytes;
  int64_t before = all_highest;
  while (now > before && !all_highest.compare_exchange_weak(before, now)) {
  }
}

// Hollow memory: allocations of this size and more all lie on the same few pages. They have addresses, and no content.
constexpr size_t hollow_least = 1 << 20, hollow_pages = 32 << 20;
std::mutex hollow_lock;
std::unordered_map<void*, size_t> hollow_places;
std::atomic<size_t> hollow_count{0};

// Inside a product or convolution of bf16 nothing hollow may be made: oneDNN keeps addresses in its work space, which comes
// from the same allocator. (Those on the way of a network are left out altogether; this is for the others.)
thread_local int64_t inside_onednn = 0;
struct InsideOneDnn : at::ObserverContext {};

// nullptr where the system gives none.
void* hollow_allocate(size_t n) {
#ifdef __linux__
  static const int file = [] {
    const int made = memfd_create("disback-hollow", MFD_CLOEXEC);
    return made >= 0 && ftruncate(made, hollow_pages) == 0 ? made : -1;
  }();
  n = (n + 4095) / 4096 * 4096;
  void* p = file < 0 ? MAP_FAILED : mmap(nullptr, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  for (size_t at = 0; at < n; at += hollow_pages) {
    const size_t length = std::min(hollow_pages, n - at);
    void* part = mmap(static_cast<char*>(p) + at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    if (part == MAP_FAILED) {
      munmap(p, n);
      return nullptr;
    }
  }
  std::lock_guard<std::mutex> guard(hollow_lock);
  hollow_places.emplace(p, n);
  ++hollow_count;
  return p;
#else
  return nullptr;
#endif
}

// Bytes of a hollow allocation, 0 for any other; `forget`: it is given back.
size_t hollow_size(void* p, bool forget) {
  if (hollow_count == 0) return 0;
  std::lock_guard<std::mutex> guard(hollow_lock);
  const auto found = hollow_places.find(p);
  if (found == hollow_places.end()) return 0;
  const size_t n = found->second;
#ifdef __linux__
  if (forget) {
    hollow_places.erase(found);
    --hollow_count;
    munmap(p, n);
  }
#endif
  return n;
}

// Counts what tensors of the CPU hold.
struct Counting final : c10::Allocator {
  static size_t size(void* p) {
#ifdef __GLIBC__
    return malloc_usable_size(p);
#else
    return 0;
#endif
  }
  static void release(void* p) {
    if (p == nullptr) return;
    if (const size_t n = hollow_size(p, true)) {
      count(-static_cast<int64_t>(n));
      return;
    }
    count(-static_cast<int64_t>(size(p)));
    c10::free_cpu(p);
  }
  c10::DataPtr allocate(size_t n) override {
    void* p = disback::hollow && n >= hollow_least && inside_onednn == 0 ? hollow_allocate(n) : nullptr;
    const size_t nothing = p == nullptr ? 0 : hollow_size(p, false);
    if (p == nullptr) p = c10::alloc_cpu(n);
    if (p != nullptr) count(static_cast<int64_t>(nothing > 0 ? nothing : size(p)));
    return {p, p, &release, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

// What attention leaves for its backward pass, and takes there, without computing anything: its operands, its result and the
// logarithms of its sums, as libtorch's kernel for the CPU has them.
struct HollowAttention : torch::autograd::Function<HollowAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const at::Tensor y = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
    const at::Tensor sums = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat)).transpose(1, 2);
    ctx->save_for_backward({q, k, v, y, sums});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list) {
    const auto saved = ctx->get_saved_variables();
    const auto like = [](const at::Tensor& t) {
      return at::empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
    };
    return {like(saved[0]), like(saved[1]), like(saved[2])};
  }
};

// The same of a product of matrices, with or without a bias.
struct HollowProduct : torch::autograd::Function<HollowProduct> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w,
                            const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({x, w});
    ctx->saved_data["bias"] = bias.has_value();
    TORCH_CHECK(x.size(-1) == w.size(-2), "a product of ", x.sizes(), " and ", w.sizes());
    const auto batch = [](const at::Tensor& t) { return t.sizes().slice(0, t.dim() - 2); };
    auto sizes = at::infer_size(batch(x), batch(w));
    sizes.push_back(x.size(-2));
    sizes.push_back(w.size(-1));
    return at::empty(sizes, x.options());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list) {
    const auto saved = ctx->get_saved_variables();
    torch::autograd::variable_list out(3);
    for (int i : {0, 1}) {
      if (ctx->needs_input_grad(i)) out[i] = at::empty_like(saved[i]);
    }
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) {
      out[2] = at::empty({saved[1].size(-1)}, saved[0].options());
    }
    return out;
  }
};

// The same of a convolution, with oneDNN's copy of a bf16 weight in an order of its own.
struct HollowConvolution : torch::autograd::Function<HollowConvolution> {
  static at::Tensor reordered(const at::Tensor& w) {
    return w.scalar_type() == at::kBFloat16 ? at::empty_like(w) : at::Tensor();
  }
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w,
                            const std::optional<at::Tensor>& bias, std::vector<int64_t> sizes) {
    ctx->save_for_backward({x, w});
    ctx->saved_data["filters"] = bias ? bias->size(0) : int64_t{0};
    const at::Tensor y = at::empty(sizes, x.options().memory_format(x.suggest_memory_format()));
    const at::Tensor passing = reordered(w);
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor passing = reordered(saved[1]);
    torch::autograd::variable_list out(4);
    for (int i : {0, 1}) {
      if (ctx->needs_input_grad(i)) out[i] = at::empty_like(saved[i]);
    }
    const int64_t filters = ctx->saved_data["filters"].toInt();
    if (filters > 0 && ctx->needs_input_grad(2)) out[2] = at::empty({filters}, saved[0].options());
    return out;
  }
};

// Products and convolutions.
bool goes_to_onednn(const char* name) {
  static const char* const names[] = {"aten::mm",     "aten::addmm",  "aten::bmm",         "aten::baddbmm",
                                      "aten::linear", "aten::matmul", "aten::convolution", "aten::convolution_backward"};
  return std::any_of(std::begin(names), std::end(names), [&](const char* n) { return std::strcmp(name, n) == 0; });
}

struct InsideAdamW : at::ObserverContext {};
thread_local int64_t host_reads = 0;
thread_local int64_t inside_adamw = 0;

}  // namespace

extern "C" {

// Runs a segment so that its inner values are not kept for the backward pass, which runs it again. `self` is dropped with
// the graph. outputs receives new handles.
char* disback_recompute(void* self, Run run, Drop drop, at::Tensor* const* inputs, size_t count, at::Tensor** outputs,
                        size_t outputs_count) {
  auto segment = c10::make_intrusive<Segment>(self, run, drop, outputs_count);
  return guarded([&] {
    std::vector<at::Tensor> in;
    for (size_t i = 0; i < count; ++i) {
      in.push_back(*inputs[i]);
      segment->wanted.push_back(inputs[i]->requires_grad());
    }
    auto result = Recomputed::apply(segment, at::TensorList(in));
    for (size_t i = 0; i < outputs_count; ++i) outputs[i] = new at::Tensor(result[i]);
  });
}

// A copy of a message for the segment's answer.
char* disback_text(const char* text) { return strdup(text); }

bool disback_grad_enabled() { return at::GradMode::is_enabled(); }

// bf16 for convolutions and matrix products of this thread on one kind of device; returns what was set before.
bool disback_autocast(bool cuda, bool on) {
  const auto device = cuda ? at::kCUDA : at::kCPU;
  const bool before = at::autocast::is_autocast_enabled(device);
  at::autocast::set_autocast_dtype(device, at::kBFloat16);
  at::autocast::set_autocast_enabled(device, on);
  if (before && !on) at::autocast::clear_cache();
  return before;
}

bool disback_autocast_enabled(bool cuda) { return at::autocast::is_autocast_enabled(cuda ? at::kCUDA : at::kCPU); }

// Whether large tensors that this thread makes from now on are hollow: they count as always, share a few pages, and what our kernels would
// compute is left out. Only with the counting allocator.
void disback_hollow(bool on) { disback::hollow = on; }
bool disback_is_hollow() { return disback::hollow; }

// Attention [B, H, T, D] without a mask, for hollow tensors.
char* disback_hollow_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, at::Tensor** out) {
  return guarded([&] {
    disback::on_cpu("hollow attention", {q, k, v});
    *out = new at::Tensor(HollowAttention::apply(*q, *k, *v));
  });
}

// A product of matrices of rank 2 and more, for hollow tensors that libtorch would multiply in bf16; bias [N] or nullptr.
char* disback_hollow_product(const at::Tensor* x, const at::Tensor* w, const at::Tensor* bias, at::Tensor** out) {
  return guarded([&] {
    disback::on_cpu("a hollow product", {x, w, bias});
    // As autocast does, which keeps a weight's copy until it ends.
    const auto narrow = [](const at::Tensor& t) {
      return at::autocast::is_autocast_enabled(at::kCPU) ? at::autocast::cached_cast(at::kBFloat16, t, at::kCPU) : t;
    };
    const std::optional<at::Tensor> b = bias == nullptr ? std::nullopt : std::optional<at::Tensor>(narrow(*bias));
    *out = new at::Tensor(HollowProduct::apply(narrow(*x), narrow(*w), b));
  });
}

// Keeps hollow memory away from products and convolutions on this thread, until disback_unwatch.
uint64_t disback_spare_onednn() {
  const auto start = [](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
    if (!goes_to_onednn(f.name())) return nullptr;
    ++inside_onednn;
    return std::make_unique<InsideOneDnn>();
  };
  const auto end = [](const at::RecordFunction&, at::ObserverContext* inside) {
    if (inside != nullptr) --inside_onednn;
  };
  return at::addThreadLocalCallback(
      at::RecordFunctionCallback(start, end).scopes({at::RecordScope::FUNCTION}));
}

// A convolution to these sizes, for hollow tensors; bias or nullptr.
char* disback_hollow_convolution(const at::Tensor* x, const at::Tensor* w, const at::Tensor* bias, const int64_t* sizes,
                                 size_t rank, at::Tensor** out) {
  return guarded([&] {
    disback::on_cpu("a hollow convolution", {x, w, bias});
    const std::optional<at::Tensor> b = bias == nullptr ? std::nullopt : std::optional<at::Tensor>(*bias);
    *out = new at::Tensor(HollowConvolution::apply(*x, *w, b, std::vector<int64_t>(sizes, sizes + rank)));
  });
}

// From now on the CPU's tensors are counted (those made before are not).
void disback_count_memory() {
  static Counting counting;
  static std::once_flag once;
  std::call_once(once, [] { c10::SetCPUAllocator(&counting, 100); });
}

// Bytes of this thread's tensors, now and at most since the last reset.
void disback_counted_memory(int64_t* current, int64_t* peak, bool reset) {
  *current = held;
  if (reset) highest = held;
  *peak = highest;
}

// The same of all threads together.
void disback_counted_memory_of_all(int64_t* current, int64_t* peak, bool reset) {
  *current = all_held;
  if (reset) all_highest = all_held.load();
  *peak = all_highest;
}

// Counts, on this thread, operators through which the host waits for values of the device. What the fused AdamW reads on
// the CPU (its step numbers) does not count: on a device they stay there.
uint64_t disback_watch_host_reads() {
  host_reads = 0;
  const auto start = [](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
    static const char* const waits[] = {"aten::_local_scalar_dense", "aten::equal",
                                        "aten::nonzero",             "aten::_unique2",
                                        "aten::masked_select",       "aten::unique_dim",
                                        "aten::unique_consecutive"};
    if (std::strcmp(f.name(), "aten::_fused_adamw_") == 0) {
      ++inside_adamw;
      return std::make_unique<InsideAdamW>();
    }
    for (const char* w : waits) {
      if (inside_adamw == 0 && std::strcmp(f.name(), w) == 0) ++host_reads;
    }
    return nullptr;
  };
  const auto end = [](const at::RecordFunction&, at::ObserverContext* adamw) {
    if (adamw != nullptr) --inside_adamw;
  };
  return at::addThreadLocalCallback(
      at::RecordFunctionCallback(start, end).scopes({at::RecordScope::FUNCTION}));
}

int64_t disback_host_reads() { return host_reads; }
void disback_note_host_read() { ++host_reads; }
void disback_unwatch(uint64_t handle) { at::removeCallback(handle); }
}
