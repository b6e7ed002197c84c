// The sum of a network's gradients over the micro-batches of an update, whichever process computed them.

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../border.h"
#include "group.h"

namespace {

using disback::Group;
using disback::group_of;
using disback::guarded;

// Gradients that are summed together: flat, each in the order of its own memory, in parts of which each process sums one.
struct Bucket {
  std::vector<size_t> members;   // parameters, in the order of the flat memory
  std::vector<int64_t> offsets;  // where each begins
  std::vector<int64_t> parts;    // elements that each process sums
  int64_t mine = 0, begin = 0;   // this process's part: its size, and where it begins
  at::Tensor send;               // [sum of parts], while a round is under way
  at::Tensor received;           // [world * mine], the same: this process's part of everyone's gradients
  at::Tensor sum;                // [mine]: its sum over the micro-batches so far
  at::Tensor handed;             // everyone's sums: the memory of the parameters' gradients
  c10::intrusive_ptr<c10d::Work> work;
};

// Sums gradients over micro-batches in their order, whichever process computed them, so that the sum has the same bits for any number
// of processes: each process owns a part of every bucket, receives that part from all others after each round of micro-batches (one a
// process), and adds them one after the other, as one process alone would. At the end everyone gets all parts; or, where whole
// parameters have owners, each keeps those of its own, takes the step of those, and hands out the new values.
struct Reducer {
  Group* group;  // nullptr: one process
  int64_t rank, world;
  std::vector<at::Tensor> params;
  std::vector<int64_t> owners;  // of each parameter; empty: nobody owns one
  std::vector<uint8_t> reached;
  std::vector<Bucket> buckets;
  int64_t rows = 0;  // micro-batches of the round that is under way
  bool ordered;      // false: every process sums its own, and the sums are added by one exchange (CUDA)

