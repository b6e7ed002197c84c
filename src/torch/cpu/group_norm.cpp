// Group norm of channels-last images on the CPU, in f32 (those of bf16 are widened and rounded): libtorch's kernel for that format goes through one pixel's channels of
// one group at a time, which are few. Here each pass works on vectors of channels of a whole image.
//
//   y = x a + b with a = w r, b = bias - mean a; r = 1 / sqrt(variance + epsilon) of each image's group
//   dx = r (w dy - (sum of w dy + xh sum of w dy xh) / M) with xh = (x - mean) r and M elements a group

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../border.h"
#include "gemm.h"
#include "lanes.h"
#include "parallel.h"

namespace {

// What goes through an image, in group_norm_passes.h.
struct Passes {
  void (*sums)(const float* x, const float* shift, int64_t pixels, int64_t channels, float* out);
  void (*squares)(const float* x, const float* shift, int64_t pixels, int64_t channels, float* out);
  void (*scaled)(const float* x, const float* a, const float* b, int64_t pixels, int64_t channels, float* y);
  void (*gradient_sums)(const float* x, const float* dy, const float* mean, const float* r, int64_t pixels, int64_t channels,
                        float* plain, float* with_x);
  void (*combined)(const float* x, const float* dy, const float* a, const float* b, const float* c, int64_t pixels,
                   int64_t channels, float* dx);
};

#define LEVEL wide
#define TARGET WIDE
#include "group_norm_passes.h"

#define LEVEL narrow
#define TARGET NARROW
#include "group_norm_passes.h"

const Passes& passes() { return disback::level() == disback::Level::avx512 ? wide::passes : narrow::passes; }

// Every channel gets its group's value of `f` over the group's channels.
template <class F>
void by_group(int64_t channels, int64_t groups, float* out, const F& f) {
  const int64_t each = channels / groups;
  for (int64_t g = 0; g < groups; ++g) std::fill_n(out + g * each, each, f(g * each, (g + 1) * each));
}

float total(const float* values, int64_t from, int64_t to) {
  float sum = 0;
  for (int64_t i = from; i < to; ++i) sum += values[i];
  return sum;
}

struct GroupNorm : torch::autograd::Function<GroupNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& given, const std::optional<at::Tensor>& w,
                            const std::optional<at::Tensor>& bias, int64_t groups, double epsilon) {
    OPERATOR("disback::group_norm");
    const at::Tensor x = given.to(at::kFloat);
    const int64_t n = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    at::Tensor y = at::empty_like(x), mean = at::empty({n, channels}, at::kFloat), r = at::empty({n, channels}, at::kFloat);
    const at::Tensor scale = w ? w->contiguous() : at::ones({channels}, at::kFloat);
    const at::Tensor shift = bias ? bias->contiguous() : at::zeros({channels}, at::kFloat);
    const float *from = x.const_data_ptr<float>(), *s = scale.const_data_ptr<float>(), *t = shift.const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>(), *means = mean.mutable_data_ptr<float>(), *rs = r.mutable_data_ptr<float>();
    const float count = static_cast<float>(pixels * (channels / groups));
    disback::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      std::vector<float> sum(channels), zeros(channels, 0.0f), a(channels), b(channels);
      for (int64_t i = first; i < last; ++i) {
        const float* image = from + i * pixels * channels;
        float *m = means + i * channels, *inverse = rs + i * channels;
        passes().sums(image, zeros.data(), pixels, channels, sum.data());
        by_group(channels, groups, m, [&](int64_t k, int64_t e) { return total(sum.data(), k, e) / count; });
        passes().squares(image, m, pixels, channels, sum.data());
        by_group(channels, groups, inverse, [&](int64_t k, int64_t e) {
          return 1.0f / std::sqrt(total(sum.data(), k, e) / count + static_cast<float>(epsilon));
        });
        for (int64_t c = 0; c < channels; ++c) {
          a[c] = s[c] * inverse[c];
          b[c] = t[c] - m[c] * a[c];
        }
        passes().scaled(image, a.data(), b.data(), pixels, channels, to + i * pixels * channels);
      }
    });
    ctx->save_for_backward({given, scale, mean, r});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["scale"] = w.has_value();
    ctx->saved_data["bias"] = bias.has_value();
    return y.to(given.scalar_type());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    OPERATOR("disback::group_norm_backward");
    torch::autograd::variable_list out(5);
    if (!grads[0].defined()) return out;
    TORCH_CHECK(!at::GradMode::is_enabled(), "a second derivative of group norm on the CPU");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &given = saved[0], &scale = saved[1], &mean = saved[2], &r = saved[3];
    const at::Tensor x = given.to(at::kFloat);
    const int64_t groups = ctx->saved_data["groups"].toInt();
    const int64_t n = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    const at::Tensor dy = grads[0].contiguous(at::MemoryFormat::ChannelsLast).to(at::kFloat);
    at::Tensor dx = at::empty_like(x), plain = at::empty({n, channels}, at::kFloat), with_x = at::empty_like(plain);
    const float *from = x.const_data_ptr<float>(), *seed = dy.const_data_ptr<float>(), *s = scale.const_data_ptr<float>();
    const float *means = mean.const_data_ptr<float>(), *rs = r.const_data_ptr<float>();
    float *to = dx.mutable_data_ptr<float>(), *p = plain.mutable_data_ptr<float>(), *q = with_x.mutable_data_ptr<float>();
    const float count = static_cast<float>(pixels * (channels / groups));
    const bool for_x = ctx->needs_input_grad(0);
    disback::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      std::vector<float> a(channels), b(channels), c(channels), sum(channels), sum_x(channels);
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = i * pixels * channels, row = i * channels;
        passes().gradient_sums(from + at, seed + at, means + row, rs + row, pixels, channels, p + row, q + row);
        if (!for_x) continue;
        const auto weighted = [&](const float* values) {
          return [=](int64_t k, int64_t e) {
            float sum = 0;
            for (int64_t j = k; j < e; ++j) sum += s[j] * values[j];
            return sum / count;
          };
        };
        by_group(channels, groups, sum.data(), weighted(p + row));
        by_group(channels, groups, sum_x.data(), weighted(q + row));
        for (int64_t j = 0; j < channels; ++j) {
          const float inverse = rs[row + j];
          a[j] = inverse * s[j];
          c[j] = -inverse * inverse * sum_x[j];
          b[j] = -inverse * sum[j] - c[j] * means[row + j];
        }
        passes().combined(from + at, seed + at, a.data(), b.data(), c.data(), pixels, channels, to + at);
      }
    });
    if (for_x) out[0] = dx.to(given.scalar_type());
    // Absent ones are not counted.
    const bool has_scale = ctx->saved_data["scale"].toBool(), has_bias = ctx->saved_data["bias"].toBool();
    if (has_scale && ctx->needs_input_grad(1)) out[1] = with_x.sum(0);
    if (has_bias && ctx->needs_input_grad(has_scale ? 2 : 1)) out[2] = plain.sum(0);
    return out;
  }
};

}  // namespace

extern "C" {

// x [N,C,H,W] f32 or bf16 on the CPU, channels-last, C a multiple of 16; scale and bias [C] or nullptr. Differentiable
// once.
char* disback_group_norm(const at::Tensor* x, int64_t groups, const at::Tensor* scale, const at::Tensor* bias, double epsilon,
                         at::Tensor** out) {
  return disback::guarded([&] {
    disback::on_cpu("group norm", {x, scale, bias});
    const auto maybe = [](const at::Tensor* t) { return t == nullptr ? std::nullopt : std::optional<at::Tensor>(*t); };
    *out = new at::Tensor(GroupNorm::apply(*x, maybe(scale), maybe(bias), groups, epsilon));
  });
}
}
