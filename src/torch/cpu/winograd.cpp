// 3x3 convolutions of f32 on the CPU by Winograd's minimal filtering (Lavin & Gray 2016, arXiv 1509.09308), in the forward
// pass and both backward ones: 16 products for 4 outputs instead of 36, and 9 where an image is 2x2 and all around it is
// padding. Tensors are channels-last, so that each transform works on vectors of channels; the products are those of gemm.h.
//
//   U = B' d B of each tile d of the input, W = G w G', M = U W summed over channels, output tile = A' M A
//   gradient of the input: the same with the filter turned round; of the filter: G' (sum over tiles (A dy A') U) G

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "../border.h"
#include "gemm.h"
#include "lanes.h"
#include "parallel.h"

namespace {

// Both rules in one dimension: `products` for 2 outputs of `inputs`. The transforms take and give vectors of any kind.

// F(2, 3): any two neighbouring outputs.
struct Inner {
  static constexpr int products = 4, inputs = 4, before = 1;
  template <class Vec>
  static ALWAYS void input(const Vec* d, Vec* u) {
    u[0] = d[0] - d[2];
    u[1] = d[1] + d[2];
    u[2] = d[2] - d[1];
    u[3] = d[1] - d[3];
  }
  template <class Vec>
  static ALWAYS void output(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  template <class Vec>
  static ALWAYS void gradient(const Vec* y, Vec* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
  template <class Vec>
  static ALWAYS void filter(const Vec* w, Vec* f) {
    f[0] = w[0];
    f[1] = 0.5f * (w[0] + w[1] + w[2]);
    f[2] = 0.5f * (w[0] - w[1] + w[2]);
    f[3] = w[2];
  }
  template <class Vec>
  static ALWAYS void filter_gradient(const Vec* m, Vec* w) {
    w[0] = m[0] + 0.5f * (m[1] + m[2]);
    w[1] = 0.5f * (m[1] - m[2]);
    w[2] = 0.5f * (m[1] + m[2]) + m[3];
  }
};

// All of an image of two, zeros on both sides: y0 = w1 x0 + w2 x1, y1 = w0 x0 + w1 x1.
struct Pair {
  static constexpr int products = 3, inputs = 2, before = 0;
  template <class Vec>
  static ALWAYS void input(const Vec* d, Vec* u) {
    u[0] = d[0] + d[1];
    u[1] = d[1];
    u[2] = d[0];
  }
  template <class Vec>
  static ALWAYS void output(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1];
    y[1] = m[0] + m[2];
  }
  template <class Vec>
  static ALWAYS void gradient(const Vec* y, Vec* m) {
    m[0] = y[0] + y[1];
    m[1] = y[0];
    m[2] = y[1];
  }
  template <class Vec>
  static ALWAYS void filter(const Vec* w, Vec* f) {
    f[0] = w[1];
    f[1] = w[2] - w[1];
    f[2] = w[0] - w[1];
  }
  template <class Vec>
  static ALWAYS void filter_gradient(const Vec* m, Vec* w) {
    w[0] = m[2];
    w[1] = m[0] - m[1] - m[2];
    w[2] = m[1];
  }
};

// A transform of one dimension, applied to both of a square of vectors.
template <int from, int to, class Vec, class F>
ALWAYS void square(const Vec (&in)[from][from], Vec (&out)[to][to], const F& f) {
  Vec half[from][to];
  for (int i = 0; i < from; ++i) f(in[i], half[i]);
  for (int j = 0; j < to; ++j) {
    Vec column[from], turned[to];
    for (int i = 0; i < from; ++i) column[i] = half[i][j];
    f(column, turned);
    for (int i = 0; i < to; ++i) out[i][j] = turned[i];
  }
}

// Where channel c lies behind its tile: rows of channels are panels that lie 32 apart.
inline int64_t place(int64_t c, int64_t apart) { return c / disback::panel * apart + c % disback::panel; }

// The transforms of tiles for one rule, in winograd_tiles.h.
struct Transforms {
  void (*input)(const float* const* d, float* u, int64_t stride, int64_t apart, int64_t channels);
  void (*output)(const float* m, int64_t stride, const float* bias, float* const* y, int64_t channels);
  void (*gradient)(const float* const* y, float* m, int64_t stride, int64_t channels);
  void (*filter)(const float* w, bool turned, float* f, int64_t stride, int64_t apart, int64_t channels);
  void (*filter_gradient)(const float* m, int64_t stride, float* w, int64_t channels);
};

#define LEVEL wide
#define TARGET WIDE
#include "winograd_tiles.h"

#define LEVEL narrow
#define TARGET NARROW
#include "winograd_tiles.h"

template <class S>
const Transforms& transforms() {
  return disback::level() == disback::Level::avx512 ? wide::transforms<S> : narrow::transforms<S>;
}

at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

at::Tensor floats(int64_t count) { return at::empty({count}, at::kFloat); }

// Filters [K,C,3,3] in either memory format.
struct Filters {
  const float* data;
  int64_t k, c;
  bool last;
  explicit Filters(const at::Tensor& w)
      : data(w.const_data_ptr<float>()), k(w.size(0)), c(w.size(1)), last(!w.is_contiguous()) {}
  // [9][C] of one output channel, in `copy` where they do not lie so.
  const float* of(int64_t i, float* copy) const {
    const float* from = data + i * 9 * c;
    if (last) return from;
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t t = 0; t < 9; ++t) copy[t * c + j] = from[j * 9 + t];
    }
    return copy;
  }
};

