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
#include "group.h"

namespace {

using disback::guarded;
using std::chrono::milliseconds;

using disback::Group;

Group& of(void* g) { return disback::group_of(g); }

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

// A tensor of this process's to rank 0, which waits for it by disback_dist_receive, in the order of its rows.
char* disback_dist_send(void* g, const at::Tensor* mine) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> one{mine->detach().contiguous().flatten()};
    of(g).processes->send(one, 0, 0)->wait();
  });
}

// What `from` sends, into `there`, whose elements lie without gaps in the order of its rows.
char* disback_dist_receive(void* g, int from, at::Tensor* there) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    TORCH_CHECK(there->is_contiguous(), "a tensor with gaps cannot be received");
    std::vector<at::Tensor> one{there->detach().flatten()};
    of(g).processes->recv(one, from, 0)->wait();
  });
}

}  // extern "C"
