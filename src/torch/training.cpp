// Memory and precision of training, where tch 0.24 has no door: recomputation of segments, autocast, a count of the CPU's
// tensor memory, and a witness of reads that stop the device. The conventions are those of shim.cpp.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "border.h"

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

std::atomic<int64_t> held{0};
std::atomic<int64_t> highest{0};

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
    held -= static_cast<int64_t>(size(p));
    c10::free_cpu(p);
  }
  c10::DataPtr allocate(size_t n) override {
    void* p = c10::alloc_cpu(n);
    if (p != nullptr) {
      const int64_t now = held += static_cast<int64_t>(size(p));
      int64_t before = highest.load();
      while (before < now && !highest.compare_exchange_weak(before, now)) {
      }
    }
    return {p, p, &release, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

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

// From now on the CPU's tensors are counted (those made before are not).
void disback_count_memory() {
  static Counting counting;
  static std::once_flag once;
  std::call_once(once, [] { c10::SetCPUAllocator(&counting, 100); });
}

// Bytes now and at most since the last reset.
void disback_counted_memory(int64_t* current, int64_t* peak, bool reset) {
  *current = held.load();
  if (reset) highest = held.load();
  *peak = highest.load();
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
