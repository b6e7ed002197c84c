// 3x3 convolutions of f32 on the CPU by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, arXiv 1509.09308): 16
// products for 4 outputs instead of 36, in the forward pass and both backward ones. Tensors are channels-last, so that each
// transform works on vectors of channels, and the products are batched matrix products of libtorch.
//
//   U = B' d B of each 4x4 tile d of the input, W = G w G', M = U W summed over channels, output tile = A' M A
//   gradient of the input: the same with the filter turned round; of the filter: G' (sum over tiles (A dy A') U) G

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "border.h"
#include "lanes.h"

namespace {

using disback::lanes;
using disback::Vec;

// B' d B; the 16 results lie `stride` floats apart.
CLONES void input_tile(const float* const* d, float* u, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec t[4][4];
    for (int j = 0; j < 4; ++j) {
      const Vec d0 = LOAD(d[j] + c), d1 = LOAD(d[4 + j] + c), d2 = LOAD(d[8 + j] + c), d3 = LOAD(d[12 + j] + c);
      t[0][j] = d0 - d2;
      t[1][j] = d1 + d2;
      t[2][j] = d2 - d1;
      t[3][j] = d1 - d3;
    }
    for (int i = 0; i < 4; ++i) {
      float* to = u + 4 * i * stride + c;
      STORE(to, t[i][0] - t[i][2]);
      STORE(to + stride, t[i][1] + t[i][2]);
      STORE(to + 2 * stride, t[i][2] - t[i][1]);
      STORE(to + 3 * stride, t[i][1] - t[i][3]);
    }
  }
}

// A' M A + bias to the four places of an output tile.
CLONES void output_tile(const float* m, int64_t stride, const float* bias, float* const* y, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec t[2][4];
    for (int j = 0; j < 4; ++j) {
      const float* at = m + j * stride + c;
      const Vec m0 = LOAD(at), m1 = LOAD(at + 4 * stride), m2 = LOAD(at + 8 * stride), m3 = LOAD(at + 12 * stride);
      t[0][j] = m0 + m1 + m2;
      t[1][j] = m1 - m2 - m3;
    }
    const Vec b = LOAD(bias + c);
    for (int i = 0; i < 2; ++i) {
      STORE(y[2 * i] + c, t[i][0] + t[i][1] + t[i][2] + b);
      STORE(y[2 * i + 1] + c, t[i][1] - t[i][2] - t[i][3] + b);
    }
  }
}

// A dy A'
CLONES void gradient_tile(const float* const* dy, float* m, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec t[4][2];
    for (int j = 0; j < 2; ++j) {
      const Vec a = LOAD(dy[j] + c), b = LOAD(dy[2 + j] + c);
      t[0][j] = a;
      t[1][j] = a + b;
      t[2][j] = a - b;
      t[3][j] = -b;
    }
    for (int i = 0; i < 4; ++i) {
      float* to = m + 4 * i * stride + c;
      STORE(to, t[i][0]);
      STORE(to + stride, t[i][0] + t[i][1]);
      STORE(to + 2 * stride, t[i][0] - t[i][1]);
      STORE(to + 3 * stride, -t[i][1]);
    }
  }
}

// G w G' of one output channel: w [3][3][C], turned round where asked.
CLONES void filter(const float* w, bool turned, float* out, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec t[4][3];
    for (int j = 0; j < 3; ++j) {
      const float* at = w + c;
      const Vec g0 = LOAD(at + (turned ? 8 - j : j) * channels);
      const Vec g1 = LOAD(at + (turned ? 5 - j : 3 + j) * channels);
      const Vec g2 = LOAD(at + (turned ? 2 - j : 6 + j) * channels);
      t[0][j] = g0;
      t[1][j] = 0.5f * (g0 + g1 + g2);
      t[2][j] = 0.5f * (g0 - g1 + g2);
      t[3][j] = g2;
    }
    for (int i = 0; i < 4; ++i) {
      float* to = out + 4 * i * stride + c;
      STORE(to, t[i][0]);
      STORE(to + stride, 0.5f * (t[i][0] + t[i][1] + t[i][2]));
      STORE(to + 2 * stride, 0.5f * (t[i][0] - t[i][1] + t[i][2]));
      STORE(to + 3 * stride, t[i][2]);
    }
  }
}