at::Tensor filters_like(const at::Tensor& w) {
  return w.is_contiguous() ? w : channels_last(w);
}

// One convolution's sizes: C channels in, K out.
template <class S>
struct Winograd {
  static constexpr int64_t products = S::products * S::products;
  int64_t n, h, w, c, k;

  Winograd(const at::Tensor& x, int64_t k) : n(x.size(0)), h(x.size(2)), w(x.size(3)), c(x.size(1)), k(k) {}

  int64_t tiles() const { return n * (h / 2) * (w / 2); }

  // Rows of channels that do not all fall on the same lines of a cache.
  static int64_t row(int64_t channels) { return channels % 512 == 0 ? channels + 16 : channels; }

  // As many tiles at a time as keep what is between the transforms near.
  static int64_t chunk(int64_t count, int64_t most) {
    const int64_t chunks = (count + most - 1) / most;
    const int64_t rows = chunks * disback::unit();
    return (count + rows - 1) / rows * disback::unit();
  }

  // Image, row and column of the upper left output of a tile.
  template <class F>
  void each(int64_t from, int64_t to, const F& f) const {
    const int64_t across = w / 2, per = (h / 2) * across;
    for (int64_t t = from; t < to; ++t) f(t - from, t / per, 2 * (t % per / across), 2 * (t % across));
  }

  void inputs(const float* x, const float* zeros, int64_t from, int64_t to, float* u, int64_t step, int64_t stride,
              int64_t apart) const {
    each(from, to, [&](int64_t t, int64_t image, int64_t row, int64_t column) {
      const float* d[S::inputs * S::inputs];
      for (int i = 0; i < S::inputs; ++i) {
        for (int j = 0; j < S::inputs; ++j) {
          const int64_t y = row + i - S::before, z = column + j - S::before;
          const bool inside = y >= 0 && y < h && z >= 0 && z < w;
          d[S::inputs * i + j] = inside ? x + ((image * h + y) * w + z) * c : zeros;
        }
      }
      transforms<S>().input(d, u + t * step, stride, apart, c);
    });
  }

