// Several processes that train one network, by libtorch's c10d: gloo on the CPU, NCCL on CUDA devices where it was compiled in. Who is
// who, and where they meet, is said by whatever started them (launcher.rs); nothing of that is here.

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <c10/util/Logging.h>
#ifdef DISBACK_NCCL
#include <dlfcn.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../border.h"

namespace {

using disback::guarded;
using std::chrono::milliseconds;

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroup> processes;
};

Group& of(void* g) { return *static_cast<Group*>(g); }

#ifdef DISBACK_NCCL
// The two functions of c10d's NCCL that are called here, by their names in libtorch_cuda.so, which a program may be without. Sizes and
// types are the header's.
using Nccl = c10d::ProcessGroupNCCL;
struct NcclFunctions {
  void (*options)(void*, bool);
  void (*group)(void*, c10::intrusive_ptr<c10d::Store>, int, int, c10::intrusive_ptr<Nccl::Options>);
};

const NcclFunctions& nccl_functions() {
  static const NcclFunctions found{
      reinterpret_cast<decltype(NcclFunctions::options)>(dlsym(RTLD_DEFAULT, "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb")),
      reinterpret_cast<decltype(NcclFunctions::group)>(
          dlsym(RTLD_DEFAULT,
                "_ZN4c10d16ProcessGroupNCCLC1EN3c1013intrusive_ptrINS_5StoreENS1_6detail34intrusive_target_default_null_typeIS3_"
                "EEEEiiNS2_INS0_7OptionsENS5_IS8_EEEE"))};
  return found;
}

bool has_nccl() { return nccl_functions().options != nullptr && nccl_functions().group != nullptr; }

c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, milliseconds timeout) {
  void* place = ::operator new(sizeof(Nccl::Options));
  nccl_functions().options(place, false);
  auto options = c10::intrusive_ptr<Nccl::Options>::unsafe_steal_from_new(static_cast<Nccl::Options*>(place));
  options->timeout = timeout;
  place = ::operator new(sizeof(Nccl));
  try {
    nccl_functions().group(place, store, rank, world, options);
  } catch (...) {
    ::operator delete(place);
    throw;
  }
  return c10::intrusive_ptr<c10d::Backend>::unsafe_steal_from_new(static_cast<Nccl*>(place));
}
#else
bool has_nccl() { return false; }
#endif

// Gradients that are summed together: a run of parameters, flat in the order of their own memory, padded to a part for each process.
struct Bucket {
  size_t begin, end;
  int64_t part;
  at::Tensor send;      // [world * part], while a round is under way
  at::Tensor received;  // [world * part], the same: this process's part of everyone's gradients
  at::Tensor sum;       // [part]: its sum over the micro-batches so far
  c10::intrusive_ptr<c10d::Work> work;
};

// Sums gradients over micro-batches in their order, whichever process computed them, so that the sum has the same bits for any number
// of processes: each process owns a part of every bucket, receives that part from all others after each round of micro-batches (one a
// process), and adds them one after the other, as one process alone would. At the end everyone gets all parts.
struct Reducer {
  Group* group;  // nullptr: one process
  int64_t world;
  std::vector<at::Tensor> params;
  std::vector<bool> reached;
  std::vector<Bucket> buckets;
  int64_t rows = 0;  // micro-batches of the round that is under way
  bool ordered;      // false: every process sums its own, and the sums are added by one reduction (CUDA)
};

at::Tensor place(const at::Tensor& flat, const at::Tensor& like, int64_t offset) {
  return flat.as_strided(like.sizes(), like.strides(), offset);
}

std::vector<Bucket> split(const std::vector<at::Tensor>& params, int64_t bytes, int64_t world) {
  std::vector<Bucket> buckets;
  size_t begin = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    elements += params[i].numel();
    if (i + 1 == params.size() || 4 * elements >= bytes) {
      Bucket b{};
      b.begin = begin, b.end = i + 1, b.part = (elements + world - 1) / world;
      buckets.push_back(std::move(b));
      begin = i + 1, elements = 0;
    }
  }
  return buckets;
}

// This process's gradients into the bucket's flat memory; what no gradient has reached counts as 0.
void flatten(Reducer& r, Bucket& b, bool active) {
  const auto options = r.params[b.begin].options().requires_grad(false);
  b.send = at::empty({r.world * b.part}, options);
  int64_t offset = 0;
  for (size_t i = b.begin; i < b.end; ++i) {
    const at::Tensor& p = r.params[i];
    const at::Tensor grad = p.grad();
    at::Tensor there = place(b.send, p, offset);
    if (active && grad.defined()) {
      there.copy_(grad);
      r.reached[i] = true;
    } else {
      there.zero_();
    }
    p.mutable_grad().reset();
    offset += p.numel();
  }
  b.send.narrow(0, offset, b.send.numel() - offset).zero_();
}

