// The products of gemm.h. A block of 14 rows and 32 columns is kept in 28 vector registers; each step along K takes two
// vectors of the packed operand and 14 numbers of the other, each broadcast from memory.

#include "gemm.h"
#include "lanes.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace disback {
namespace {

constexpr int64_t block_rows = 14;
// Steps along K at a time: 14 rows of A stay in the first cache, a panel of B in the second.
constexpr int64_t block_k = 384;
// Rows at a time: their part of A stays in the second cache.
constexpr int64_t group_rows = 12 * block_rows;

struct Tile {
  const float* a;
  int64_t row, column;
  const float* b;
  int64_t k;
  const float* bias;
  bool more;
  float* c;
  int64_t stride;
  __mmask16 left, right;
};

// `vectors` of a panel's two are computed.
template <int rows, int vectors>
WIDE void run(const Tile& t) {
  __m512 sum[rows][vectors];
  const __mmask16 mask[2] = {t.left, t.right};
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

using Run = void (*)(const Tile&);
template <int vectors>
constexpr Run runs[block_rows + 1] = {nullptr,          run<1, vectors>,  run<2, vectors>,  run<3, vectors>,
                                      run<4, vectors>,  run<5, vectors>,  run<6, vectors>,  run<7, vectors>,
                                      run<8, vectors>,  run<9, vectors>,  run<10, vectors>, run<11, vectors>,
                                      run<12, vectors>, run<13, vectors>, run<14, vectors>};

__mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }

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
WIDE void pack_panel(const Matrix& b, const float* from, int64_t k, int64_t columns, float* to) {
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

bool has_products() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma");
}

void pack(const Matrix& b, int64_t k, int64_t n, int64_t from, int64_t to, float* packed) {
  for (int64_t p = from; p < to; ++p) {
    pack_panel(b, b.data + p * panel * b.column, k, std::min(panel, n - p * panel), packed + p * k * panel);
  }
}

void multiply(const Matrix& a, int64_t from, int64_t to, const float* packed, int64_t k, int64_t n, const float* bias,
              bool more, float* c, int64_t stride) {
  // Rows whose distance is a multiple of 2 KiB fall on the same lines of the first cache: they are copied, a group at a time.
  const bool aliased = a.column == 1 && a.row % 512 == 0 && n > 2 * panel;
  alignas(64) static thread_local float copy[group_rows * block_k];
  for (int64_t k0 = 0; k0 < k; k0 += block_k) {
    const int64_t k1 = std::min(k0 + block_k, k);
    for (int64_t r0 = from; r0 < to; r0 += group_rows) {
      const int64_t r1 = std::min(r0 + group_rows, to);
      Matrix rows{a.data + r0 * a.row + k0 * a.column, a.row, a.column};
      if (aliased) {
        for (int64_t i = 0; i < r1 - r0; ++i) std::copy_n(rows.data + i * a.row, k1 - k0, copy + i * block_k);
        rows = {copy, block_k, 1};
      }
      for (int64_t j = 0; j < n; j += panel) {
        Tile t{nullptr, rows.row, rows.column, packed + j * k + k0 * panel, k1 - k0, bias ? bias + j : nullptr, more || k0 > 0,
               nullptr, stride, first(n - j), first(n - j - 16)};
        const Run* run = n - j > 16 ? runs<2> : runs<1>;
        for (int64_t i = r0; i < r1; i += block_rows) {
          t.a = rows.data + (i - r0) * rows.row;
          t.c = c + i * stride + j;
          run[std::min(block_rows, r1 - i)](t);
        }
      }
    }
  }
}

}  // namespace disback

#else

namespace disback {
bool has_products() { return false; }
void pack(const Matrix&, int64_t, int64_t, int64_t, int64_t, float*) {}
void multiply(const Matrix&, int64_t, int64_t, const float*, int64_t, int64_t, const float*, bool, float*, int64_t) {}
}  // namespace disback

#endif
