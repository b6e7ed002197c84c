// GELU by its tanh form, f32 on the CPU: one exponential and one division an element, in vectors, where libtorch's takes a
// hyperbolic tangent. 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "../border.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using disback::lanes;
using disback::Vec;

constexpr int64_t grain = 1 << 14;
typedef int32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));

constexpr float twice_root = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float cubic = 0.044715f;

// e^v, v within -87..88: 2^n e^r with |r| <= ln 2 / 2, the latter as a polynomial (relative error below 2e-7). n is found by
// rounding against a large number whose low bits it then fills.
#define EXP(v, out)                                                                               \
  do {                                                                                            \
    const Vec magic = (v)*1.44269504f + 12582912.0f;                                              \
    const Vec n = magic - 12582912.0f;                                                            \
    const Vec r = ((v)-n * 0.693359375f) + n * 2.12194440e-4f;                                    \
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;                                              \
    p = p * r + 8.3334519073e-3f;                                                                 \
    p = p * r + 4.1665795894e-2f;                                                                 \
    p = p * r + 1.6666665459e-1f;                                                                 \
    p = p * r + 5.0000001201e-1f;                                                                 \
    p = p * r * r + r + 1.0f;                                                                     \
    const Bits power = ((Bits)magic - 0x4B400000 + 127) << 23;                                    \
    (out) = p * (Vec)power;                                                                       \
  } while (0)

// 1 / (1 + exp(-2 u)); NaN stays NaN.
#define GATE(x, out)                                                \
  do {                                                              \
    Vec t = -(twice_root * (x)) * (1.0f + cubic * (x) * (x));       \
    t = t > 87.0f ? Vec{} + 87.0f : t;                              \
    t = t < -87.0f ? Vec{} - 87.0f : t;                             \
    Vec e;                                                          \
    EXP(t, e);                                                      \
    (out) = 1.0f / (1.0f + e);                                      \
  } while (0)

CLONES void forward_block(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec v = LOAD(x + i);
    Vec gate;
    GATE(v, gate);
    STORE(y + i, v * gate);
  }
}

CLONES void backward_block(const float* x, const float* dy, float* dx, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec v = LOAD(x + i);
    Vec gate;
    GATE(v, gate);
    const Vec slope = twice_root * (1.0f + 3.0f * cubic * v * v);
    // At the far ends the slope times a vanished difference is 0, not infinity times 0.
    const Vec rest = v * gate * (1.0f - gate);
    STORE(dx + i, LOAD(dy + i) * (gate + rest * slope));
  }
}

// Calls f(from, count) on pieces whose count is a multiple of the lanes; the last elements go through a padded copy.
template <class Whole, class Rest>
void pieces(int64_t n, const Whole& whole, const Rest& rest) {
  const int64_t even = n / lanes * lanes;
  disback::parallel_for(0, even / lanes, grain / lanes, [&](int64_t a, int64_t b) { whole(a * lanes, (b - a) * lanes); });
  if (even < n) rest(even, n - even);
}

struct Gelu : torch::autograd::Function<Gelu> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input) {
    OPERATOR("disback::gelu");
    ctx->save_for_backward({input});
    const at::Tensor x = input.to(at::kFloat).contiguous();
    at::Tensor y = at::empty_like(x);
    const float* from = x.const_data_ptr<float>();
    float* to = y.mutable_data_ptr<float>();
    pieces(
        x.numel(), [&](int64_t at, int64_t count) { forward_block(from + at, to + at, count); },
        [&](int64_t at, int64_t count) {
          float in[lanes] = {}, out[lanes];
          std::copy_n(from + at, count, in);
          forward_block(in, out, lanes);
          std::copy_n(out, count, to + at);
        });
    return y.to(input.scalar_type());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    OPERATOR("disback::gelu_backward");
    if (!grads[0].defined()) return {at::Tensor()};
    const at::Tensor given = ctx->get_saved_variables()[0];
    const at::Tensor x = given.to(at::kFloat).contiguous(), dy = grads[0].to(at::kFloat).contiguous();
    at::Tensor dx = at::empty_like(x);
    const float *from = x.const_data_ptr<float>(), *seed = dy.const_data_ptr<float>();
    float* to = dx.mutable_data_ptr<float>();
    pieces(
        x.numel(), [&](int64_t at, int64_t count) { backward_block(from + at, seed + at, to + at, count); },
        [&](int64_t at, int64_t count) {
          float in[lanes] = {}, up[lanes] = {}, out[lanes];
          std::copy_n(from + at, count, in);
          std::copy_n(seed + at, count, up);
          backward_block(in, up, out, lanes);
          std::copy_n(out, count, to + at);
        });
    return {dx.to(given.scalar_type())};
  }
};

}  // namespace

extern "C" {

// x f32 or bf16 on the CPU. Differentiable once.
char* disback_gelu_tanh(const at::Tensor* x, at::Tensor** out) {
  return disback::guarded([&] {
    disback::on_cpu("GELU", {x});
    *out = new at::Tensor(Gelu::apply(*x));
  });
}
}
