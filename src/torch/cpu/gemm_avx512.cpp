// The kernel of gemm.h with AVX-512. A block of 14 rows and 32 columns is kept in 28 vector registers; each step along K takes two
// vectors of the packed operand and 14 numbers of the other, each broadcast from memory.

#include "gemm_kernel.h"
#include "lanes.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace disback {
namespace {

constexpr int64_t block_rows = 14;

// The first n of 16.
__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }

// `vectors` of a panel's two are computed.
template <int rows, int vectors>
WIDE void block(const Tile& t) {
  __m512 sum[rows][vectors];
  const __mmask16 mask[2] = {first(t.columns), first(t.columns - 16)};
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      const float* from = t.more ? t.c + i * t.stride : t.bias;
      sum[i][j] = from ? _mm512_maskz_loadu_ps(mask[j], from + 16 * j) : _mm512_setzero_ps();
    }
  }
  const int64_t row = t.row, column = t.column;
  const float* p[(rows + 2) / 3];
#pragma GCC unroll 5
  for (int i = 0; i < (rows + 2) / 3; ++i) p[i] = t.a + 3 * i * row;
  const float* b = t.b;
  for (int64_t k = 0; k < t.k; ++k) {
    __m512 v[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) v[j] = _mm512_load_ps(b + 16 * j);
    b += panel;
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      const __m512 a = _mm512_set1_ps(p[i / 3][(i % 3) * row]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[i][j] = _mm512_fmadd_ps(a, v[j], sum[i][j]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < (rows + 2) / 3; ++i) p[i] += column;
  }
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) _mm512_mask_storeu_ps(t.c + i * t.stride + 16 * j, mask[j], sum[i][j]);
  }
}

using Block = void (*)(const Tile&);
template <int vectors>
constexpr Block runs[block_rows + 1] = {nullptr,          block<1, vectors>,  block<2, vectors>,  block<3, vectors>,
                                      block<4, vectors>,  block<5, vectors>,  block<6, vectors>,  block<7, vectors>,
                                      block<8, vectors>,  block<9, vectors>,  block<10, vectors>, block<11, vectors>,
                                      block<12, vectors>, block<13, vectors>, block<14, vectors>};

void run(const Tile& t, int64_t rows) { (t.columns > 16 ? runs<2> : runs<1>)[rows](t); }

// 16 rows of 16, `row` apart, to 16 rows `apart`, turned.
WIDE void turn(const float* from, int64_t row, float* to, int64_t apart) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(to + i * apart, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 4) * apart, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(to + (i + 8) * apart, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(to + (i + 12) * apart, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// One panel of which `columns` are there.
WIDE void pack(const Matrix& b, const float* from, int64_t k, int64_t columns, float* to) {
  if (b.column == 1) {
    const __mmask16 left = first(columns), right = first(columns - 16);
    for (int64_t i = 0; i < k; ++i) {
      _mm512_store_ps(to + i * panel, _mm512_maskz_loadu_ps(left, from + i * b.row));
      _mm512_store_ps(to + i * panel + 16, _mm512_maskz_loadu_ps(right, from + i * b.row + 16));
    }
    return;
  }
  for (int64_t half = 0; half < std::min(columns, panel); half += 16) {
    int64_t i = 0;
    if (b.row == 1 && columns >= half + 16) {
      for (; i + 16 <= k; i += 16) turn(from + i + half * b.column, b.column, to + i * panel + half, panel);
    }
    for (; i < k; ++i) {
      for (int64_t j = half; j < half + 16; ++j) {
        to[i * panel + j] = j < columns ? from[i * b.row + j * b.column] : 0.0f;
      }
    }
  }
}

}  // namespace

// 14 rows of A stay in the first cache, a panel of B in the second.
const Kernel avx512_kernel = {block_rows, 384, 12 * block_rows, run, pack};

}  // namespace disback

#else

namespace disback {
const Kernel avx512_kernel = {};
}  // namespace disback

#endif
