// CUDA graphs: the kernels that a piece of a training step launches are recorded once and launched again with one call. Only
// where libtorch's CUDA half and the headers of CUDA's runtime were there when this was built.
//
// Nothing here refers to libtorch's CUDA half by symbol: streams are asked for through libc10's interface of devices, recordings by
// the names of their functions. So a program with this starts beside a libtorch without CUDA.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "../border.h"

#ifdef DISBACK_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <dlfcn.h>

#include <memory>

namespace {

// The functions of at::cuda::CUDAGraph that are called here, as libtorch_cuda.so has them; its size and the types are the header's.
struct Recordings {
  void (*make)(void*, bool);
  void (*drop)(void*);
  void (*begin)(void*, at::MempoolId_t, cudaStreamCaptureMode);
  void (*end)(void*);
  void (*replay)(void*);
};

template <class F>
void find(F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  TORCH_CHECK(function != nullptr, "libtorch's CUDA half is not loaded, or of another version: it has no ", name);
}

const Recordings& recordings() {
  static const Recordings found = [] {
    Recordings r;
    find(r.make, "_ZN2at4cuda9CUDAGraphC1Eb");
    find(r.drop, "_ZN2at4cuda9CUDAGraphD1Ev");
    find(r.begin, "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
    find(r.end, "_ZN2at4cuda9CUDAGraph11capture_endEv");
    find(r.replay, "_ZN2at4cuda9CUDAGraph6replayEv");
    return r;
  }();
  return found;
}

struct Graph {
  Graph() { recordings().make(memory, false); }
  ~Graph() { recordings().drop(memory); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  alignas(at::cuda::CUDAGraph) unsigned char memory[sizeof(at::cuda::CUDAGraph)];
};

}  // namespace
#endif

extern "C" {

// From now on this thread works on a stream of its own: the default stream cannot be recorded. Waits for what is under way.
// `on` false: back to the default stream, again after waiting.
char* disback_own_stream(int device, bool on) {
  return disback::guarded([&] {
    const at::Device where(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    const auto& streams = *c10::impl::getDeviceGuardImpl(at::kCUDA);
    const c10::DeviceGuard guard(where);
    streams.synchronizeStream(streams.getStream(where));
    streams.exchangeStream(on ? streams.getStreamFromGlobalPool(where, true) : streams.getDefaultStream(where));
  });
}

// Begins a recording on the present stream. What is allocated until its end lives in a pool of its own: a shared one would let
// a recording overwrite what an earlier one has left, unless they were always replayed in the order of their making.
char* disback_graph_begin(int device, void** graph) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    auto made = std::make_unique<Graph>();
    recordings().begin(made->memory, {0, 0}, cudaStreamCaptureModeThreadLocal);
    *graph = made.release();
#else
    TORCH_CHECK(false, "this build of disback knows no CUDA graphs: libtorch had no CUDA, or CUDA's headers were not found");
#endif
  });
}

// Ends the recording; nothing of it has been computed yet.
char* disback_graph_end(void* graph) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    recordings().end(static_cast<Graph*>(graph)->memory);
#endif
  });
}

char* disback_graph_replay(void* graph) {
  return disback::guarded([&] {
#ifdef DISBACK_CUDA
    recordings().replay(static_cast<Graph*>(graph)->memory);
#endif
  });
}

void disback_graph_drop(void* graph) {
#ifdef DISBACK_CUDA
  // Its destructor may throw where the device is gone; nobody is left to be told.
  (void)disback::guarded([&] { delete static_cast<Graph*>(graph); });
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
