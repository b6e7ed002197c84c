// Operators with kernels of their own: making, growing and copying tensors.
#pragma once
#include "kernels.h"

namespace stand_in {

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout, std::optional<at::Device> device,
                 std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DeviceGuard guard(device.value_or(at::Device(at::kCUDA)).index() < 0 ? at::Device(at::kCUDA, current) : *device);
  auto t = at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &DeviceMemory::one(), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
  return t;
}
at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::DeviceGuard guard(device.value_or(at::Device(at::kCUDA)).index() < 0 ? at::Device(at::kCUDA, current) : *device);
  auto t = at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &DeviceMemory::one(),
                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
  return t;
}

void grow(const c10::Storage& s, size_t bytes, c10::Device where) {
  if (s.nbytes() >= bytes) return;
  const c10::DeviceGuard guard(where);
  auto fresh = DeviceMemory::one().allocate(bytes);
  if (s.nbytes() > 0) std::memcpy(alias(fresh.get()), alias(s.data()), s.nbytes());
  s.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  s.unsafeGetStorageImpl()->set_nbytes(bytes);
}
const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != sizes) impl->set_sizes_contiguous(sizes);
  if (format) impl->empty_tensor_restride(*format);
  grow(self.storage(), (self.storage_offset() + at::detail::computeStorageNbytes(self.sizes(), self.strides(), 1) ) * self.itemsize(), self.device());
  return self;
}
at::Tensor& set_at(at::Tensor& self, at::Storage s, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(s.device() == self.device(), "Attempted to set the storage of a tensor on device \"", self.device(), "\" to a storage on different device \"", s.device(), "\"");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(s);
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  const int64_t o = offset.guard_int(__FILE__, __LINE__);
  if (stride.data() == nullptr || (strides.empty() && !sizes.empty())) { impl->set_storage_offset(o); impl->set_sizes_contiguous(sizes); }
  else impl->set_sizes_and_strides(sizes, strides, o);
  grow(self.storage(), o * self.itemsize() + at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.itemsize()), self.device());
  return self;
}
at::Tensor& set_storage(at::Tensor& self, at::Storage s) {
  const int64_t n = s.nbytes() / self.itemsize();
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(s);
  self.unsafeGetTensorImpl()->set_storage_offset(0);
  self.unsafeGetTensorImpl()->set_sizes_contiguous({n});
  return self;
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& s) {
  return set_at(self, s.storage(), s.storage_offset(), c10::fromIntArrayRefSlow(s.sizes()), c10::fromIntArrayRefSlow(s.strides()));
}
at::Tensor& set_none(at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  auto& m = DeviceMemory::one();
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, m.allocate(0), &m, true));
}

at::Scalar local_scalar(const at::Tensor& self) {
  waited("_local_scalar_dense");
  Inside inside;
  static const Known k{"aten::_local_scalar_dense"};
  Call call(k);
  call.where = self.device();
  return at::_local_scalar_dense(call.cpu(self, "self", false, false));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  if (self.is_same(src)) return self;
  static const Known k{"aten::copy_"};
  auto& r = report();
  const bool to = self.is_cuda(), from = src.is_cuda();
  const size_t bytes = src.numel() * src.itemsize();
  if (to && from) {
    ++r.within;
    if (bytes > 0) r.launch("aten::copy_");
    const std::string what = c10::str("copy of ", src.scalar_type(), " to ", self.scalar_type(), self.strides() == src.strides() ? "" : ", another order");
    r.kind_of_copy(what);
    trace(c10::str(what, " ", self.sizes()));
  } else if (to) {
    ++r.to_device;
    r.to_device_bytes += bytes;
    const bool pinned = non_blocking && bytes > 0 && of_pinned(src.const_data_ptr());
    if (pinned) ++r.pinned;
    // (The driver stages up to 64 KiB of pageable memory, and returns.)
    else if (bytes > 65536) ++r.pageable, waited("copy to the device from pageable memory");
    else if (!non_blocking) waited("copy to the device, waiting (64 KiB at most)");
    else refuse_in_capture("copy from pageable memory");
  } else {
    ++r.to_host;
    r.to_host_bytes += bytes;
    const bool pinned = non_blocking && bytes > 0 && of_pinned(self.const_data_ptr());
    if (pinned) ++r.pinned;
    else waited("copy to the host");
  }
  {
    Inside inside;
    Call a(k), b(k);
    if (to) a.where = self.device();
    if (from) b.where = src.device();
    at::Tensor x = to ? a.cpu(self, "self", true, false) : self, y = from ? b.cpu(src, "src", false, false) : src;
    if (Recording* r = recording()) {
      static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
      r->launches.push_back({op, {x, y, non_blocking}, {}});
    }
    x.copy_(y);
  }
  if (to && !from && non_blocking && bytes > 0 && of_pinned(src.const_data_ptr())) depart(src.const_data_ptr(), src.storage().nbytes() - src.storage_offset() * src.itemsize(), PROT_READ);
  if (!to && from && non_blocking && bytes > 0 && of_pinned(self.const_data_ptr())) depart(self.const_data_ptr(), bytes, PROT_NONE);
  return self;
}

int64_t choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) { return 0; }
void record_stream(at::Tensor&, at::Stream) {}

// Kernels that CUDA has and the CPU has not, or not in this form.
at::Tensor softmax_by(const char* name, const at::Tensor& self, int64_t dim, bool half_to_float) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack{half_to_float ? self.to(at::kFloat) : self, dim, false};
  kernel(op, &stack);
  return stack.back().toTensor();
}
at::Tensor softmax(const at::Tensor& self, int64_t dim, bool half_to_float) { return softmax_by("aten::_softmax", self, dim, half_to_float); }
at::Tensor log_softmax(const at::Tensor& self, int64_t dim, bool half_to_float) { return softmax_by("aten::_log_softmax", self, dim, half_to_float); }

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, at::IntArrayRef shape, const at::Tensor& rstd,
                                                     const std::optional<at::Tensor>& weight, std::array<bool, 2> wanted) {
  const at::Tensor plain = x * rstd, g = weight ? grad * *weight : grad;
  std::vector<int64_t> within, before;
  const int64_t first = x.dim() - static_cast<int64_t>(shape.size());
  for (int64_t d = 0; d < x.dim(); ++d) (d < first ? before : within).push_back(d);
  at::Tensor dx, dw;
  if (wanted[0]) dx = rstd * (g - plain * (g * plain).mean(within, true));
  if (wanted[1]) dw = before.empty() ? grad * plain : (grad * plain).sum(before);
  return {dx, dw};
}

}  // namespace stand_in
