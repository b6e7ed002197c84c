// CUDA graphs: the kernels that a piece of a training step launches are recorded once and launched again with one call. Only
// where libtorch's CUDA half and the headers of CUDA's runtime were there when this was built.

#include <ATen/ATen.h>

#include "../border.h"

#ifdef DISBACK_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>
#endif

extern "C" {

// From now on this thread works on a stream of its own: the default stream cannot be recorded. Waits for what is under way.
// `on` false: back to the default stream, again after waiting.
char* disback_own_stream(int device, bool on) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    const auto index = static_cast<c10::DeviceIndex>(device);
    const c10::DeviceGuard guard(at::Device(at::kCUDA, index));
    c10::cuda::getCurrentCUDAStream(index).synchronize();
    c10::cuda::setCurrentCUDAStream(on ? c10::cuda::getStreamFromPool(true, index) : c10::cuda::getDefaultCUDAStream(index));
#else
    TORCH_CHECK(false, "this build of disback knows no CUDA graphs: libtorch had no CUDA, or CUDA's headers were not found");
#endif
  });
}

// Begins a recording on the present stream. What is allocated until its end lives in a pool of its own: a shared one would let
// a recording overwrite what an earlier one has left, unless they were always replayed in the order of their making.
char* disback_graph_begin(int device, void** graph) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    auto made = std::make_unique<at::cuda::CUDAGraph>();
    made->capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    *graph = made.release();
#else
    TORCH_CHECK(false, "this build of disback knows no CUDA graphs");
#endif
  });
}

// Ends the recording; nothing of it has been computed yet.
char* disback_graph_end(void* graph) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    static_cast<at::cuda::CUDAGraph*>(graph)->capture_end();
#endif
  });
}

char* disback_graph_replay(void* graph) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    static_cast<at::cuda::CUDAGraph*>(graph)->replay();
#endif
  });
}

void disback_graph_drop(void* graph) {
#ifdef DISBACK_CUDA
  // Its destructor may throw where the device is gone; nobody is left to be told.
  (void)disback::guarded([&] { delete static_cast<at::cuda::CUDAGraph*>(graph); });
#endif
}

// The gradients of parameters, one each, on their devices; nullptr: none. Where one is refused nothing is changed.
char* disback_set_grads(at::Tensor* const* params, at::Tensor* const* grads, size_t count) {
  return disback::guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      TORCH_CHECK(grads[i] == nullptr || grads[i]->device() == params[i]->device(), "a gradient on the device ",
                  grads[i]->device(), " for a parameter on ", params[i]->device());
    }
    for (size_t i = 0; i < count; ++i) {
      if (grads[i] == nullptr) {
        params[i]->mutable_grad().reset();
      } else {
        params[i]->mutable_grad() = *grads[i];
      }
    }
  });
}
}