  // W packed: for each product [C, K], or where `turned` [K, C] of the filters turned round.
  at::Tensor packed(const Filters& filters, bool turned) const {
    const int64_t rows = turned ? k : c, columns = turned ? c : k, size = disback::packed_size(rows, columns);
    at::Tensor out = floats(products * size);
    float* to = out.mutable_data_ptr<float>();
    if (turned) {
      disback::parallel_for(0, k, 16, [&](int64_t a, int64_t b) {
        std::vector<float> copy(9 * c);
        for (int64_t i = a; i < b; ++i) {
          transforms<S>().filter(filters.of(i, copy.data()), true, to + i * disback::panel, size, k * disback::panel, c);
        }
      });
      return out;
    }
    disback::parallel_for(0, disback::panels(k), 1, [&](int64_t a, int64_t b) {
      at::Tensor buffer = floats(products * disback::panel * c);
      std::vector<float> copy(9 * c);
      float* some = buffer.mutable_data_ptr<float>();
      for (int64_t p = a; p < b; ++p) {
        const int64_t first = p * disback::panel, count = std::min(disback::panel, k - first);
        for (int64_t i = 0; i < count; ++i) {
          transforms<S>().filter(filters.of(first + i, copy.data()), false, some + i * c, disback::panel * c, disback::panel, c);
        }
        for (int64_t q = 0; q < products; ++q) {
          disback::pack({some + q * disback::panel * c, 1, c}, c, count, 0, 1, to + q * size + first * c);
        }
      }
    });
    return out;
  }

  // x [N,C,H,W] with packed filters, [N,K,H,W]; both channels-last.
  at::Tensor convolve(const at::Tensor& x, const at::Tensor& filters, const at::Tensor& bias) const {
    at::Tensor y = at::empty({n, k, h, w}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    const at::Tensor zeros = at::zeros({std::max(c, k)}, at::kFloat);
    const at::Tensor shift = bias.defined() ? bias.contiguous() : zeros;
    const float *from_x = x.const_data_ptr<float>(), *packed = filters.const_data_ptr<float>();
    const float *none = zeros.const_data_ptr<float>(), *b = shift.const_data_ptr<float>();
    float* out = y.mutable_data_ptr<float>();
    disback::parallel_for(0, tiles(), 28, [&](int64_t first, int64_t last) {
      const int64_t most = chunk(last - first, 84), rc = row(c), rk = row(k), size = disback::packed_size(c, k);
      at::Tensor between = floats(products * most * (rc + rk));
      float *u = between.mutable_data_ptr<float>(), *m = u + products * most * rc;
      for (int64_t from = first; from < last; from += most) {
        const int64_t to = std::min(from + most, last);
        inputs(from_x, none, from, to, u, rc, most * rc, disback::panel);
        for (int64_t q = 0; q < products; ++q) {
          disback::multiply({u + q * most * rc, rc, 1}, 0, to - from, packed + q * size, c, k, nullptr, false,
                            m + q * most * rk, rk);
        }
        each(from, to, [&](int64_t t, int64_t image, int64_t row, int64_t column) {
          float* at = out + ((image * h + row) * w + column) * k;
          float* const places[4] = {at, at + k, at + w * k, at + (w + 1) * k};
          transforms<S>().output(m + t * rk, most * rk, b, places, k);
        });
      }
    });
    return y;
  }

  // Gradient of the filters, in the memory format of `like`.
  at::Tensor filters_gradient(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& like) const {
    const int64_t most = chunk(tiles(), std::clamp<int64_t>((8 << 20) / (4 * products * (c + k)), 112, 1024));
    const int64_t rk = row(k), wide = disback::packed_size(most, c);
    at::Tensor between = floats(products * (wide + most * rk)), total = floats(products * k * c);
    const at::Tensor zeros = at::zeros({c}, at::kFloat);
    const float *from_x = x.const_data_ptr<float>(), *from_y = dy.const_data_ptr<float>();
    const float* none = zeros.const_data_ptr<float>();
    float *u = between.mutable_data_ptr<float>(), *m = u + products * wide, *sum = total.mutable_data_ptr<float>();
    for (int64_t from = 0; from < tiles(); from += most) {
      const int64_t count = std::min(most, tiles() - from);
      disback::parallel_for(0, count, 16, [&](int64_t a, int64_t b) {
        inputs(from_x, none, from + a, from + b, u + a * disback::panel, disback::panel, wide, count * disback::panel);
        each(from + a, from + b, [&](int64_t t, int64_t image, int64_t row, int64_t column) {
          const float* at = from_y + ((image * h + row) * w + column) * k;
          const float* const places[4] = {at, at + k, at + w * k, at + (w + 1) * k};
          transforms<S>().gradient(places, m + (a + t) * rk, most * rk, k);
        });
      });
      disback::parallel_for(0, products, 1, [&](int64_t a, int64_t b) {
        for (int64_t q = a; q < b; ++q) {
          disback::multiply({m + q * most * rk, 1, rk}, 0, k, u + q * wide, count, c, nullptr, from > 0, sum + q * k * c, c);
        }
      });
    }
    at::Tensor grad = at::empty_like(like);
    float* to = grad.mutable_data_ptr<float>();
    const bool last = !like.is_contiguous();
    disback::parallel_for(0, k, 16, [&](int64_t a, int64_t b) {
      std::vector<float> some(9 * c);
      for (int64_t i = a; i < b; ++i) {
        float* at = to + i * 9 * c;
        transforms<S>().filter_gradient(sum + i * c, k * c, last ? at : some.data(), c);
        for (int64_t j = 0; j < c && !last; ++j) {
          for (int64_t t = 0; t < 9; ++t) at[j * 9 + t] = some[t * c + j];
        }
      }
    });
    return grad;
  }
};

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const at::Tensor filters = filters_like(weight);
  const auto with = [&](const auto& plan) { return plan.convolve(x, plan.packed(Filters(filters), false), bias); };
  if (x.size(2) == 2 && x.size(3) == 2) return with(Winograd<Pair>(x, weight.size(0)));
  return with(Winograd<Inner>(x, weight.size(0)));
}

