// A group of processes as dist.cpp forms it, for the files that use one.

#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace disback {

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroup> processes;
};

inline Group& group_of(void* g) { return *static_cast<Group*>(g); }

}  // namespace disback
