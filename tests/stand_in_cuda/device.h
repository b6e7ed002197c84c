// Devices, streams and generators.
#pragma once
#include "memory.h"

namespace stand_in {

// ---- devices and streams ---------------------------------------------------------------------------------------------
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return at::kCUDA; }
  static c10::DeviceIndex at_(c10::Device d) { return d.index() < 0 ? current : d.index(); }
  c10::Device exchangeDevice(c10::Device d) const override {
    const auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return {at::kCUDA, current}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.is_cuda() && d.index() < device_count(), "CUDA error: invalid device ordinal");
    if (d.index() >= 0) current = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream of(c10::Device d, c10::StreamId id) const { return c10::Stream(c10::Stream::UNSAFE, c10::Device(at::kCUDA, at_(d)), id); }
  c10::Stream getStream(c10::Device d) const override { return of(d, streams[at_(d)]); }
  c10::Stream getDefaultStream(c10::Device d) const override { return of(d, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return of(d, next_stream++); }
  c10::Stream getNewStream(c10::Device d, int) const override { return of(d, next_stream++); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const auto old = getStream(s.device());
    streams[s.device_index()] = s.id();
    return old;
  }
  void record(void** e, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { *e = reinterpret_cast<void*>(1); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { waited("synchronizeStream"); }
  void synchronizeEvent(void*) const override { waited("synchronizeEvent"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { waited("synchronizeDevice"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- generators ------------------------------------------------------------------------------------------------------
struct Random final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Random(c10::DeviceIndex d, at::Generator g)
      : GeneratorImpl({at::kCUDA, d}, c10::DispatchKeySet(c10::DispatchKey::CUDA)), inner(std::move(g)) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(device_.index(), inner.clone()); }
};
const at::Generator& default_generator(c10::DeviceIndex d) {
  static auto* all = [] {
    auto* v = new std::vector<at::Generator>();
    for (int i = 0; i < most_devices; ++i) v->push_back(at::Generator(c10::make_intrusive<Random>(i, at::detail::createCPUGenerator())));
    return v;
  }();
  return (*all)[d < 0 ? current : d];
}

}  // namespace stand_in