// The round before is added to the sums.
void settle(Reducer& r) {
  for (Bucket& b : r.buckets) {
    if (r.rows == 0) break;
    if (b.work) b.work->wait();
    b.work.reset();
    if (r.group == nullptr) {
      b.sum = b.sum.defined() ? b.sum.add_(b.send) : b.send;
    } else {
      for (int64_t row = 0; row < r.rows; ++row) {
        const at::Tensor part = b.received.narrow(0, row * b.part, b.part);
        b.sum = b.sum.defined() ? b.sum.add_(part) : part.clone();
      }
    }
    b.send.reset(), b.received.reset();
  }
  r.rows = 0;
}

// What was summed, as the parameters' gradients. They lie in `flat`, which is theirs from now on.
void hand_out(Reducer& r, Bucket& b, const at::Tensor& flat) {
  int64_t offset = 0;
  for (size_t i = b.begin; i < b.end; ++i) {
    if (r.reached[i]) r.params[i].mutable_grad() = place(flat, r.params[i], offset);
    offset += r.params[i].numel();
  }
}

}  // namespace

extern "C" {

// Whether NCCL was compiled in, and libtorch's CUDA half, which has it, is loaded.
bool disback_dist_has_nccl() { return has_nccl(); }

// Forms a group. serves: this process holds the store (rank 0, where no launcher's agent does). prefix: of this attempt, the same for
// all. nccl: of CUDA tensors; those of the CPU always go by gloo, which needs GLOO_SOCKET_IFNAME where a host has several networks.
char* disback_dist_form(const char* address, int port, bool serves, int rank, int world, int64_t timeout_ms, const char* prefix,
                        bool nccl, void** out) {
  return guarded([&] {
    // What goes wrong becomes an error of ours; its warnings of sockets beside it help nobody.
    setenv("TORCH_CPP_LOG_LEVEL", "ERROR", 0);
    c10::initLogging();
    const milliseconds timeout(timeout_ms);
    c10d::TCPStoreOptions o;
    o.port = static_cast<uint16_t>(port);
    o.isServer = serves;
    o.numWorkers = world;
    o.waitWorkers = false;
    o.multiTenant = true;
    o.timeout = timeout;
    auto made = std::make_unique<Group>();
    made->store = c10::make_intrusive<c10d::PrefixStore>(prefix, c10::make_intrusive<c10d::TCPStore>(address, o));
    made->processes = c10::make_intrusive<c10d::ProcessGroup>(made->store, rank, world);
    using Kind = c10d::ProcessGroup::BackendType;
    auto g = c10d::ProcessGroupGloo::Options::create(timeout);
    const char* network = std::getenv("GLOO_SOCKET_IFNAME");
    const bool local = std::string(address) == "127.0.0.1" || std::string(address) == "localhost";
    g->devices.push_back(network ? c10d::ProcessGroupGloo::createDeviceForInterface(network)
                         : local ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")
                                 : c10d::ProcessGroupGloo::createDefaultDevice());
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::make_intrusive<c10d::PrefixStore>("cpu", made->store), rank, world, g);
    made->processes->setDefaultBackend(Kind::GLOO);
    made->processes->setBackend(at::kCPU, Kind::GLOO, gloo);
    if (nccl) {
#ifdef DISBACK_NCCL
      const auto store = c10::make_intrusive<c10d::PrefixStore>("cuda", made->store);
      made->processes->setBackend(at::kCUDA, Kind::NCCL, make_nccl(store, rank, world, timeout));
#else
      TORCH_CHECK(false, "this build has no NCCL");
#endif
    }
    *out = made.release();
  });
}

// Ends what is under way; nobody waits for it any longer.
void disback_dist_drop(void* g) {
  (void)guarded([&] { delete static_cast<Group*>(g); });
}

// Lays down bytes for the others under a name of its own.
char* disback_dist_put(void* g, const char* key, const uint8_t* bytes, size_t count) {
  return guarded([&] { of(g).store->set(key, std::vector<uint8_t>(bytes, bytes + count)); });
}

// Waits for what another process lays down under this name. *out: `*count` bytes for `disback_free`.
char* disback_dist_get(void* g, const char* key, int64_t timeout_ms, uint8_t** out, size_t* count) {
  return guarded([&] {
    of(g).store->wait({key}, milliseconds(timeout_ms));
    const std::vector<uint8_t> found = of(g).store->get(key);
    *count = found.size();
    *out = static_cast<uint8_t*>(std::malloc(found.size() + 1));
    TORCH_CHECK(*out != nullptr, "out of memory");
    std::memcpy(*out, found.data(), found.size());
  });
}

