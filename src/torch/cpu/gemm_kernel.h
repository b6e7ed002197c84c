// What a kind of vectors gives to the products of gemm.h: `gemm_avx512.cpp` and `gemm_avx2.cpp`.

#pragma once

#include <cstdint>

#include "gemm.h"

namespace disback {

// A few rows of a result times the columns of one panel, along a part of K.
struct Tile {
  const float* a;
  int64_t row, column;
  const float* b;
  int64_t k;
  const float* bias;
  bool more;
  float* c;
  int64_t stride;
  // Of the panel's, from 1.
  int64_t columns;
};

struct Kernel {
  // Rows that callers should hand out multiples of.
  int64_t unit;
  // Steps along K at a time: what is needed of a panel and of the rows stays near.
  int64_t steps;
  // Rows at a time (a multiple of `unit`): their part of A stays in the second cache.
  int64_t group;
  // Computes `rows` rows of the tile.
  void (*run)(const Tile& tile, int64_t rows);
  // Packs one panel of b, of which `columns` are there and begin at `from`.
  void (*pack)(const Matrix& b, const float* from, int64_t k, int64_t columns, float* to);
};

extern const Kernel avx512_kernel, avx2_kernel;

}  // namespace disback