template <class S>
void backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dy, bool for_x, bool for_weight,
              torch::autograd::variable_list& out) {
  const at::Tensor filters = filters_like(weight);
  const Winograd<S> plan(x, weight.size(0));
  if (for_x) {
    Winograd<S> turned(dy, plan.c);
    out[0] = turned.convolve(dy, plan.packed(Filters(filters), true), {});
  }
  if (for_weight) out[1] = plan.filters_gradient(x, dy, filters);
}

// In bf16 the operands are widened, the result and the gradients rounded: kept for the backward pass is what was given.
struct Convolution : torch::autograd::Function<Convolution> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& bias) {
    OPERATOR("disback::convolution");
    const at::Tensor x = channels_last(input);
    ctx->save_for_backward({x, weight});
    return convolve(x.to(at::kFloat), weight.to(at::kFloat), bias.to(at::kFloat)).to(input.scalar_type());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    OPERATOR("disback::convolution_backward");
    const auto saved = ctx->get_saved_variables();
    torch::autograd::variable_list out(3);
    if (!grads[0].defined()) return out;
    TORCH_CHECK(!at::GradMode::is_enabled(), "a second derivative of a 3x3 convolution on the CPU");
    const auto kind = saved[0].scalar_type();
    const at::Tensor x = saved[0].to(at::kFloat), weight = saved[1].to(at::kFloat);
    const at::Tensor dy = channels_last(grads[0]).to(at::kFloat);
    const bool for_x = ctx->needs_input_grad(0), for_weight = ctx->needs_input_grad(1);
    if (x.size(2) == 2 && x.size(3) == 2) {
      ::backward<Pair>(x, weight, dy, for_x, for_weight, out);
    } else {
      ::backward<Inner>(x, weight, dy, for_x, for_weight, out);
    }
    if (ctx->needs_input_grad(2)) out[2] = dy.sum({0, 2, 3});
    for (at::Tensor& t : out) {
      if (t.defined()) t = t.to(kind);
    }
    return out;
  }
};

}  // namespace

extern "C" {

// Vectors that the products here are written for and the processor has: 0 none, 1 AVX2, 2 AVX-512.
int disback_level() { return static_cast<int>(disback::level()); }

// x [N,C,H,W] f32 or bf16 on the CPU like the others, H and W even, w [K,C,3,3], C and K multiples of 16, bias [K] or nullptr; padded by one, stride 1.
// Differentiable once.
char* disback_winograd(const at::Tensor* x, const at::Tensor* w, const at::Tensor* bias, at::Tensor** out) {
  return disback::guarded([&] {
    disback::on_cpu("a convolution", {x, w, bias});
    // An autograd function takes no absent tensors.
    const at::Tensor shift = bias == nullptr ? at::zeros({w->size(0)}, w->options().memory_format(std::nullopt)) : *bias;
    *out = new at::Tensor(Convolution::apply(*x, *w, shift));
  });
}
}