// Values of rank 0 into everyone's tensors, in place. They may lie anyhow in memory, on every process alike.
char* disback_dist_broadcast(void* g, at::Tensor* const* tensors, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<c10::intrusive_ptr<c10d::Work>> works;
    std::vector<at::Tensor> kept;
    for (size_t i = 0; i < count; ++i) {
      const at::Tensor t = tensors[i]->detach();
      TORCH_CHECK(t.is_non_overlapping_and_dense(), "a tensor with gaps cannot be sent to other processes");
      if (t.numel() == 0) continue;
      std::vector<at::Tensor> one{t.as_strided({t.numel()}, {1})};
      c10d::BroadcastOptions o;
      o.rootRank = 0;
      works.push_back(of(g).processes->broadcast(one, o));
      kept.push_back(one[0]);
    }
    for (auto& w : works) w->wait();
  });
}

// [n] of every process as [world, n], in the order of their ranks.
char* disback_dist_gather(void* g, const at::Tensor* mine, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const int64_t world = of(g).processes->getSize();
    at::Tensor in = mine->detach().contiguous().flatten();
    at::Tensor all = at::empty({world * in.numel()}, in.options());
    of(g).processes->_allgather_base(all, in)->wait();
    *out = new at::Tensor(all.view({world, in.numel()}));
  });
}

// Sums the gradients of f32 parameters. g: the group, or nullptr for one process that sums micro-batch by micro-batch. bytes: of a
// bucket, about.
char* disback_reducer_new(void* g, at::Tensor* const* params, size_t count, int64_t bytes, void** out) {
  return guarded([&] {
    auto r = std::make_unique<Reducer>();
    r->group = static_cast<Group*>(g);
    r->world = g == nullptr ? 1 : of(g).processes->getSize();
    for (size_t i = 0; i < count; ++i) {
      TORCH_CHECK(params[i]->scalar_type() == at::kFloat, "gradients of ", params[i]->scalar_type(), " are not summed");
      TORCH_CHECK(params[i]->is_non_overlapping_and_dense(), "a parameter with gaps in memory");
      TORCH_CHECK(params[i]->device() == params[0]->device(), "parameters on several devices");
      r->params.push_back(*params[i]);
    }
    r->ordered = g == nullptr || count == 0 || params[0]->is_cpu();
    r->reached.assign(count, false);
    r->buckets = split(r->params, bytes, r->world);
    *out = r.release();
  });
}

void disback_reducer_drop(void* r) {
  (void)guarded([&] { delete static_cast<Reducer*>(r); });
}

// The micro-batches of a round are done: `rows` of them in all, one of each of the first `rows` processes. Begins to exchange their
// gradients, which this process's parameters lose. active: this process has computed one.
char* disback_reducer_round(void* reducer, int64_t rows, bool active) {
  auto& r = *static_cast<Reducer*>(reducer);
  return guarded([&] {
    at::NoGradGuard no_grad;
    if (!r.ordered) return;
    settle(r);
    for (Bucket& b : r.buckets) {
      flatten(r, b, active);
      if (r.group == nullptr) continue;
      b.received = at::empty_like(b.send);
      std::vector<int64_t> even;
      b.work = r.group->processes->alltoall_base(b.received, b.send, even, even);
    }
    r.rows = rows;
  });
}

// All micro-batches are done: the parameters' gradients become the sums over all of them, on every process.
char* disback_reducer_finish(void* reducer) {
  auto& r = *static_cast<Reducer*>(reducer);
  return guarded([&] {
    at::NoGradGuard no_grad;
    settle(r);
    std::vector<c10::intrusive_ptr<c10d::Work>> works;
    for (Bucket& b : r.buckets) {
      if (!r.ordered) {
        flatten(r, b, true);
        std::vector<at::Tensor> one{b.send};
        works.push_back(r.group->processes->allreduce(one));
      } else if (r.group != nullptr) {
        b.send = at::empty({r.world * b.part}, b.sum.options());
        works.push_back(r.group->processes->_allgather_base(b.send, b.sum));
      }
    }
    for (auto& w : works) w->wait();
    for (Bucket& b : r.buckets) {
      hand_out(r, b, r.group == nullptr ? b.sum : b.send);
      b.sum.reset(), b.send.reset();
    }
    r.reached.assign(r.params.size(), false);
  });
}
}
