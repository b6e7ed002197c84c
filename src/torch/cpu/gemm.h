// Matrix products of f32 at the rate of AVX-512 or AVX2, for the operators here that want what libtorch's lack: strides of any kind
// in both operands, filters packed once and used many times, results written where they are needed.
//
// Measured beside the crate gemm 0.19.0 (one thread, an Intel Xeon with AVX-512, 2026-11-30, best of 60, packing
// counted): our time over gemm's with its feature x86-v4, [M, K] x [K, N] with either order of the second operand.
// Winograd's products of the digits network: K = N = 16 0.65, 48 1.02 to 1.05, 128 0.93 to 1.02; of the DDPM++-like: 128
// and 256 0.92 to 1.03; DiT-S/2 (M = 1024): 384 x 1152 1.08, 384 x 384 1.03, 384 x 1536 1.07 to 1.11, 1536 x 384 1.05 to
// 1.14. Without that feature gemm computes with AVX2 and takes twice as long; our AVX2 kernels are 1.00 to 1.11 of it (K
// = N = 16 1.02). So the speed of plain products is no reason for a kernel of our own, and long ones are slower here.
// What keeps it: gemm has no operand that is packed once and used many times (every tile position of a Winograd
// convolution multiplies by the same filters: packing is up to 12 % of the time), no bias and no addition into rows that
// lie apart, and the callers are C++ inside libtorch's autograd, to which a Rust crate would be a call back.

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
