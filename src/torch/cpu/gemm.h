// Matrix products of f32 at the rate of AVX-512 or AVX2, for the operators here that want what libtorch's lack: strides of any kind
// in both operands, filters packed once and used many times, results written where they are needed.

#pragma once

#include <cstdint>

namespace disback {

// Element (i, j) of a matrix is data[i * row + j * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

// Columns of a panel: a packed matrix [K, N] is [N / panel][K][panel], the last one filled up with zeros.
constexpr int64_t panel = 32;
inline int64_t panels(int64_t columns) { return (columns + panel - 1) / panel; }
inline int64_t packed_size(int64_t k, int64_t columns) { return panels(columns) * k * panel; }

// Vectors that the kernels here are written for and the processor has; with none of them nothing that follows may be called.
enum class Level { none, avx2, avx512 };
Level level();

// Rows of a result that should be handed out together.
int64_t unit();

// Packs panels from..to of b [K, N].
void pack(const Matrix& b, int64_t k, int64_t n, int64_t from, int64_t to, float* packed);

// Rows from..to of c [., N] (rows `stride` apart) become a [., K] times the packed matrix, plus `bias` [N] where there is one,
// plus what they were where `more`. One thread.
void multiply(const Matrix& a, int64_t from, int64_t to, const float* packed, int64_t k, int64_t n, const float* bias,
              bool more, float* c, int64_t stride);

}  // namespace disback
