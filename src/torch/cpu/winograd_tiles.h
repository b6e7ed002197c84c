// The transforms of winograd.cpp on one kind of vectors. Included once for each: LEVEL is its namespace in lanes.h, TARGET the
// attribute of functions that use it.

namespace LEVEL {

using disback::LEVEL::lanes;
using disback::LEVEL::Vec;

// A tile of the input to its products, `stride` floats apart.
template <class S>
TARGET void input_tile(const float* const* d, float* u, int64_t stride, int64_t apart, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec in[S::inputs][S::inputs], out[S::products][S::products];
    for (int i = 0; i < S::inputs * S::inputs; ++i) in[i / S::inputs][i % S::inputs] = LOAD(d[i] + c);
    square<S::inputs, S::products>(in, out, S::template input<Vec>);
    float* to = u + place(c, apart);
    for (int i = 0; i < S::products * S::products; ++i) STORE(to + i * stride, out[i / S::products][i % S::products]);
  }
}

// Products and a bias to the four places of an output tile.
template <class S>
TARGET void output_tile(const float* m, int64_t stride, const float* bias, float* const* y, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec in[S::products][S::products], out[2][2];
    for (int i = 0; i < S::products * S::products; ++i) in[i / S::products][i % S::products] = LOAD(m + i * stride + c);
    square<S::products, 2>(in, out, S::template output<Vec>);
    for (int i = 0; i < 4; ++i) STORE(y[i] + c, out[i / 2][i % 2] + LOAD(bias + c));
  }
}

// Gradient of an output tile to that of its products.
template <class S>
TARGET void gradient_tile(const float* const* y, float* m, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec in[2][2], out[S::products][S::products];
    for (int i = 0; i < 4; ++i) in[i / 2][i % 2] = LOAD(y[i] + c);
    square<2, S::products>(in, out, S::template gradient<Vec>);
    for (int i = 0; i < S::products * S::products; ++i) STORE(m + i * stride + c, out[i / S::products][i % S::products]);
  }
}

// The filters of one output channel, w [9][C], turned round where asked.
template <class S>
TARGET void filter(const float* w, bool turned, float* f, int64_t stride, int64_t apart, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec in[3][3], out[S::products][S::products];
    for (int i = 0; i < 9; ++i) in[i / 3][i % 3] = LOAD(w + (turned ? 8 - i : i) * channels + c);
    square<3, S::products>(in, out, S::template filter<Vec>);
    float* to = f + place(c, apart);
    for (int i = 0; i < S::products * S::products; ++i) STORE(to + i * stride, out[i / S::products][i % S::products]);
  }
}

// The gradient of one output channel's filters, to w [9][C].
template <class S>
TARGET void filter_gradient(const float* m, int64_t stride, float* w, int64_t channels) {
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec in[S::products][S::products], out[3][3];
    for (int i = 0; i < S::products * S::products; ++i) in[i / S::products][i % S::products] = LOAD(m + i * stride + c);
    square<S::products, 3>(in, out, S::template filter_gradient<Vec>);
    for (int i = 0; i < 9; ++i) STORE(w + i * channels + c, out[i / 3][i % 3]);
  }
}

template <class S>
constexpr Transforms transforms = {input_tile<S>, output_tile<S>, gradient_tile<S>, filter<S>, filter_gradient<S>};

}  // namespace LEVEL

#undef LEVEL
#undef TARGET
