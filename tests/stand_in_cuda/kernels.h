// One boxed kernel for every operator that CUDA has: libtorch's own for the CPU, on an alias of the device's memory.
#pragma once
#include "device.h"

namespace stand_in {

const std::unordered_map<std::string, bool>& table() {  // checks its devices strictly
  static const auto* t = new std::unordered_map<std::string, bool>{
#define OP(name, strict) {name, strict},
#include "ops.inc"
#undef OP
  };
  return *t;
}

std::string full_name(const c10::OperatorHandle& op) {
  const auto& n = op.operator_name();
  return n.overload_name.empty() ? n.name : n.name + "." + n.overload_name;
}

struct Known {
  std::string name;
  bool strict = true, indexes = false, waits = false;
  bool floats = false;  // a product
  bool view = false;    // launches nothing
};
const Known& known(const c10::OperatorHandle& op) {
  static std::mutex lock;
  static std::unordered_map<const void*, Known> all;
  std::lock_guard<std::mutex> g(lock);
  const void* key = &op.schema();
  auto it = all.find(key);
  if (it != all.end()) return it->second;
  Known k;
  k.name = full_name(op);
  const std::string bare = op.operator_name().name;
  auto found = table().find(k.name.substr(6));
  k.strict = found == table().end() || found->second;
  static const std::set<std::string> indexing{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index", "aten::_unsafe_index_put"};
  static const std::set<std::string> waiting{"aten::equal", "aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "aten::_unique"};
  k.indexes = indexing.count(bare) > 0;
  k.waits = waiting.count(bare) > 0;
  // Kernels that CUDA has for floats alone, the CPU for integers too.
  static const std::set<std::string> floating{"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::addmv", "aten::addmv_", "aten::dot", "aten::vdot", "aten::addbmm", "aten::convolution", "aten::convolution_backward"};
  k.floats = floating.count(bare) > 0;
  const auto& returns = op.schema().returns();
  k.view = !returns.empty() && returns[0].alias_info() != nullptr && !returns[0].alias_info()->isWrite();
  return all.emplace(key, std::move(k)).first->second;
}

// Tensors of one call and the CPU tensors that stand in for them.
struct Call {
  const Known& op;
  c10::Device where{at::kCUDA, -1};
  struct Pair { at::Tensor mine, cpu; };
  struct Hold { c10::Storage mine, cpu; const void* before; };
  std::vector<Pair> pairs;
  std::vector<Hold> holds;
  explicit Call(const Known& op) : op(op) {}

  [[noreturn]] void mixed(const char* arg, c10::Device d) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", arg, " is on ", d, ", different from other tensors on ",
                where, " (when checking argument in method wrapper_CUDA_", op.name, ")");
  }
  const c10::Storage& hold(const c10::Storage& s, const char* arg = "", at::IntArrayRef sizes = {}) {
    for (auto& h : holds) if (h.mine.unsafeGetStorageImpl() == s.unsafeGetStorageImpl()) return h.cpu;
    char* p = alias(s.data());
    c10::Storage cpu(c10::Storage::use_byte_size_t(), s.nbytes(), c10::DataPtr(p, at::kCPU), c10::GetCPUAllocator(), true);
    if (Recording* r = p == nullptr ? nullptr : recording()) {
      std::lock_guard<std::recursive_mutex> g(recording_lock);
      if (r->pool.count(const_cast<void*>(s.data())) == 0) {
        r->before.try_emplace(p, p, s.nbytes());
        void* at = const_cast<void*>(s.data());
        r->outside.try_emplace(at, Recording::Outside{pool(device_of(at)).serial(at), op.name + " " + arg + " of " + c10::str(sizes)});
      }
    }
    holds.push_back({s, cpu, cpu.data()});
    return holds.back().cpu;
  }
  at::Tensor cpu(const at::Tensor& t, const char* arg, bool written, bool index) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      TORCH_CHECK(t.device().is_cpu(), "stand-in CUDA: a tensor on ", t.device());
      const bool small = t.dim() == 0 && !op.strict && !written;
      if (!small && !index) mixed(arg, t.device());
      if (index && t.dim() > 0) waited("copy of indices to the device");
      return t;
    }
    if (where.index() >= 0 && t.device() != where) mixed(arg, t.device());
    for (auto& p : pairs) if (p.mine.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return p.cpu;
    TORCH_CHECK_NOT_IMPLEMENTED(!op.floats || t.is_floating_point() || t.is_complex(), "\"", op.name.substr(6), "_cuda\" not implemented for '", c10::toString(t.scalar_type()), "'");
    if (op.floats) report().kind(op.name + " " + arg + " " + c10::toString(t.scalar_type()));
    if (!op.view) report().touched += t.numel() * t.itemsize();
    TORCH_CHECK(t.layout() == at::kStrided, "stand-in CUDA: strided tensors only, not ", t.layout());
    at::Tensor c = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(hold(t.storage(), arg, t.sizes())), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    auto* impl = c.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) impl->_set_conj(true);
    if (t.is_neg()) impl->_set_neg(true);
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    pairs.push_back({t, c});
    return c;
  }
  at::Tensor around(c10::Storage s, const at::Tensor& like) const {
    at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(s), c10::DispatchKeySet(c10::DispatchKey::CUDA), like.dtype());
    t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.is_conj()) t.unsafeGetTensorImpl()->_set_conj(true);
    if (like.is_neg()) t.unsafeGetTensorImpl()->_set_neg(true);
    return t;
  }
  c10::Storage moved(const c10::Storage& from) const {
    const c10::DeviceGuard guard(where);
    auto& memory = DeviceMemory::one();
    c10::Storage s(c10::Storage::use_byte_size_t(), from.nbytes(), memory.allocate(from.nbytes()), &memory, true);
    if (from.nbytes() > 0) std::memcpy(alias(s.data()), from.data(), from.nbytes());
    return s;
  }
  at::Tensor back(const at::Tensor& r) {
    if (!r.defined()) return r;
    for (auto& p : pairs) if (p.cpu.unsafeGetTensorImpl() == r.unsafeGetTensorImpl()) return p.mine;
    for (auto& h : holds) if (h.cpu.unsafeGetStorageImpl() == r.storage().unsafeGetStorageImpl()) return around(h.mine, r);
    if (!op.view) report().touched += r.numel() * r.itemsize();
    return around(moved(r.storage()), r);
  }
  // Sizes and memory that the kernel gave its outputs.
  void settle() {
    for (auto& h : holds) {
      if (h.cpu.data() == h.before && h.cpu.nbytes() == h.mine.nbytes()) continue;
      c10::Storage grown = moved(h.cpu);
      auto* impl = h.mine.unsafeGetStorageImpl();
      impl->set_data_ptr_noswap(std::move(grown.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      impl->set_nbytes(h.cpu.nbytes());
      // A recording writes there from now on.
      c10::Storage there(c10::Storage::use_byte_size_t(), h.cpu.nbytes(), c10::DataPtr(alias(h.mine.data()), at::kCPU), c10::GetCPUAllocator(), true);
      for (auto& p : pairs)
        if (p.cpu.storage().unsafeGetStorageImpl() == h.cpu.unsafeGetStorageImpl()) p.cpu.unsafeGetTensorImpl()->set_storage_keep_dtype(there);
      h.cpu = there;
      h.before = there.data();
    }
    for (auto& p : pairs) {
      if (p.mine.sizes() == p.cpu.sizes() && p.mine.strides() == p.cpu.strides() && p.mine.storage_offset() == p.cpu.storage_offset()) continue;
      p.mine.unsafeGetTensorImpl()->set_sizes_and_strides(p.cpu.sizes(), p.cpu.strides(), p.cpu.storage_offset());
    }
  }
};

struct Inside {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  at::DisableRecordFunctionGuard quiet;
};

void swap_arguments(const c10::OperatorHandle& op, Call& call, torch::jit::Stack& stack, size_t first) {
  const auto& arguments = op.schema().arguments();
  // The device is that of the first CUDA tensor (or the argument's).
  const auto see = [&](const at::Tensor& t) {
    if (t.defined() && t.is_cuda() && call.where.index() < 0) call.where = t.device();
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& v = stack[first + i];
    if (v.isTensor()) see(v.toTensor());
    else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorList()) see(t);
    else if (v.isOptionalTensorList()) { for (const std::optional<at::Tensor>& t : v.toOptionalTensorList()) if (t) see(*t); }
    else if (v.isDevice() && v.toDevice().is_cuda() && call.where.index() < 0) call.where = {at::kCUDA, v.toDevice().index() < 0 ? current : v.toDevice().index()};
  }
  if (call.where.index() < 0) call.where = {at::kCUDA, current};
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& v = stack[first + i];
    const auto& a = arguments[i];
    const bool written = a.alias_info() != nullptr && a.alias_info()->isWrite();
    const char* name = a.name().c_str();
    if (v.isTensor()) {
      v = call.cpu(v.toTensor(), name, written, false);
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& t : v.toTensorList()) out.push_back(call.cpu(t, name, written, false));
      v = out;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> out;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorList()) {
        if (t && t->defined() && call.op.indexes && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) waited("index by a mask");
        out.push_back(t ? std::optional<at::Tensor>(call.cpu(*t, name, written, call.op.indexes)) : std::nullopt);
      }
      v = out;
    } else if (v.isDevice()) {
      if (v.toDevice().is_cuda()) v = c10::Device(at::kCPU);
    } else if (v.isGenerator()) {
      const auto g = v.toGenerator();
      TORCH_CHECK(g.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", g.device().type(), "'");
      TORCH_CHECK(g.device() == call.where, "a generator of ", g.device(), " for tensors on ", call.where);
      TORCH_CHECK(recording() == nullptr || g.unsafeGetGeneratorImpl() == default_generator(call.where.index()).unsafeGetGeneratorImpl(),
                  "Offset increment outside graph capture encountered unexpectedly (a generator that the graph does not know)");
      v = static_cast<Random*>(g.unsafeGetGeneratorImpl())->inner;
    } else if (v.isNone() && a.type()->kind() == c10::TypeKind::OptionalType &&
               a.type()->castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType) {
      v = static_cast<Random*>(default_generator(call.where.index()).unsafeGetGeneratorImpl())->inner;
    }
  }
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Known& k = known(op);
  if (!k.view) report().launch(k.name);
  if (k.waits) waited(k.name.c_str());
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  Call call(k);
  Inside inside;
  Recording* const rec = recording();
  torch::jit::Stack original;
  swap_arguments(op, call, *stack, first);
  if (rec != nullptr) original.assign(stack->begin() + first, stack->end());
  op.callBoxed(stack);
  call.settle();
  std::vector<c10::Storage> fresh;
  std::vector<size_t> order;
  size_t seen = 0;
  const auto back = [&](const at::Tensor& t) {
    at::Tensor mine = call.back(t);
    bool is_new = mine.defined();
    for (auto& h : call.holds) if (is_new && h.mine.unsafeGetStorageImpl() == mine.storage().unsafeGetStorageImpl()) is_new = false;
    if (rec != nullptr && is_new) fresh.push_back(mine.storage()), order.push_back(seen);
    ++seen;
    return mine;
  };
  const size_t returns = op.schema().returns().size(), at = stack->size() - returns;
  for (size_t i = 0; i < returns; ++i) {
    auto& v = (*stack)[at + i];
    if (v.isTensor()) v = back(v.toTensor());
    else if (v.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& t : v.toTensorList()) out.push_back(back(t));
      v = out;
    }
  }
  if (rec != nullptr) {
    Launch l{op, std::move(original), {}};
    for (size_t i = 0; i < fresh.size(); ++i) l.outputs.emplace_back(order[i], fresh[i].nbytes() ? alias(fresh[i].data()) : nullptr);
    rec->launches.push_back(std::move(l));
  }
}

void run(const Launch& l) {
  Inside inside;
  torch::jit::Stack stack = l.inputs;
  l.op.callBoxed(&stack);
  size_t seen = 0, next = 0;
  const auto put = [&](const at::Tensor& t) {
    if (next < l.outputs.size() && l.outputs[next].first == seen) {
      if (l.outputs[next].second != nullptr) std::memcpy(l.outputs[next].second, t.storage().data(), t.storage().nbytes());
      ++next;
    }
    ++seen;
  };
  for (auto& v : stack) {
    if (v.isTensor()) put(v.toTensor());
    else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorList()) put(t);
  }
}

void refused(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "Could not run '", full_name(op), "' with arguments from the 'CUDA' backend.");
}

}  // namespace stand_in