  bool owned() const { return !owners.empty(); }
};

// The memory goes back at once, also where the thread that sent or received it has not let go of its handle yet.
void let_go(at::Tensor& t) {
  if (t.defined()) {
    at::StorageImpl* memory = t.storage().unsafeGetStorageImpl();
    memory->set_data_ptr(at::DataPtr(nullptr, memory->device()));
    memory->set_nbytes(0);
  }
  t.reset();
}

at::Tensor place(const at::Tensor& flat, const at::Tensor& like, int64_t offset) {
  return flat.as_strided(like.sizes(), like.strides(), flat.storage_offset() + offset);
}

void lay_out(const Reducer& r, Bucket& b) {
  if (r.owned()) {
    std::stable_sort(b.members.begin(), b.members.end(), [&](size_t a, size_t c) { return r.owners[a] < r.owners[c]; });
  }
  b.parts.assign(r.world, 0);
  int64_t end = 0;
  size_t at = 0;
  for (int64_t owner = 0; owner < r.world && r.owned(); ++owner) {
    const int64_t begin = end;
    for (; at < b.members.size() && r.owners[b.members[at]] == owner; ++at) {
      b.offsets.push_back(end);
      end += r.params[b.members[at]].numel();
    }
    end = std::max(end, begin + 1);  // (Nothing at all cannot be sent.)
    b.parts[owner] = end - begin;
  }
  if (!r.owned()) {
    for (size_t i : b.members) {
      b.offsets.push_back(end);
      end += r.params[i].numel();
    }
    b.parts.assign(r.world, (end + r.world - 1) / r.world);
  }
  b.mine = b.parts[r.rank];
  b.begin = std::accumulate(b.parts.begin(), b.parts.begin() + r.rank, int64_t{0});
}

void split(Reducer& r, int64_t bytes) {
  int64_t elements = 0;
  Bucket b;
  for (size_t i = 0; i < r.params.size(); ++i) {
    b.members.push_back(i);
    elements += r.params[i].numel();
    if (i + 1 == r.params.size() || 4 * elements >= bytes) {
      lay_out(r, b);
      r.buckets.push_back(std::move(b));
      b = Bucket(), elements = 0;
    }
  }
}

// This process's gradients into the bucket's flat memory; what no gradient has reached counts as 0.
void flatten(Reducer& r, Bucket& b, bool active) {
  const auto options = r.params[b.members[0]].options().requires_grad(false);
  b.send = at::empty({std::accumulate(b.parts.begin(), b.parts.end(), int64_t{0})}, options);
  int64_t end = 0;
  const auto fill = [&](int64_t to) {
    if (to > end) b.send.narrow(0, end, to - end).zero_();
  };
  for (size_t k = 0; k < b.members.size(); ++k) {
    const at::Tensor& p = r.params[b.members[k]];
    const at::Tensor grad = p.grad();
    fill(b.offsets[k]);
    at::Tensor there = place(b.send, p, b.offsets[k]);
    if (active && grad.defined()) {
      there.copy_(grad);
      r.reached[b.members[k]] = 1;
    } else {
      there.zero_();
    }
    p.mutable_grad().reset();
    end = b.offsets[k] + p.numel();
  }
  fill(b.send.numel());
}

// Everyone's part of every process's gradients is on its way.
void exchange(Reducer& r, Bucket& b) {
  b.received = at::empty({r.world * b.mine}, b.send.options());
  std::vector<int64_t> out, in;
  if (r.owned()) out.assign(r.world, b.mine), in = b.parts;
  b.work = r.group->processes->alltoall_base(b.received, b.send, out, in);
}

// The round under way is added to the sum.
void settle(Reducer& r, Bucket& b) {
  if (b.work) b.work->wait();
  b.work.reset();
  if (r.group == nullptr) {
    b.sum = b.sum.defined() ? b.sum.add_(b.send) : b.send;
  } else {
    let_go(b.send);
    for (int64_t row = 0; row < r.rows; ++row) {
      const at::Tensor part = b.received.narrow(0, row * b.mine, b.mine);
      b.sum = b.sum.defined() ? b.sum.add_(part) : part.clone();
    }
    let_go(b.received);
  }
  b.send.reset();
}

void settle(Reducer& r) {
  for (Bucket& b : r.buckets) {
    if (r.rows > 0 && b.send.defined()) settle(r, b);
  }
  r.rows = 0;
}

// A round of owned parameters: a bucket is exchanged while the next is laid out, and is gone before the one after that.
void round_owned(Reducer& r, int64_t rows, bool active) {
  r.rows = rows;
  for (size_t k = 0; k < r.buckets.size(); ++k) {
    flatten(r, r.buckets[k], active);
    exchange(r, r.buckets[k]);
    if (k > 0) settle(r, r.buckets[k - 1]);
  }
  settle(r);
}

// What was summed, as the parameters' gradients. They lie in `flat`, which is theirs from now on and begins at `begin` of the bucket.
void hand_out(Reducer& r, Bucket& b, const at::Tensor& flat, int64_t begin) {
  for (size_t k = 0; k < b.members.size(); ++k) {
    const size_t i = b.members[k];
    const bool here = !r.owned() || r.owners[i] == r.rank;
    if (here && r.reached[i]) r.params[i].mutable_grad() = place(flat, r.params[i], b.offsets[k] - begin);
  }
}

}  // namespace

