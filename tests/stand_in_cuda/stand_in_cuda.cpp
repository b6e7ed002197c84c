// A stand-in for libtorch_cuda.so and libc10_cuda.so: DeviceType::CUDA on CPU memory, for tests of device placement.
// A CUDA tensor's address lies in pages that nobody may touch; kernels are libtorch's own for the CPU, run on an alias of them.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAStream.h>

#include "graph.h"
#include "tensors.h"

namespace stand_in {

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_at);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_none);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("copy_", copy_);
  m.impl("_fused_sdp_choice", choice);
  m.impl("record_stream", record_stream);
  m.impl("_softmax", softmax);
  m.impl("_log_softmax", log_softmax);
  m.impl("_fused_rms_norm_backward", rms_norm_backward);
  for (const auto& [name, strict] : table()) m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&kernel>());
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&refused>()); }

struct Registered {
  Registered() { c10::SetAllocator(at::kCUDA, &DeviceMemory::one(), 100); }
} registered;

}  // namespace stand_in

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return stand_in::device_count() > 0; }
  bool hasCUDA() const override { return stand_in::device_count() > 0; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return stand_in::device_count(); }
  int getNumGPUs() const override { return stand_in::device_count(); }
  DeviceIndex current_device() const override { return stand_in::current; }
  DeviceIndex getCurrentDevice() const override { return stand_in::current; }
  void setCurrentDevice(DeviceIndex d) const override { stand_in::current = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return std::exchange(stand_in::current, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return std::exchange(stand_in::current, d); }
  const Generator& getDefaultGenerator(DeviceIndex d = -1) const override { return stand_in::default_generator(d); }
  Generator getNewGenerator(DeviceIndex d = -1) const override { return stand_in::default_generator(d).clone(); }
  Device getDeviceFromPtr(void* p) const override {
    TORCH_CHECK(stand_in::of_device(p), "not a pointer of the device");
    return {kCUDA, static_cast<DeviceIndex>(stand_in::device_of(p))};
  }
  bool isPinnedPtr(const void* p) const override { return stand_in::of_pinned(p); }
  Allocator* getPinnedMemoryAllocator() const override { return &stand_in::PinnedMemory::one(); }
  Allocator* getCUDADeviceAllocator() const override { return &stand_in::DeviceMemory::one(); }
  std::string showConfig() const override { return "stand-in CUDA"; }
  long versionCUDART() const override { return 13000; }
  void deviceSynchronize(DeviceIndex) const override { stand_in::waited("deviceSynchronize"); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ---- what the product calls by name ----------------------------------------------------------------------------------
namespace c10::cuda {
static const stand_in::Guard guard_;
CUDAStream getStreamFromPool(const int, DeviceIndex d) { return CUDAStream(guard_.getNewStream({at::kCUDA, d}, 0)); }
CUDAStream getStreamFromPool(const bool, DeviceIndex d) { return CUDAStream(guard_.getNewStream({at::kCUDA, d}, 0)); }
CUDAStream getDefaultCUDAStream(DeviceIndex d) { return CUDAStream(guard_.getDefaultStream({at::kCUDA, d})); }
CUDAStream getCurrentCUDAStream(DeviceIndex d) { return CUDAStream(guard_.getStream({at::kCUDA, d})); }
void setCurrentCUDAStream(CUDAStream s) { guard_.exchangeStream(s.unwrap()); }
void CUDAStream::synchronize() const { stand_in::waited("CUDAStream::synchronize"); }
cudaStream_t CUDAStream::stream() const { return reinterpret_cast<cudaStream_t>(id()); }
DeviceIndex device_count() noexcept { return stand_in::device_count(); }
DeviceIndex current_device() { return stand_in::current; }
void set_device(DeviceIndex d, bool) { stand_in::current = d; }
void device_synchronize() { stand_in::waited("device_synchronize"); }
}  // namespace c10::cuda