// G' m G of one output channel, to [3][3][C].
CLONES void filter_gradient(const float* m, int64_t stride, float* w, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec t[3][4];
    for (int j = 0; j < 4; ++j) {
      const float* at = m + j * stride + c;
      const Vec m0 = LOAD(at), m1 = LOAD(at + 4 * stride), m2 = LOAD(at + 8 * stride), m3 = LOAD(at + 12 * stride);
      t[0][j] = m0 + 0.5f * (m1 + m2);
      t[1][j] = 0.5f * (m1 - m2);
      t[2][j] = 0.5f * (m1 + m2) + m3;
    }
    for (int i = 0; i < 3; ++i) {
      float* to = w + 3 * i * channels + c;
      STORE(to, t[i][0] + 0.5f * (t[i][1] + t[i][2]));
      STORE(to + channels, 0.5f * (t[i][1] - t[i][2]));
      STORE(to + 2 * channels, 0.5f * (t[i][1] + t[i][2]) + t[i][3]);
    }
  }
}

at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// Tiles of a batch of images, in the order image, row, column.
struct Tiles {
  int64_t n, h, w;
  int64_t count() const { return n * (h / 2) * (w / 2); }
  // Calls f(tile - from, image, row and column of its upper left output) for tiles from..to.
  template <class F>
  void each(int64_t from, int64_t to, const F& f) const {
    at::parallel_for(from, to, 16, [&](int64_t a, int64_t b) {
      for (int64_t t = a; t < b; ++t) {
        const int64_t per = (h / 2) * (w / 2), in = t % per;
        f(t - from, t / per, 2 * (in / (w / 2)), 2 * (in % (w / 2)));
      }
    });
  }
};

// As many tiles at a time as keep what is between the transforms in a cache.
int64_t chunk(int64_t channels_in, int64_t channels_out) {
  const int64_t bytes = 16 * 4 * (channels_in + channels_out);
  return std::clamp<int64_t>((8 << 20) / bytes, 64, 1024);
}

// U of tiles from..to of x, [16][tiles][C].
void transform_input(const Tiles& tiles, const at::Tensor& x, int64_t from, int64_t to, at::Tensor& u) {
  const int64_t channels = x.size(1), stride = (to - from) * channels;
  const std::vector<float> zeros(channels, 0.0f);
  const float* data = x.const_data_ptr<float>();
  float* out = u.mutable_data_ptr<float>();
  tiles.each(from, to, [&](int64_t k, int64_t image, int64_t row, int64_t column) {
    const float* d[16];
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int64_t y = row + i - 1, z = column + j - 1;
        const bool inside = y >= 0 && y < tiles.h && z >= 0 && z < tiles.w;
        d[4 * i + j] = inside ? data + ((image * tiles.h + y) * tiles.w + z) * channels : zeros.data();
      }
    }
    input_tile(d, out + k * channels, stride, channels);
  });
}

// W of all filters, [16][K][C].
at::Tensor transform_filters(const at::Tensor& weight, bool turned) {
  const int64_t k = weight.size(0), c = weight.size(1);
  const at::Tensor w = channels_last(weight);
  at::Tensor out = at::empty({16, k, c}, w.options().memory_format(std::nullopt));
  const float* from = w.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, k, 8, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) filter(from + i * 9 * c, turned, to + i * c, k * c, c);
  });
  return out;
}

at::Tensor scratch(const at::Tensor& like, int64_t rows, int64_t channels) {
  return at::empty({16, rows, channels}, like.options().memory_format(std::nullopt));
}

// Calls f(from, to, U, m) for as many tiles at a time as a cache holds; m is [16][tiles][K], to be filled.
template <class F>
void in_chunks(const Tiles& tiles, const at::Tensor& x, int64_t k, const F& f) {
  const int64_t c = x.size(1), step = chunk(c, k);
  at::Tensor u, m;
  for (int64_t from = 0; from < tiles.count(); from += step) {
    const int64_t to = std::min(from + step, tiles.count());
    if (!u.defined() || u.size(1) != to - from) {
      u = scratch(x, to - from, c);
      m = scratch(x, to - from, k);
    }
    transform_input(tiles, x, from, to, u);
    f(from, to, u, m);
  }
}

