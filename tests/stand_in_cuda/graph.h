// CUDAGraph: what is recorded runs again when it is replayed.
#pragma once
#include "device.h"
#include "kernels.h"

namespace at::cuda {
static std::mutex graphs_lock;
static std::map<const void*, stand_in::Recording*> graphs;
CUDAGraph::CUDAGraph(bool keep) : capture_stream_(c10::cuda::getDefaultCUDAStream(0)), keep_graph_(keep) {}
CUDAGraph::~CUDAGraph() { reset(); }
void CUDAGraph::reset() {
  std::lock_guard<std::mutex> g(graphs_lock);
  auto it = graphs.find(this);
  if (it == graphs.end()) return;
  stand_in::Recording* r = it->second;
  graphs.erase(it);
  std::lock_guard<std::recursive_mutex> h(stand_in::recording_lock);
  if (stand_in::active == r) stand_in::active = nullptr;
  for (void* p : r->pool) stand_in::pools.erase(p);
  auto& pool = stand_in::pool(r->device);
  for (void* p : r->freed) stand_in::DeviceMemory::poison(p, pool.size(p)), pool.give(p);
  delete r;
}
void CUDAGraph::capture_begin(MempoolId_t, cudaStreamCaptureMode) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK(stream.id() != 0, "CUDA graphs must be captured on a non-default stream.");
  TORCH_CHECK(stand_in::active == nullptr, "a capture is under way");
  auto* r = new stand_in::Recording{stream.device_index(), stream.id()};
  std::lock_guard<std::mutex> g(graphs_lock);
  graphs[this] = r;
  stand_in::active = r;
}
void CUDAGraph::capture_end() {
  std::lock_guard<std::mutex> g(graphs_lock);
  stand_in::Recording* r = graphs.at(this);
  std::lock_guard<std::recursive_mutex> h(stand_in::recording_lock);
  stand_in::active = nullptr;
  // Nothing has happened yet.
  for (auto& [p, bytes] : r->before) std::memcpy(p, bytes.data(), bytes.size());
  for (void* p : r->pool) stand_in::DeviceMemory::poison(p, stand_in::pool(r->device).size(p));
  r->before.clear();
}
void CUDAGraph::replay() {
  stand_in::Recording* r;
  {
    std::lock_guard<std::mutex> g(graphs_lock);
    r = graphs.at(this);
  }
  auto& report = stand_in::report();
  ++report.replays;
  report.replayed += r->launches.size();
  for (const auto& [p, o] : r->outside)
    TORCH_CHECK(stand_in::pool(r->device).serial(p) == o.serial, "stand-in CUDA: a graph is replayed that reads or writes memory freed since it was recorded: ", o.user);
  for (const auto& l : r->launches) stand_in::run(l);
}
}  // namespace at::cuda
