// The kernel of gemm.h with AVX2: 3 rows of a whole panel, or 6 of its left half, in 12 of the 16 vector registers.

#include <algorithm>

#include "gemm_kernel.h"
#include "lanes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace disback {
namespace {

alignas(32) const int32_t ends[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

// The first n of 8.
NARROW inline __m256i first(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ends + 8 - std::clamp<int64_t>(n, 0, 8)));
}

// `whole`: all columns of the vectors are there.
template <int rows, int vectors, bool whole>
NARROW void block(const Tile& t) {
  __m256 sum[rows][vectors];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const float* from = t.more ? t.c + i * t.stride : t.bias;
      if (from == nullptr) {
        sum[i][j] = _mm256_setzero_ps();
      } else {
        sum[i][j] = whole ? _mm256_loadu_ps(from + 8 * j) : _mm256_maskload_ps(from + 8 * j, first(t.columns - 8 * j));
      }
    }
  }
  const int64_t row = t.row, column = t.column;
  const float *p = t.a, *q = t.a + 3 * (rows > 3 ? row : 0), *b = t.b;
  for (int64_t k = 0; k < t.k; ++k) {
    if (rows <= 3) {
      __m256 a[rows];
#pragma GCC unroll 3
      for (int i = 0; i < rows; ++i) a[i] = _mm256_broadcast_ss(p + i * row);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const __m256 v = _mm256_load_ps(b + 8 * j);
#pragma GCC unroll 3
        for (int i = 0; i < rows; ++i) sum[i][j] = _mm256_fmadd_ps(a[i], v, sum[i][j]);
      }
    } else {
      __m256 v[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) v[j] = _mm256_load_ps(b + 8 * j);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const __m256 a = _mm256_broadcast_ss((i < 3 ? p : q) + (i % 3) * row);
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) sum[i][j] = _mm256_fmadd_ps(a, v[j], sum[i][j]);
      }
    }
    b += panel;
    p += column;
    q += column;
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = t.c + i * t.stride + 8 * j;
      if (whole) {
        _mm256_storeu_ps(to, sum[i][j]);
      } else {
        _mm256_maskstore_ps(to, first(t.columns - 8 * j), sum[i][j]);
      }
    }
  }
}

using Block = void (*)(const Tile&);
template <bool whole>
constexpr Block full[4] = {nullptr, block<1, 4, whole>, block<2, 4, whole>, block<3, 4, whole>};
template <bool whole>
constexpr Block half[7] = {nullptr,           block<1, 2, whole>, block<2, 2, whole>, block<3, 2, whole>,
                           block<4, 2, whole>, block<5, 2, whole>, block<6, 2, whole>};

void run(const Tile& tile, int64_t rows) {
  Tile t = tile;
  const bool wide = t.columns > 16;
  const Block* table = wide ? (t.columns == 32 ? full<true> : full<false>) : (t.columns == 16 ? half<true> : half<false>);
  const int64_t most = wide ? 3 : 6;
  for (int64_t i = 0; i < rows; i += most) {
    table[std::min(most, rows - i)](t);
    t.a += most * t.row;
    t.c += most * t.stride;
  }
}

// 8 rows of 8, `row` apart, to 8 rows a panel apart, turned.
NARROW void turn(const float* from, int64_t row, float* to) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * row);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * panel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * panel, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

NARROW void pack(const Matrix& b, const float* from, int64_t k, int64_t columns, float* to) {
  for (int64_t part = 0; part < panel; part += 8) {
    const int64_t there = columns - part;
    const float* start = from + part * b.column;
    float* out = to + part;
    int64_t i = 0;
    if (there <= 0) {
      for (; i < k; ++i) _mm256_store_ps(out + i * panel, _mm256_setzero_ps());
    } else if (b.column == 1) {
      const __m256i mask = first(there);
      if (there >= 8) {
        for (; i < k; ++i) _mm256_store_ps(out + i * panel, _mm256_loadu_ps(start + i * b.row));
      }
      for (; i < k; ++i) _mm256_store_ps(out + i * panel, _mm256_maskload_ps(start + i * b.row, mask));
    } else if (b.row == 1 && there >= 8) {
      for (; i + 8 <= k; i += 8) turn(start + i, b.column, out + i * panel);
    }
    for (; i < k; ++i) {
      for (int64_t j = 0; j < 8; ++j) out[i * panel + j] = j < there ? start[i * b.row + j * b.column] : 0.0f;
    }
  }
}

}  // namespace

const Kernel avx2_kernel = {12, 192, 12 * 12, run, pack};

}  // namespace disback

#else

namespace disback {
const Kernel avx2_kernel = {};
}  // namespace disback

#endif
