// The passes of group_norm.cpp on one kind of vectors. Included once for each: LEVEL is its namespace in lanes.h, TARGET the
// attribute of functions that use it.

namespace LEVEL {

using disback::LEVEL::lanes;
using disback::LEVEL::Vec;

// Sums over pixels, for each channel: of x - shift, or of its square.
template <bool squared>
TARGET void sums(const float* x, const float* shift, int64_t pixels, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; c += lanes) {
    const Vec s = LOAD(shift + c);
    Vec even = {}, odd = {};
    int64_t p = 0;
    for (; p + 1 < pixels; p += 2) {
      const Vec a = LOAD(x + p * channels + c) - s, b = LOAD(x + (p + 1) * channels + c) - s;
      even += squared ? a * a : a;
      odd += squared ? b * b : b;
    }
    if (p < pixels) {
      const Vec a = LOAD(x + p * channels + c) - s;
      even += squared ? a * a : a;
    }
    STORE(out + c, even + odd);
  }
}

TARGET void scaled(const float* x, const float* a, const float* b, int64_t pixels, int64_t channels, float* y) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; c += lanes) {
      STORE(y + p * channels + c, LOAD(x + p * channels + c) * LOAD(a + c) + LOAD(b + c));
    }
  }
}

// Sums over pixels of dy and of dy xh.
TARGET void gradient_sums(const float* x, const float* dy, const float* mean, const float* r, int64_t pixels,
                        int64_t channels, float* plain, float* with_x) {
  for (int64_t c = 0; c < channels; c += lanes) {
    const Vec m = LOAD(mean + c), s = LOAD(r + c);
    Vec a = {}, b = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec g = LOAD(dy + p * channels + c);
      a += g;
      b += g * (LOAD(x + p * channels + c) - m);
    }
    STORE(plain + c, a);
    STORE(with_x + c, b * s);
  }
}

// dx = a dy + b + c x for each channel.
TARGET void combined(const float* x, const float* dy, const float* a, const float* b, const float* c, int64_t pixels,
                   int64_t channels, float* dx) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t i = 0; i < channels; i += lanes) {
      const int64_t at = p * channels + i;
      STORE(dx + at, LOAD(dy + at) * LOAD(a + i) + LOAD(b + i) + LOAD(x + at) * LOAD(c + i));
    }
  }
}

constexpr Passes passes = {sums<false>, sums<true>, scaled, gradient_sums, combined};

}  // namespace LEVEL

#undef LEVEL
#undef TARGET