extern "C" {

// Sums the gradients of f32 parameters. g: the group, or nullptr for one process that sums micro-batch by micro-batch. owners: the rank
// that keeps the sum of each parameter, or nullptr where all get all. bytes: of a bucket, about.
char* disback_reducer_new(void* g, at::Tensor* const* params, size_t count, const int64_t* owners, int64_t bytes, void** out) {
  return guarded([&] {
    auto r = std::make_unique<Reducer>();
    r->group = static_cast<Group*>(g);
    r->world = g == nullptr ? 1 : group_of(g).processes->getSize();
    r->rank = g == nullptr ? 0 : group_of(g).processes->getRank();
    for (size_t i = 0; i < count; ++i) {
      TORCH_CHECK(params[i]->scalar_type() == at::kFloat, "gradients of ", params[i]->scalar_type(), " are not summed");
      TORCH_CHECK(params[i]->is_non_overlapping_and_dense(), "a parameter with gaps in memory");
      TORCH_CHECK(params[i]->device() == params[0]->device(), "parameters on several devices");
      r->params.push_back(*params[i]);
    }
    if (owners != nullptr && g != nullptr) r->owners.assign(owners, owners + count);
    r->ordered = g == nullptr || count == 0 || params[0]->is_cpu();
    r->reached.assign(count, 0);
    split(*r, bytes);
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
    if (r.owned()) return round_owned(r, rows, active);
    settle(r);
    for (Bucket& b : r.buckets) {
      flatten(r, b, active);
      if (r.group != nullptr) exchange(r, b);
    }
    r.rows = rows;
  });
}

// All micro-batches are done: the parameters' gradients become the sums over all of them, on every process or on the one that owns
// them. reached: 1 for each parameter that a gradient has reached here.
char* disback_reducer_finish(void* reducer, uint8_t* reached) {
  auto& r = *static_cast<Reducer*>(reducer);
  return guarded([&] {
    at::NoGradGuard no_grad;
    if (r.owned() && !r.ordered) round_owned(r, r.world, true);
    settle(r);
    std::vector<c10::intrusive_ptr<c10d::Work>> works;
    for (Bucket& b : r.buckets) {
      if (r.owned()) break;
      if (!r.ordered) {
        flatten(r, b, true);
        std::vector<at::Tensor> one{b.send};
        works.push_back(r.group->processes->allreduce(one));
      } else if (r.group != nullptr) {
        b.send = at::empty({r.world * b.mine}, b.sum.options());
        works.push_back(r.group->processes->_allgather_base(b.send, b.sum));
      }
    }
    for (auto& w : works) w->wait();
    for (Bucket& b : r.buckets) {
      b.handed = r.group == nullptr || r.owned() ? b.sum : b.send;
      hand_out(r, b, b.handed, r.owned() ? b.begin : 0);
      if (!b.handed.is_same(b.sum)) let_go(b.sum);
      b.sum.reset(), b.send.reset();
    }
    std::memcpy(reached, r.reached.data(), r.reached.size());
    r.reached.assign(r.params.size(), 0);
  });
}

// The gradients are not needed any more: their memory goes back.
char* disback_reducer_let_go(void* reducer) {
  auto& r = *static_cast<Reducer*>(reducer);
  return guarded([&] {
    for (const at::Tensor& p : r.params) p.mutable_grad().reset();
    for (Bucket& b : r.buckets) let_go(b.handed);
  });
}

// Owned parameters have been stepped by their owners: everyone gets the new values, in place, a bucket while the next is laid out.
char* disback_reducer_hand_out(void* reducer) {
  auto& r = *static_cast<Reducer*>(reducer);
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<c10::intrusive_ptr<c10d::Work>> works;
    const auto take = [&](Bucket& b, std::vector<c10::intrusive_ptr<c10d::Work>>& under_way) {
      for (auto& w : under_way) w->wait();
      for (size_t k = 0; k < b.members.size(); ++k) {
        at::Tensor p = r.params[b.members[k]].detach();
        if (r.owners[b.members[k]] != r.rank) p.copy_(place(b.send, p, b.offsets[k]));
      }
      let_go(b.send);
    };
    for (size_t n = 0; n < r.buckets.size(); ++n) {
      Bucket& b = r.buckets[n];
      const int64_t total = std::accumulate(b.parts.begin(), b.parts.end(), int64_t{0});
      b.send = at::empty({total}, r.params[b.members[0]].options().requires_grad(false));
      std::vector<bool> owns(r.world, false);
      for (size_t k = 0; k < b.members.size(); ++k) {
        const at::Tensor p = r.params[b.members[k]].detach();
        owns[r.owners[b.members[k]]] = true;
        if (r.owners[b.members[k]] == r.rank) place(b.send, p, b.offsets[k]).copy_(p);
      }
      std::vector<c10::intrusive_ptr<c10d::Work>> next;
      int64_t begin = 0;
      for (int64_t owner = 0; owner < r.world; ++owner) {
        if (owns[owner]) {
          std::vector<at::Tensor> one{b.send.narrow(0, begin, b.parts[owner])};
          c10d::BroadcastOptions o;
          o.rootRank = owner;
          next.push_back(r.group->processes->broadcast(one, o));
        }
        begin += b.parts[owner];
      }
      if (n > 0) take(r.buckets[n - 1], works);
      works = std::move(next);
    }
    if (!r.buckets.empty()) take(r.buckets.back(), works);
  });
}

}  // extern "C"
