// Linear layers of f32 on the CPU through the products of gemm.h: y = x W + b, and both gradients.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "../border.h"
#include "gemm.h"
#include "parallel.h"

namespace {

using disback::Matrix;

Matrix view(const at::Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0), t.stride(1)}; }
Matrix turned(const Matrix& m) { return {m.data, m.column, m.row}; }

// c [M, N] = a [M, K] b [K, N] + bias [N]; rows of c lie N apart.
void product(const Matrix& a, const Matrix& b, const float* bias, float* c, int64_t m, int64_t k, int64_t n) {
  const int64_t panels = disback::panels(n), block = disback::unit(), blocks = (m + block - 1) / block;
  at::Tensor buffer = at::empty({disback::packed_size(k, n)}, at::kFloat);
  float* packed = buffer.mutable_data_ptr<float>();
  disback::parallel_for(0, panels, std::max<int64_t>(1, (1 << 14) / (k * disback::panel)),
                   [&](int64_t from, int64_t to) { disback::pack(b, k, n, from, to, packed); });
  disback::parallel_for(0, blocks, std::max<int64_t>(1, (1 << 17) / (k * n)), [&](int64_t from, int64_t to) {
    disback::multiply(a, from * block, std::min(to * block, m), packed, k, n, bias, false, c, n);
  });
}

// x [M, K], w [K, N] of any strides, of which one is 1.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w,
                            const std::optional<at::Tensor>& bias) {
    OPERATOR("disback::linear");
    ctx->save_for_backward({x, w});
    ctx->saved_data["bias"] = bias.has_value();
    const int64_t m = x.size(0), k = x.size(1), n = w.size(1);
    at::Tensor y = at::empty({m, n}, x.options());
    const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
    product(view(x), view(w), b.defined() ? b.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), m, k, n);
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    OPERATOR("disback::linear_backward");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w = saved[1];
    torch::autograd::variable_list out(3);
    if (!grads[0].defined()) return out;
    const bool for_x = ctx->needs_input_grad(0), for_w = ctx->needs_input_grad(1),
               for_bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    if (at::GradMode::is_enabled()) {
      // Somebody wants to differentiate again.
      if (for_x) out[0] = grads[0].matmul(w.t());
      if (for_w) out[1] = x.t().matmul(grads[0]);
      if (for_bias) out[2] = grads[0].sum(0);
      return out;
    }
    const at::Tensor dy = grads[0].stride(1) == 1 ? grads[0] : grads[0].contiguous();
    const int64_t m = x.size(0), k = x.size(1), n = w.size(1);
    if (for_x) {
      out[0] = at::empty({m, k}, x.options());
      product(view(dy), turned(view(w)), nullptr, out[0].mutable_data_ptr<float>(), m, n, k);
    }
    if (for_w) {
      // In the weight's own order.
      if (w.stride(1) == 1) {
        out[1] = at::empty({k, n}, w.options());
        product(turned(view(x)), view(dy), nullptr, out[1].mutable_data_ptr<float>(), k, m, n);
      } else {
        at::Tensor other = at::empty({n, k}, w.options());
        product(turned(view(dy)), view(x), nullptr, other.mutable_data_ptr<float>(), n, m, k);
        out[1] = other.t();
      }
    }
    if (for_bias) out[2] = dy.sum(0);
    return out;
  }
};

}  // namespace

extern "C" {

// Whether loops are shared among threads: no runtime of OpenMP in the process, no threads.
bool disback_has_threads() { return disback::team() != nullptr; }

// Whether libtorch's products come from a library written for this processor: MKL, which runs at its best on Intel's alone.
bool disback_mkl_at_home() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel") && at::hasMKL();
#else
  return false;
#endif
}

// x [..., K] and w [K, N] of any strides, f32 on the CPU, bias [N] or nullptr: [..., N]. Where `disback_level` is not 0.
char* disback_linear(const at::Tensor* x, const at::Tensor* w, const at::Tensor* bias, at::Tensor** out) {
  return disback::guarded([&] {
    disback::on_cpu("a linear layer", {x, w, bias});
    const auto along = [](const at::Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous(); };
    auto shape = x->sizes().vec();
    at::Tensor rows = x->dim() == 2 ? *x : x->reshape({-1, x->size(-1)});
    rows = rows.stride(1) == 1 ? rows : rows.contiguous();
    const std::optional<at::Tensor> b = bias == nullptr ? std::nullopt : std::optional<at::Tensor>(*bias);
    at::Tensor y = Linear::apply(rows, along(*w), b);
    if (x->dim() != 2) {
      shape.back() = w->size(1);
      y = y.view(shape);
    }
    *out = new at::Tensor(y);
  });
}
}