// x [N,C,H,W] with `filters`: [16][C][K] (a view where they are kept the other way round). Channels-last.
at::Tensor convolve(const at::Tensor& x, const at::Tensor& filters, const at::Tensor& bias) {
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  const int64_t k = filters.size(2);
  at::Tensor y = at::empty({tiles.n, k, tiles.h, tiles.w}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  float* out = y.mutable_data_ptr<float>();
  const at::Tensor shift = bias.defined() ? bias.contiguous() : at::zeros({k}, x.options().memory_format(std::nullopt));
  const float* b = shift.const_data_ptr<float>();
  in_chunks(tiles, x, k, [&](int64_t from, int64_t to, const at::Tensor& u, at::Tensor& m) {
    at::bmm_out(m, u, filters);
    const float* products = m.const_data_ptr<float>();
    tiles.each(from, to, [&](int64_t t, int64_t image, int64_t row, int64_t column) {
      float* at = out + ((image * tiles.h + row) * tiles.w + column) * k;
      float* const places[4] = {at, at + k, at + tiles.w * k, at + (tiles.w + 1) * k};
      output_tile(products + t * k, (to - from) * k, b, places, k);
    });
  });
  return y;
}

// Gradient of the filters, [K,C,3,3], channels-last.
at::Tensor filters_gradient(const at::Tensor& x, const at::Tensor& dy) {
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  const int64_t c = x.size(1), k = dy.size(1);
  at::Tensor sum = scratch(x, k, c);
  const float* data = dy.const_data_ptr<float>();
  in_chunks(tiles, x, k, [&](int64_t from, int64_t to, const at::Tensor& u, at::Tensor& m) {
    float* out = m.mutable_data_ptr<float>();
    tiles.each(from, to, [&](int64_t t, int64_t image, int64_t row, int64_t column) {
      const float* at = data + ((image * tiles.h + row) * tiles.w + column) * k;
      const float* const places[4] = {at, at + k, at + tiles.w * k, at + (tiles.w + 1) * k};
      gradient_tile(places, out + t * k, (to - from) * k, k);
    });
    if (from == 0) {
      at::bmm_out(sum, m.transpose(1, 2), u);
    } else {
      sum.baddbmm_(m.transpose(1, 2), u);
    }
  });
  at::Tensor w = at::empty({k, c, 3, 3}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const float* from = sum.const_data_ptr<float>();
  float* to = w.mutable_data_ptr<float>();
  at::parallel_for(0, k, 8, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) filter_gradient(from + i * c, k * c, to + i * 9 * c, c);
  });
  return w;
}

struct Convolution : torch::autograd::Function<Convolution> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& bias) {
    const at::Tensor x = channels_last(input);
    ctx->save_for_backward({x, weight});
    return convolve(x, transform_filters(weight, false).transpose(1, 2), bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    torch::autograd::variable_list out(3);
    if (!grads[0].defined()) return out;
    const at::Tensor dy = channels_last(grads[0]);
    if (ctx->needs_input_grad(0)) out[0] = convolve(dy, transform_filters(weight, true), {});
    if (ctx->needs_input_grad(1)) out[1] = filters_gradient(x, dy);
    if (ctx->needs_input_grad(2)) out[2] = dy.sum({0, 2, 3});
    return out;
  }
};

}  // namespace

extern "C" {

// x [N,C,H,W] f32 on the CPU, H and W even, w [K,C,3,3], C and K multiples of 16, bias [K] or nullptr; padded by one, stride 1.
// A second derivative is refused by libtorch.
char* disback_winograd(const at::Tensor* x, const at::Tensor* w, const at::Tensor* bias, at::Tensor** out) {
  return disback::guarded([&] {
    // An autograd function takes no absent tensors.
    const at::Tensor shift = bias == nullptr ? at::zeros({w->size(0)}, w->options().memory_format(std::nullopt)) : *bias;
    *out = new at::Tensor(Convolution::apply(*x, *w, shift));
  });
}
}
