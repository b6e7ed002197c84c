// What tch 0.24 leaves out of libtorch and the method needs: the fused AdamW, foreach kernels over tensor lists, random
// generators of our own, and the allocator's statistics. A C interface; every function returns nullptr on success, or a
// malloc'ed message for `disback_free`. Exceptions never cross the border.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "border.h"

namespace {

// No graph is recorded in here.
template <class F>
char* guarded(F&& body) {
  return disback::guarded([&] {
    at::NoGradGuard no_grad;
    body();
  });
}

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace

extern "C" {

void disback_free(void* p) { std::free(p); }

// Gradient i of parameter i goes to out[i] (a new handle), or nullptr where there is none.
char* disback_grads(at::Tensor* const* params, size_t count, at::Tensor** out) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      const at::Tensor& grad = params[i]->grad();
      out[i] = grad.defined() ? new at::Tensor(grad) : nullptr;
    }
  });
}

// Global Euclidean norm of a list (f32, rank 0, on the device of the list).
char* disback_global_norm(at::Tensor* const* tensors, size_t count, at::Tensor** out) {
  return guarded([&] {
    auto norms = at::_foreach_norm(list(tensors, count), 2, at::kFloat);
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(norms)));
  });
}

// Euclidean norm of each tensor: f32 [count], which stays on the device.
char* disback_norms(at::Tensor* const* tensors, size_t count, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(at::stack(at::_foreach_norm(list(tensors, count), 2, at::kFloat))); });
}

// One step of AdamW with decoupled weight decay. Gradients are divided by grad_scale in place; where found_inf is 1 nothing
// is changed. step is the number of this step (counted from 1), one tensor for the whole list.
char* disback_fused_adamw(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avg,
                          at::Tensor* const* exp_avg_sq, size_t count, const at::Tensor* step, double lr, double beta1,
                          double beta2, double weight_decay, double eps, const at::Tensor* grad_scale,
                          const at::Tensor* found_inf) {
  return guarded([&] {
    std::vector<at::Tensor> steps(count, *step);
    at::_fused_adamw_(list(params, count), list(grads, count), list(exp_avg, count), list(exp_avg_sq, count), {}, steps,
                      lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false, *grad_scale,
                      *found_inf);
  });
}

// mine[i] += weight * (theirs[i] - mine[i])
char* disback_foreach_lerp(at::Tensor* const* mine, at::Tensor* const* theirs, size_t count, double weight) {
  return guarded([&] { at::_foreach_lerp_(list(mine, count), list(theirs, count), at::Scalar(weight)); });
}

// Lets go of the gradients: the next backward pass hands its own over instead of adding them to zeros.
char* disback_drop_grads(at::Tensor* const* params, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) params[i]->mutable_grad().reset();
  });
}

// Standard normal f32 from a generator of its own: the process-wide generators are neither read nor moved.
// device: -1 CPU, else the index of the CUDA device.
char* disback_randn(uint64_t seed, const int64_t* shape, size_t rank, int device, at::Tensor** out) {
  return guarded([&] {
    const auto where = device < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    at::Generator generator = at::globalContext().defaultGenerator(where).clone();
    generator.set_current_seed(seed);
    *out = new at::Tensor(at::randn(at::IntArrayRef(shape, rank), generator, at::dtype(at::kFloat).device(where)));
  });
}

// A tensor of f32 on the device `meta`, which has shapes and no elements: what tests hand to the kernels of one device as a
// tensor of another.
char* disback_meta(const int64_t* shape, size_t rank, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(at::empty(at::IntArrayRef(shape, rank), at::dtype(at::kFloat).device(at::kMeta))); });
}

// A copy in memory that a CUDA device reads by itself, or the tensor where it lies there already.
char* disback_pin(const at::Tensor* t, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(t->pin_memory()); });
}

// TF32 for matrix products and convolutions of f32 tensors on CUDA.
char* disback_set_tf32(bool on) {
  return guarded([&] {
    at::globalContext().setAllowTF32CuBLAS(on);
    at::globalContext().setAllowTF32CuDNN(on);
  });
}

// Keeps freed memory in the process: glibc would return every large block to the system and fault it in again at the next
// allocation, tens of thousands of page faults a training step on the CPU.
void disback_keep_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // glibc's upper limit
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

// Bytes of a CUDA device that a process may still take: free ones, and those that libtorch keeps for itself.
char* disback_free_memory(int device, int64_t* bytes) {
  return guarded([&] {
    auto* allocator = at::getDeviceAllocator(at::kCUDA);
    const auto index = static_cast<c10::DeviceIndex>(device);
    constexpr auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto stats = allocator->getDeviceStats(index);
    const int64_t kept = stats.reserved_bytes[aggregate].current - stats.allocated_bytes[aggregate].current;
    *bytes = static_cast<int64_t>(allocator->getMemoryInfo(index).first) + kept;
  });
}

// Bytes of a CUDA device in use by tensors: now, and at most since the start.
char* disback_memory_stats(int device, int64_t* current, int64_t* peak) {
  return guarded([&] {
    const auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    constexpr auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *current = stats.allocated_bytes[aggregate].current;
    *peak = stats.allocated_bytes[aggregate].peak;
  });
}
}
